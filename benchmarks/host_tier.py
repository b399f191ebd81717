"""More conversations than the KV pool holds: with a host tier behind it, without, and in a pool that holds them all.

    python -m benchmarks.host_tier --first 256,1024

All conversations have their first turn, then all have their second, and so on: when a turn comes, the others have
pushed its history out of the small pool. "Prefilled" are prompt tokens, history included, whose keys had to be
computed; the least is what is new and, for each later turn, the last token of the answer before it, which was never
read. Contestants take turns, and each round has prompts of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.engines.asking import GREEDY, num_equal, request
from benchmarks.engines.harness import ints
from benchmarks.measure import Timing, summarize, time_once
from benchmarks.models import SHAPES, build_model
from benchmarks.report import RESULTS, Report
from benchmarks.workload import draw_tokens
from skyrl_train.attention import ATTENTION_NAME
from skyrl_train.engines.embedded import EmbeddedConfig, EmbeddedEngine

SMALL, TIER, LARGE = "small pool", "small pool, host tier", "pool for all"
WAYS = (SMALL, TIER, LARGE)

Ids = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Of every conversation of one comparison. The small pool holds `resident` of them at their full length."""

    conversations: int
    resident: int
    turns: int
    first: int
    observation: int
    answer: int

    @property
    def longest(self) -> int:
        return self.first + (self.turns - 1) * self.observation + self.turns * self.answer

    @property
    def asked(self) -> int:
        """Prompt tokens of all turns, history included."""
        grown = self.turns * (self.turns - 1) // 2 * (self.observation + self.answer)
        return self.conversations * (self.turns * self.first + grown)

    @property
    def least(self) -> int:
        return self.conversations * (self.first + (self.turns - 1) * (self.observation + 1))


@dataclass(frozen=True, kw_only=True)
class Played:
    """All conversations once. `read_back` tokens came from the host, `evicted` went out of the pool."""

    timing: Timing
    prefilled: int
    read_back: int
    evicted: int
    answers: tuple[Ids, ...]


def make_engine(model: Any, way: str, work: Lengths) -> EmbeddedEngine:
    """`resident` conversations run at once, whatever the pool."""
    of_all = work.conversations * work.longest
    config = EmbeddedConfig(
        max_num_seqs=work.resident,
        max_context_len=work.longest,
        kv_cache_tokens=of_all if way == LARGE else work.resident * work.longest,
        host_cache_ratio=work.conversations / work.resident if way == TIER else None,
    )
    return EmbeddedEngine(model, None, config=config)


def draw_prompts(work: Lengths, vocab_size: int, seed: int) -> list[list[Ids]]:
    """Of each conversation, what is new in each turn."""
    rng = random.Random(seed)
    return [
        [draw_tokens(rng, work.observation if turn else work.first, vocab_size) for turn in range(work.turns)]
        for _ in range(work.conversations)
    ]


def play(engine: EmbeddedEngine, prompts: Sequence[Sequence[Ids]], work: Lengths) -> Played:
    """The cache is empty at the start."""
    histories: list[Ids] = [() for _ in prompts]
    answers: list[Ids] = [() for _ in prompts]
    prefilled = 0

    async def converse() -> None:
        nonlocal prefilled
        for turn in range(work.turns):
            whole = [history + new[turn] for history, new in zip(histories, prompts, strict=True)]
            made = await asyncio.gather(
                *(engine.generate(request(prompt, work.answer, temperature=GREEDY)) for prompt in whole)
            )
            for i, (prompt, completion) in enumerate(zip(whole, made, strict=True)):
                prefilled += len(prompt) - completion.num_cached_tokens
                histories[i] = prompt + completion.token_ids
                answers[i] += completion.token_ids

    asyncio.run(engine.flush_cache())
    before = engine.core.stats()
    timing = time_once(lambda: asyncio.run(converse()), "cpu")
    after = engine.core.stats()
    return Played(
        timing=timing,
        prefilled=prefilled,
        read_back=after.num_host_cached_tokens_total - before.num_host_cached_tokens_total,
        evicted=after.num_evicted_tokens_total - before.num_evicted_tokens_total,
        answers=tuple(answers),
    )


def compare(model: Any, work: Lengths, *, repetitions: int, seed: int, report: Report) -> dict[str, list[Played]]:
    """The first round warms up and isn't counted."""
    engines = {way: make_engine(model, way, work) for way in WAYS}
    played: dict[str, list[Played]] = {way: [] for way in WAYS}
    for repetition in range(repetitions + 1):
        prompts = draw_prompts(work, model.config.vocab_size, seed + repetition)
        for way, engine in engines.items():
            one = play(engine, prompts[:2] if repetition == 0 else prompts, work)
            if repetition:
                played[way].append(one)
                report.log(
                    f"first {work.first}, {way}: {one.timing}; {one.prefilled} of {work.asked} prefilled, "
                    f"{one.read_back} read back, {one.evicted} evicted"
                )
    for engine in engines.values():
        asyncio.run(engine.close())
    return played


def rows(work: Lengths, played: dict[str, list[Played]], kv_bytes: int) -> list[list[str]]:
    base = summarize([one.timing for one in played[SMALL]]).median_s
    result = []
    for way in WAYS:
        rounds = played[way]
        figures = summarize([one.timing for one in rounds])
        pool = (work.conversations if way == LARGE else work.resident) * work.longest
        same = num_equal(rounds[0].answers, played[LARGE][0].answers)
        result.append(
            [
                str(work.first),
                way,
                f"{pool * kv_bytes / 2**20:.0f}",
                f"{figures.median_s:.2f} ({figures.min_s:.2f} to {figures.max_s:.2f})",
                f"{figures.median_s / base:.0%}",
                f"{figures.cpu_s:.2f}",
                f"{rounds[0].prefilled:,}",
                f"{rounds[0].prefilled - work.least:,}",
                f"{rounds[0].read_back:,}",
                f"{same} of {work.conversations}",
                figures.others,
            ]
        )
    return result


def main(argv: Sequence[str] | None = None) -> None:
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host_tier", description=about)
    parser.add_argument("--conversations", type=int, default=32)
    parser.add_argument("--resident", type=int, default=8, help="conversations that the small pool holds")
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--first", type=ints, default=(256, 1024), help="tokens of the first prompt; may be several")
    parser.add_argument("--observation", type=int, default=256, help="tokens that come in with each later turn")
    parser.add_argument("--answer", type=int, default=16)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    shape = SHAPES[args.shape]
    model = build_model(shape, attn_implementation=ATTENTION_NAME, device="cpu", dtype=torch.float32, seed=args.seed)
    report = Report(
        f"A host tier behind a small KV pool, {shape.name}", f"host-tier-{shape.name}-{machine.slug('cpu')}", args.out
    )
    report.facts(
        {
            **machine.describe("cpu"),
            "model": f"Qwen2 of shape {shape.name}, float32, random with seed {args.seed}",
            "workload": f"{args.conversations} conversations of {args.turns} turns, a pool for {args.resident}: a "
            f"first prompt, then {args.observation} new tokens a turn, greedy answers of {args.answer}; "
            f"{torch.get_num_threads()} threads",
        }
    )
    table = []
    for first in args.first:
        work = Lengths(
            conversations=args.conversations,
            resident=args.resident,
            turns=args.turns,
            first=first,
            observation=args.observation,
            answer=args.answer,
        )
        played = compare(model, work, repetitions=args.repetitions, seed=args.seed, report=report)
        table += rows(work, played, shape.kv_bytes_per_token(torch.float32))
        del played
        gc.collect()
    head = ["first prompt", "way", "pool, MiB", f"seconds, median of {args.repetitions} (min to max)", "of small pool"]
    head += ["processor s", "prefilled", "over the least", "read back", "answers as in the pool for all", "others"]
    report.table(head, table)
    report.text(
        "The tier holds all conversations beside the small pool. Answers may differ where a prefix is computed in "
        "other steps than it was at first: float32 in another order, and near-ties of a random model."
    )
    report.save()


if __name__ == "__main__":
    main()
