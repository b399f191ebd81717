"""Conversations of several turns: with sessions, with whole prompts and the prefix cache, and with no cache at all.

    python -m benchmarks.engines.sessions --engine sglang --turns 2,6 --first 512

Every conversation has the same lengths: a first prompt, an answer, then for each further turn a few new tokens and an
answer. All conversations run beside each other, the turns of one after the other. "Asked" are prompt tokens that a
request carried, "prefilled" those of its whole prompt, history included, whose keys and values the engine did not have;
the cache is empty at each start. The least that can be prefilled is what is new, and for each later turn the last token
of the answer before it, which was sampled and never read.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.engines.asking import GREEDY, common_prefix, request, spread
from benchmarks.engines.harness import BACKENDS, Failed, Fleet, Ship, cell, facts, ints, parser_of, run_alone
from benchmarks.report import Report
from benchmarks.workload import draw_tokens
from skyrl_train.engines.base import Engine
from skyrl_train.types import SessionRef

NAME, TITLE = "sessions-{engine}", "Sessions, prefix cache, neither, {engine}"
WAYS = (("sessions", "plain"), ("prefix cache, whole prompts", "plain"), ("neither", "no prefix cache"))
"""(name, variant of the engine)."""


@dataclass(frozen=True, kw_only=True)
class Played:
    """All conversations once."""

    wall_s: float
    cpu_s: float
    asked: int
    prefilled: int
    answers: tuple[tuple[int, ...], ...]
    """Of each conversation, all turns' tokens in order."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Of every conversation of one table row."""

    conversations: int
    turns: int
    first: int
    observation: int
    answer: int
    strangers: int

    @property
    def new(self) -> int:
        """Prompt tokens of all conversations that nobody has seen before."""
        return self.conversations * (self.first + (self.turns - 1) * self.observation)

    @property
    def unread(self) -> int:
        """Last tokens of answers that are gone on from."""
        return self.conversations * (self.turns - 1)

    @property
    def longest(self) -> int:
        return self.first + self.turns * self.answer + (self.turns - 1) * self.observation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engine", choices=BACKENDS, default="sglang")
    parser.add_argument("--conversations", type=int, default=64)
    parser.add_argument("--turns", type=ints, default=(6,), help="may be several, as 2,6")
    parser.add_argument("--first", type=ints, default=(1024,), help="tokens of the first prompt; may be several")
    parser.add_argument("--observation", type=int, default=64, help="tokens that come in with each later turn")
    parser.add_argument("--answer", type=int, default=64)
    parser.add_argument(
        "--strangers",
        type=int,
        default=0,
        help="requests between two turns of a conversation that belong to none and are as long as a first prompt: they "
        "take room in the cache",
    )
    parser.add_argument("--repetitions", type=int, default=3)


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("python -m benchmarks.engines.sessions", __doc__)
    add_arguments(parser)
    args = parser.parse_args(argv)
    run_alone(f"{NAME}-among-strangers" if args.strangers else NAME, TITLE, measure, args)


async def measure(fleet: Fleet, report: Report, args: argparse.Namespace) -> None:
    await fleet.muster(args.engine, *dict.fromkeys(variant for _, variant in WAYS))
    works = [
        Lengths(
            conversations=args.conversations,
            turns=turns,
            first=first,
            observation=args.observation,
            answer=args.answer,
            strangers=args.strangers,
        )
        for first in args.first
        for turns in args.turns
    ]
    played: dict[tuple[str, Lengths], list[Played] | Failed] = {}
    ships: dict[str, Ship] = {}
    for way, variant in WAYS:
        ship = await cell(fleet, f"start, {variant}", lambda v=variant: fleet.get(args.engine, v), limit_s=600)
        for work in works:
            if isinstance(ship, Failed):
                played[way, work] = ship
                continue
            ships[variant] = ship
            played[way, work] = await cell(
                fleet,
                f"{way}, {work}",
                lambda w=way, s=ship, p=work: play_all(fleet, s, w, p, args.repetitions, args.seed),
            )
    workload = (
        f"{args.conversations} conversations at once: a first prompt, then {args.observation} new tokens a turn, "
        f"answers of {args.answer}; {max(work.longest for work in works)} tokens at the end of the longest; "
        f"{args.strangers} requests of strangers between two turns"
    )
    report.facts(facts(fleet, list(ships.values()), workload))
    head = ["turns", "first prompt", "way", f"seconds, median of {args.repetitions} (min to max)", "of neither"]
    head += ["tokens asked", "prefilled", "over the least", "processor s, here", "answers as with sessions"]
    report.table(head, [row(way, work, played) for work in works for way, _ in WAYS])
    ship = ships.get("plain")
    if ship is not None and "sessions" not in ship.engine.info.capabilities:
        report.text(f"{args.engine} has no sessions.")
    report.text(
        "Greedy answers of a random model: where two ways batch the same tokens differently, near-ties may fall "
        "differently in bfloat16, and all later turns then differ too."
    )


async def play_all(fleet: Fleet, ship: Ship, way: str, work: Lengths, repetitions: int, seed: int) -> list[Played]:
    """The first round warms up and isn't counted; every round has prompts of its own, the same for each way."""
    rounds = []
    for repetition in range(repetitions + 1):
        rng = random.Random(seed + repetition)
        vocab_size = fleet.setup.shape.vocab_size
        prompts = [
            [draw_tokens(rng, work.observation if turn else work.first, vocab_size) for turn in range(work.turns)]
            for _ in range(work.conversations)
        ]
        strangers = [
            [
                [draw_tokens(rng, work.first, vocab_size) for _ in range(work.strangers if turn else 0)]
                for turn in range(work.turns)
            ]
            for _ in range(work.conversations)
        ]
        await ship.engine.flush_cache()
        played = await play(ship.engine, prompts, strangers, work.answer, with_sessions=way == "sessions")
        if repetition:
            fleet.report.log(
                f"{ship.name}, {way}, {work.turns} turns, first {work.first}: {played.wall_s:.3f} s, {played.asked} "
                f"asked, {played.prefilled} prefilled"
            )
            rounds.append(played)
    return rounds


Ids = tuple[int, ...]


async def play(
    engine: Engine,
    prompts: Sequence[Sequence[Ids]],
    strangers: Sequence[Sequence[Sequence[Ids]]],
    answer: int,
    *,
    with_sessions: bool,
) -> Played:
    """`prompts` are each conversation's new tokens, turn by turn; `strangers` what comes before that turn."""
    wall, cpu = time.perf_counter(), time.process_time()
    conversations = await asyncio.gather(
        *(
            _converse(engine, turns, between, answer, with_sessions)
            for turns, between in zip(prompts, strangers, strict=True)
        )
    )
    return Played(
        wall_s=time.perf_counter() - wall,
        cpu_s=time.process_time() - cpu,
        asked=sum(asked for _, asked, _ in conversations),
        prefilled=sum(prefilled for _, _, prefilled in conversations),
        answers=tuple(made for made, _, _ in conversations),
    )


async def _converse(
    engine: Engine, turns: Sequence[Ids], strangers: Sequence[Sequence[Ids]], answer: int, with_sessions: bool
) -> tuple[Ids, int, int]:
    """All answers' tokens, the prompt tokens that were asked with, and those that were computed."""
    session = await engine.open_session(engine.info.max_context_len) if with_sessions else None
    try:
        made: Ids = ()
        history: Ids = ()
        parent, num_asked, num_prefilled = None, 0, 0
        for new, others in zip(turns, strangers, strict=True):
            await asyncio.gather(*(engine.generate(request(one, 1, temperature=GREEDY)) for one in others))
            ref = None if session is None else SessionRef(session_id=session, parent_request_id=parent)
            asked = request(history + new if ref is None else new, answer, temperature=GREEDY, session=ref)
            completion = await engine.generate(asked)
            num_asked += len(asked.prompt_token_ids)
            num_prefilled += len(history) + len(new) - completion.num_cached_tokens
            parent = asked.request_id
            history += new + completion.token_ids
            made += completion.token_ids
        return made, num_asked, num_prefilled
    finally:
        if session is not None:
            await engine.close_session(session)


def row(way: str, work: Lengths, played: dict[tuple[str, Lengths], list[Played] | Failed]) -> list[str]:
    rounds, at = played[way, work], [str(work.turns), str(work.first)]
    if isinstance(rounds, Failed):
        return [*at, way, rounds, *[""] * 6]
    seconds = [one.wall_s for one in rounds]
    base, first = played["neither", work], played["sessions", work]
    part = "" if isinstance(base, Failed) else f"{statistics.median(seconds) / _median_s(base):.0%}"
    same = ""
    if not isinstance(first, Failed):
        pairs = list(zip(rounds[0].answers, first[0].answers, strict=True))
        equal = sum(a == b for a, b in pairs)
        shared = statistics.mean(common_prefix(a, b) for a, b in pairs)
        same = f"{equal} of {len(pairs)}; {shared:.0f} of {len(pairs[0][0])} tokens alike"
    return [
        *at,
        way,
        spread(seconds),
        part,
        f"{rounds[0].asked:,}",
        f"{rounds[0].prefilled:,}",
        f"{rounds[0].prefilled - work.new - work.unread:,}",
        f"{statistics.median(one.cpu_s for one in rounds):.2f}",
        same,
    ]


def _median_s(rounds: Sequence[Played]) -> float:
    return statistics.median(one.wall_s for one in rounds)


if __name__ == "__main__":
    main()
