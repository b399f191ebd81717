"""One request inside the engine, and the arrays that hold the running ones.

queued --seat--> running --finish--> completion
   ^                |
   +---- retract ---+      tokens, log-probabilities and version marks are kept; keys and values are recomputed
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from skyrl_train.engines.embedded.radix_cache import Node
from skyrl_train.engines.embedded.rules.rule import LogitRule
from skyrl_train.engines.embedded.sampling_table import SamplingTable
from skyrl_train.engines.embedded.stops import StopTable
from skyrl_train.types import Completion, FinishReason, GenerateRequest, VersionSpan

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]

NO_SEAT = -1


@dataclass(eq=False, slots=True)
class RequestState:
    """`tokens` and `logprobs` cover prompt and answer while the request has no seat; else the seat has them."""

    request: GenerateRequest
    order: int
    """Position in the order of submission: older requests are served first and retracted last."""
    seed: int
    tokens: Ints
    logprobs: Floats
    seat: int = NO_SEAT
    node: Node | None = None
    """End of the locked prefix in the cache."""
    num_owned_from: int = 0
    """Slots at positions [num_owned_from, ...) are this request's own; those before belong to the cache."""
    shares_prompt: bool = True
    """False once another request put a continuation of our prefix into the cache before us."""
    num_cached_tokens: int | None = None
    version_marks: list[tuple[int, int]] = field(default_factory=list)
    """(policy version, answer tokens that older versions had made)."""
    rule: LogitRule | None = None
    """It has been told every token of the answer."""
    urgency: int = 0
    """Its priority, where higher numbers come first; the priority's negative where lower ones do."""

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def was_started(self) -> bool:
        return self.num_cached_tokens is not None

    def sort_key(self) -> tuple[int, int]:
        return (-self.urgency, self.order)


class Seats:
    """State of running requests, one row a seat, as arrays so that a step touches all of them at once.

    S seats, C positions. `length` counts known tokens, `computed` those whose keys and values are in the pool
    once the step being planned has run, `allocated` those that have a slot. A decoding request has
    computed == length - 1 between steps, and some slots in advance.

    A device that runs ahead of the host may have sampled a token that is not known here yet: `in_flight` is 1
    then, and a decoding request has computed == length - 1 + in_flight. `tenancy` changes with a seat's occupant,
    so that a late token is not given to the wrong one.
    """

    def __init__(self, num_seats: int, context_len: int, eos_ids: Sequence[int]) -> None:
        self.num_seats = num_seats
        self.tokens = np.zeros((num_seats, context_len), dtype=np.int32)
        self.logprobs = np.zeros((num_seats, context_len), dtype=np.float32)
        self.slots = np.zeros((num_seats, context_len), dtype=np.int32)
        self.length = np.zeros(num_seats, dtype=np.int32)
        self.computed = np.zeros(num_seats, dtype=np.int32)
        self.allocated = np.zeros(num_seats, dtype=np.int32)
        self.in_flight = np.zeros(num_seats, dtype=np.int32)
        self.tenancy = np.zeros(num_seats, dtype=np.int64)
        self.prompt_len = np.zeros(num_seats, dtype=np.int32)
        self.min_len = np.zeros(num_seats, dtype=np.int32)
        self.max_len = np.zeros(num_seats, dtype=np.int32)
        self.sampling = SamplingTable(num_seats)
        self.stops = StopTable(num_seats, eos_ids)
        self.owners: list[RequestState | None] = [None] * num_seats
        self.rules: dict[int, LogitRule] = {}
        self.has_rule = np.zeros(num_seats, dtype=bool)
        self._free = list(range(num_seats - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, state: RequestState, matched: npt.NDArray[np.int32]) -> int:
        """Seat a request whose first `len(matched)` tokens lie in these slots."""
        seat = self._free.pop()
        sampling, n = state.request.sampling, len(state.tokens)
        self.tokens[seat, :n] = state.tokens
        self.logprobs[seat, :n] = state.logprobs
        self.slots[seat, : len(matched)] = matched
        self.length[seat] = n
        self.computed[seat] = len(matched)
        self.in_flight[seat] = 0
        self.tenancy[seat] += 1
        self.prompt_len[seat] = state.num_prompt_tokens
        self.min_len[seat] = state.num_prompt_tokens + sampling.min_new_tokens
        self.max_len[seat] = state.num_prompt_tokens + sampling.max_new_tokens
        self.sampling.set(seat, sampling, state.seed)
        self.stops.set(seat, sampling)
        self.owners[seat] = state
        self.has_rule[seat] = state.rule is not None
        if state.rule is not None:
            self.rules[seat] = state.rule
        state.seat = seat
        return seat

    def leave(self, state: RequestState) -> None:
        """Copy the tokens back into the request and free its seat."""
        seat = state.seat
        n = self.length[seat]
        state.tokens = self.tokens[seat, :n].copy()
        state.logprobs = self.logprobs[seat, :n].copy()
        state.seat = NO_SEAT
        self.owners[seat] = None
        self.rules.pop(seat, None)
        self.has_rule[seat] = False
        self.in_flight[seat] = 0
        self.tenancy[seat] += 1
        self._free.append(seat)


def to_completion(state: RequestState, reason: FinishReason, stop_reason: str | int | None) -> Completion:
    """The answer of a request that left its seat or never had one."""
    start = state.num_prompt_tokens
    num_new = len(state.tokens) - start
    marks = [*state.version_marks, (0, num_new)]
    spans = tuple(
        VersionSpan(version=version, start=begin, end=end)
        for (version, begin), (_, end) in pairwise(marks)
        if end > begin
    )
    return Completion(
        request_id=state.request.request_id,
        token_ids=tuple(state.tokens[start:].tolist()),
        logprobs=tuple(state.logprobs[start:].tolist()),
        finish_reason=reason,
        versions=spans,
        num_cached_tokens=state.num_cached_tokens or 0,
        stop_reason=stop_reason,
    )
