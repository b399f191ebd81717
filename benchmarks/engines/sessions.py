"""Conversations of several turns: with sessions, with whole prompts and the prefix cache, and with no cache at all.

    python -m benchmarks.engines.sessions --engine sglang --turns 6 --first 512

Every conversation has the same lengths: a first prompt, an answer, then for each further turn a few new tokens and an
answer. All conversations run beside each other, the turns of one after the other. "Sent" are prompt tokens that went
over the wire to the server, "cached" those whose keys and values it had; the cache is empty at each start.
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
from benchmarks.engines.harness import SERVERS, Failed, Fleet, Ship, cell, facts, parser_of, run_alone
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
    sent: int
    cached: int
    answers: tuple[tuple[int, ...], ...]
    """Of each conversation, all turns' tokens in order."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engine", choices=SERVERS, default="sglang")
    parser.add_argument("--conversations", type=int, default=64)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--first", type=int, default=1024, help="tokens of the first prompt")
    parser.add_argument("--observation", type=int, default=64, help="tokens that come in with each later turn")
    parser.add_argument("--answer", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=3)


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("python -m benchmarks.engines.sessions", __doc__)
    add_arguments(parser)
    run_alone(NAME, TITLE, measure, parser.parse_args(argv))


async def measure(fleet: Fleet, report: Report, args: argparse.Namespace) -> None:
    await fleet.muster(args.engine, *dict.fromkeys(variant for _, variant in WAYS))
    played: dict[str, list[Played] | Failed] = {}
    ships: dict[str, Ship] = {}
    for way, variant in WAYS:
        ship = await cell(fleet, f"start, {variant}", lambda v=variant: fleet.get(args.engine, v), limit_s=600)
        if isinstance(ship, Failed):
            played[way] = ship
            continue
        ships[variant] = ship
        played[way] = await cell(fleet, way, lambda w=way, s=ship: play_all(fleet, s, w, args))
    longest = args.first + args.turns * args.answer + (args.turns - 1) * args.observation
    work = (
        f"{args.conversations} conversations at once, {args.turns} turns: a first prompt of {args.first} tokens, then "
        f"{args.observation} a turn, answers of {args.answer}; {longest} tokens at the end"
    )
    report.facts(facts(fleet, list(ships.values()), work))
    head = ["way", f"seconds, median of {args.repetitions} (min to max)", "of neither", "tokens sent", "tokens cached"]
    head += ["processor s, here", "answers as with sessions"]
    report.table(head, [row(way, played) for way, _ in WAYS])
    ship = ships.get("plain")
    if ship is not None and "sessions" not in ship.engine.info.capabilities:
        report.text(f"{args.engine} has no sessions.")
    report.text(
        "Greedy answers of a random model: where two ways batch the same tokens differently, near-ties may fall "
        "differently in bfloat16, and all later turns then differ too."
    )


async def play_all(fleet: Fleet, ship: Ship, way: str, args: argparse.Namespace) -> list[Played]:
    """The first round warms up and isn't counted; every round has prompts of its own, the same for each way."""
    rounds = []
    for repetition in range(args.repetitions + 1):
        rng = random.Random(args.seed + repetition)
        vocab_size = fleet.setup.shape.vocab_size
        prompts = [
            [draw_tokens(rng, args.observation if turn else args.first, vocab_size) for turn in range(args.turns)]
            for _ in range(args.conversations)
        ]
        await ship.engine.flush_cache()
        played = await play(ship.engine, prompts, args.answer, with_sessions=way == "sessions")
        if repetition:
            fleet.report.log(f"{ship.name}, {way}: {played.wall_s:.3f} s, {played.sent} sent, {played.cached} cached")
            rounds.append(played)
    return rounds


async def play(
    engine: Engine, prompts: Sequence[Sequence[tuple[int, ...]]], answer: int, *, with_sessions: bool
) -> Played:
    """`prompts` are each conversation's new tokens, turn by turn."""
    before = await engine.stats()
    wall, cpu = time.perf_counter(), time.process_time()
    answers = await asyncio.gather(*(_converse(engine, turns, answer, with_sessions) for turns in prompts))
    wall_s, cpu_s = time.perf_counter() - wall, time.process_time() - cpu
    after = await engine.stats()
    return Played(
        wall_s=wall_s,
        cpu_s=cpu_s,
        sent=after.num_prompt_tokens_total - before.num_prompt_tokens_total,
        cached=after.num_cached_tokens_total - before.num_cached_tokens_total,
        answers=tuple(answers),
    )


async def _converse(
    engine: Engine, turns: Sequence[tuple[int, ...]], answer: int, with_sessions: bool
) -> tuple[int, ...]:
    if not with_sessions:
        history: tuple[int, ...] = ()
        made: tuple[int, ...] = ()
        for new in turns:
            completion = await engine.generate(request(history + new, answer, temperature=GREEDY))
            history += new + completion.token_ids
            made += completion.token_ids
        return made
    session = await engine.open_session(engine.info.max_context_len)
    try:
        made, parent = (), None
        for new in turns:
            asked = request(
                new,
                answer,
                temperature=GREEDY,
                session=SessionRef(session_id=session, parent_request_id=parent),
            )
            completion = await engine.generate(asked)
            parent = asked.request_id
            made += completion.token_ids
        return made
    finally:
        await engine.close_session(session)


def row(way: str, played: dict[str, list[Played] | Failed]) -> list[str]:
    rounds = played[way]
    if isinstance(rounds, Failed):
        return [way, rounds, *[""] * 5]
    seconds = [one.wall_s for one in rounds]
    base, first = played["neither"], played["sessions"]
    part = "" if isinstance(base, Failed) else f"{statistics.median(seconds) / _median_s(base):.0%}"
    same = ""
    if not isinstance(first, Failed):
        pairs = list(zip(rounds[0].answers, first[0].answers, strict=True))
        equal = sum(a == b for a, b in pairs)
        shared = statistics.mean(common_prefix(a, b) for a, b in pairs)
        same = f"{equal} of {len(pairs)}; {shared:.0f} of {len(pairs[0][0])} tokens alike"
    return [
        way,
        spread(seconds),
        part,
        f"{rounds[0].sent:,}",
        f"{rounds[0].cached:,}",
        f"{statistics.median(one.cpu_s for one in rounds):.2f}",
        same,
    ]


def _median_s(rounds: Sequence[Played]) -> float:
    return statistics.median(one.wall_s for one in rounds)


if __name__ == "__main__":
    main()
