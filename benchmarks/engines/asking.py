"""Requests to one engine, all at once, and what they took: by the clock, in processor seconds, in tokens."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.workload import Request
from skyrl_train.engines.base import Engine, EngineStats
from skyrl_train.engines.server.engine import ServerEngine
from skyrl_train.types import Completion, GenerateRequest, SamplingParams, SessionRef

_numbers = itertools.count()

GREEDY, SAMPLED = 0.0, 1.0
"""Temperatures."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One round of requests. `sent` are prompt tokens that went to the engine, `cached` those that it had.

    `accept_len` is tokens a step of a request, None without speculation. `cpu_s` is this process's own.
    """

    completions: tuple[Completion, ...]
    wall_s: float
    cpu_s: float
    sent: int = 0
    cached: int = 0
    accept_len: float | None = None

    @property
    def num_tokens(self) -> int:
        return sum(len(completion.token_ids) for completion in self.completions)

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.wall_s

    @property
    def token_ids(self) -> list[tuple[int, ...]]:
        return [completion.token_ids for completion in self.completions]


def request(
    prompt_token_ids: Sequence[int],
    max_new_tokens: int,
    *,
    temperature: float,
    session: SessionRef | None = None,
    request_id: str | None = None,
) -> GenerateRequest:
    """Exactly `max_new_tokens` tokens, whatever they are."""
    return GenerateRequest(
        request_id=request_id or f"bench-{next(_numbers)}",
        prompt_token_ids=tuple(prompt_token_ids),
        sampling=SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature, ignore_eos=True),
        session=session,
    )


async def ask(engine: Engine, requests: Sequence[Request], *, temperature: float) -> Run:
    """All at once; raises what the first failing request raised."""
    asked = [request(r.prompt_token_ids, r.max_new_tokens, temperature=temperature) for r in requests]
    before, drafts_before = await engine.stats(), await drafts_of_vllm(engine)
    wall, cpu = time.perf_counter(), time.process_time()
    completions = await asyncio.gather(*(engine.generate(one) for one in asked))
    wall_s, cpu_s = time.perf_counter() - wall, time.process_time() - cpu
    after, drafts_after = await engine.stats(), await drafts_of_vllm(engine)
    short = [c.request_id for c, r in zip(completions, requests, strict=True) if len(c.token_ids) != r.max_new_tokens]
    if short:
        raise RuntimeError(f"{len(short)} of {len(requests)} answers have another length than was asked for")
    tokens = sum(r.max_new_tokens for r in requests)
    accept_len = (
        accept_len_between(before, after)
        if drafts_before is None or drafts_after is None
        else accept_len_of(tokens, *(now - then for now, then in zip(drafts_after, drafts_before, strict=True)))
    )
    return Run(
        completions=tuple(completions),
        wall_s=wall_s,
        cpu_s=cpu_s,
        sent=after.num_prompt_tokens_total - before.num_prompt_tokens_total,
        cached=after.num_cached_tokens_total - before.num_cached_tokens_total,
        accept_len=accept_len,
    )


async def drafts_of_vllm(engine: Engine) -> tuple[float, float] | None:
    """How many drafts were verified and how many of their tokens accepted, so far; None of another engine.

    vLLM's own accept length leaves out the steps that had no draft, so it can't be taken apart by rounds.
    """
    if "speculation" not in engine.info.capabilities or not isinstance(engine, ServerEngine):
        return None
    sums = dict.fromkeys(("num_drafts", "num_accepted_tokens"), 0.0)
    found = False
    for line in (await engine.metrics_text()).splitlines():
        for name in sums:
            if line.startswith((f"vllm:spec_decode_{name}_total{{", f"vllm:spec_decode_{name}_total ")):
                sums[name] += float(line.rpartition(" ")[2])
                found = True
    return (sums["num_drafts"], sums["num_accepted_tokens"]) if found else None


def accept_len_of(tokens: int, drafts: float, accepted: float) -> float:
    """Tokens a step: a step with a draft makes what it accepts and one more, any other step one. The last draft of an
    answer may have more accepted than there was room for.
    """
    return tokens / (drafts + max(tokens - accepted - drafts, 0.0))


def accept_len_between(before: EngineStats, after: EngineStats) -> float | None:
    """Tokens a verification between two looks; the engine's own figure is over all since its start."""
    if after.accept_len is None:
        return None
    tokens = after.num_generated_tokens_total - before.num_generated_tokens_total
    steps = after.num_generated_tokens_total / after.accept_len
    if before.accept_len is not None:
        steps -= before.num_generated_tokens_total / before.accept_len
    return tokens / steps if steps > 0 else None


def median_run(runs: Sequence[Run]) -> Run:
    """The one in the middle by the clock, of an even number the slower one."""
    return sorted(runs, key=lambda run: run.wall_s)[len(runs) // 2]


def spread(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):.3f} ({min(seconds):.3f} to {max(seconds):.3f})"


def num_equal(one: Sequence[Sequence[int]], other: Sequence[Sequence[int]]) -> int:
    return sum(tuple(a) == tuple(b) for a, b in zip(one, other, strict=True))


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens before the first difference."""
    for i, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return i
    return min(len(one), len(other))
