"""One request on its way, over as many attempts as it takes.

attempt 1   prompt                  ──► 9 2 (ended by a weight update)
attempt 2   prompt 9 2              ──► 6   (the server died: what it had not sent is lost)
attempt 3   prompt 9 2              ──► 6 1 <end>
completion         9 2 | 6 1 <end>      one budget, the versions of both parts
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from skyrl_train.engines.server.client import Attempt, AttemptResult, WireSession
from skyrl_train.types import Completion, FinishReason, GenerateRequest, SamplingParams, VersionSpan

Ids = tuple[int, ...]


@dataclass(kw_only=True)
class Flight:
    """A request and what it has so far. `before` are the tokens of its session up to the parent's answer."""

    request: GenerateRequest
    before: Ids = ()
    token_ids: Ids = ()
    logprobs: tuple[float, ...] = ()
    versions: tuple[VersionSpan, ...] = ()
    num_cached_tokens: int = 0
    num_attempts: int = 0
    num_answers: int = 0
    """Attempts that returned, if only with nothing."""
    wire_id: str | None = None
    """Of the attempt that is in the server now; None between attempts."""
    ended_by_caller: bool = False
    ended_by_pause: bool = False
    waiting: asyncio.Future[Any] | None = None
    """What it waits for at the gate; once it is done the request looks again."""

    def __post_init__(self) -> None:
        if self.request.partial is not None:
            partial = self.request.partial
            self._have(partial.token_ids, partial.logprobs, partial.versions)
            self.num_cached_tokens = partial.num_cached_tokens

    @property
    def is_counted(self) -> bool:
        """Whether the server counts something over the answer: what it penalises, or how short it may be."""
        return self.request.sampling.min_new_tokens > 0 or self._has_penalties

    @property
    def _has_penalties(self) -> bool:
        sampling = self.request.sampling
        return any((sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty - 1))

    @property
    def whole_prompt(self) -> Ids:
        return self.before + self.request.prompt_token_ids

    def attempt(
        self, wire_id: str, *, session: WireSession | None, adapter: str | None, with_seed: bool, token_ids: Ids
    ) -> Attempt:
        """The next sending: `token_ids` is what the server gets before what the flight has."""
        self._give_up_what_a_next_attempt_misjudges()
        self.num_attempts += 1
        self.wire_id = wire_id
        return Attempt(
            wire_id=wire_id,
            token_ids=token_ids + self.token_ids,
            sampling=self._sampling_left(with_seed),
            adapter=adapter,
            priority=self.request.priority,
            session=session,
        )

    def add(self, result: AttemptResult, *, version: int) -> None:
        """What an attempt made; `version` is what was served when it was sent."""
        start = len(self.token_ids)
        spans: tuple[VersionSpan, ...]
        if not result.token_ids:
            spans = ()
        elif result.spans is None:
            spans = (VersionSpan(version=version, start=start, end=start + len(result.token_ids)),)
        else:
            spans = tuple(
                VersionSpan(version=_number(span.version, version), start=start + span.start, end=start + span.end)
                for span in result.spans
                if span.end > span.start
            )
        if self.num_answers == 0 and not self.token_ids:
            self.num_cached_tokens = result.num_cached_tokens
        self.num_answers += 1
        self._have(
            self.token_ids + result.token_ids, self.logprobs + result.logprobs, _merged((*self.versions, *spans))
        )

    def completion(self, finish_reason: FinishReason, stop_reason: str | int | None = None) -> Completion:
        return Completion(
            request_id=self.request.request_id,
            token_ids=self.token_ids,
            logprobs=self.logprobs,
            finish_reason=finish_reason,
            versions=self.versions,
            num_cached_tokens=self.num_cached_tokens,
            stop_reason=stop_reason,
        )

    def _sampling_left(self, with_seed: bool) -> SamplingParams:
        sampling, made = self.request.sampling, len(self.token_ids)
        if not with_seed and sampling.seed is not None:
            sampling = replace(sampling, seed=None)
        if not made:
            return sampling
        return replace(
            sampling,
            max_new_tokens=sampling.max_new_tokens - made,
            min_new_tokens=max(sampling.min_new_tokens - made, 0),
            # The server counts its random numbers from the first token that it makes: the same seed would give token
            # `made` the numbers that token 0 had.
            seed=None if sampling.seed is None else _seed_at(sampling.seed, made),
        )

    def _give_up_what_a_next_attempt_misjudges(self) -> None:
        """A server looks for stop strings, counts penalties and follows a grammar within one answer. A grammar and
        penalties on what was sampled start anew. For stop strings it is enough to sample the last few tokens again:
        each has a byte at least, so none that is kept can be the start of a stop that ends behind them.
        """
        sampling = self.request.sampling
        if sampling.grammar is not None or self._has_penalties:
            self._keep(0)
        elif sampling.stop:
            self._keep(max(len(self.token_ids) - max(len(stop.encode()) for stop in sampling.stop) + 1, 0))

    def _have(self, token_ids: Ids, logprobs: tuple[float, ...], versions: tuple[VersionSpan, ...]) -> None:
        self.token_ids, self.logprobs, self.versions = token_ids, logprobs, versions

    def _keep(self, count: int) -> None:
        spans = tuple(replace(span, end=min(span.end, count)) for span in self.versions if span.start < count)
        self._have(self.token_ids[:count], self.logprobs[:count], spans)


def ended(result: AttemptResult, sampling: SamplingParams, end_token_ids: Collection[int]) -> AttemptResult:
    """An abort that came in the very step that sampled the answer's end: the answer is whole.

    SGLang looks for an abort before it looks for the end, and its answer has the end token then. To go on from there
    would put a second answer behind the first. `end_token_ids` are the model's own.
    """
    if result.finish_reason != "abort":
        return result
    own = frozenset() if sampling.ignore_eos else frozenset(end_token_ids)
    for index, token in enumerate(result.token_ids):
        if token in own or token in sampling.stop_token_ids:
            stop_reason = token if token in sampling.stop_token_ids else None
            return replace(cut(result, index + 1), finish_reason="stop", stop_reason=stop_reason)
    return result


def before_version(result: AttemptResult, version: int) -> AttemptResult:
    """Without what was sampled under `version` and after it; an abort then."""
    if result.spans is None:
        count = 0
    else:
        starts = [span.start for span in result.spans if span.version == str(version)]
        count = min(starts, default=len(result.token_ids))
    if count == len(result.token_ids):
        return result
    return replace(cut(result, count), finish_reason="abort", stop_reason=None)


def cut(result: AttemptResult, count: int) -> AttemptResult:
    """The first `count` tokens of it."""
    spans = result.spans
    if spans is not None:
        spans = tuple(replace(span, end=min(span.end, count)) for span in spans if span.start < count)
    return replace(result, token_ids=result.token_ids[:count], logprobs=result.logprobs[:count], spans=spans)


def _merged(spans: tuple[VersionSpan, ...]) -> tuple[VersionSpan, ...]:
    merged: list[VersionSpan] = []
    for span in spans:
        if merged and merged[-1].version == span.version:
            merged[-1] = replace(merged[-1], end=span.end)
        else:
            merged.append(span)
    return tuple(merged)


def _number(name: str, otherwise: int) -> int:
    """A server's name of our version; one that we did not give is from before our first update."""
    return int(name) if name.removeprefix("-").isdigit() else otherwise


def _seed_at(seed: int, position: int) -> int:
    """Within 31 bits: servers differ in how large a seed they take."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{position}".encode(), digest_size=8).digest(), "little") >> 33
