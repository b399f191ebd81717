"""Which waiting request is admitted next, and for whom a running one makes way.

Higher priority always comes first. Within one priority:

    fcfs   the oldest
    lpm    the one with the longest prefix in the cache (Zheng et al., SGLang, arXiv:2312.07104): what is cached is
           used before it is evicted. Of the oldest WINDOW only, so that a long queue costs no more than a short one;
           and when MAX_PASSED others were admitted while a request was the oldest, it is next.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from skyrl_train.engines.embedded.request import RequestState
from skyrl_train.engines.embedded.waiting import WaitingQueue

WINDOW = 64
MAX_PASSED = 64


class QueueOrder(Protocol):
    def new_step(self) -> None:
        """A step is being planned; the cache has changed since the last one."""
        ...

    def next(self, queues: list[WaitingQueue]) -> RequestState | None:
        """Who of these queues is next, without taking it; None if they are empty."""
        ...

    def admitted(self, state: RequestState) -> None:
        """It has left its queue for a seat."""
        ...


class FirstComeFirstServed:
    def new_step(self) -> None:
        pass

    def next(self, queues: list[WaitingQueue]) -> RequestState | None:
        return oldest(queues)

    def admitted(self, state: RequestState) -> None:
        pass


class LongestPrefixFirst:
    """`cached_len`: how many of a request's tokens are in the cache. Ranks once a step."""

    def __init__(self, cached_len: Callable[[RequestState], int]) -> None:
        self._cached_len = cached_len
        self._ranked: list[RequestState] | None = None
        self._oldest: RequestState | None = None
        self._num_passed = 0
        """Requests that were admitted since `_oldest` is the oldest."""

    def new_step(self) -> None:
        self._ranked = None

    def next(self, queues: list[WaitingQueue]) -> RequestState | None:
        first = oldest(queues)
        if first is not self._oldest:
            self._oldest, self._num_passed = first, 0
        if first is None or self._num_passed >= MAX_PASSED:
            return first
        if self._ranked is None:
            self._ranked = self._rank(first, queues)
        waiting = (
            state for state in self._ranked if state.urgency == first.urgency and any(state in q for q in queues)
        )
        return next(waiting, first)

    def admitted(self, state: RequestState) -> None:
        self._num_passed += 1

    def _rank(self, first: RequestState, queues: list[WaitingQueue]) -> list[RequestState]:
        window = sorted((state for queue in queues for state in queue.first(WINDOW)), key=RequestState.sort_key)[
            :WINDOW
        ]
        peers = [state for state in window if state.urgency == first.urgency]
        return sorted(peers, key=lambda state: (-self._cached_len(state), state.order))


def oldest(queues: list[WaitingQueue]) -> RequestState | None:
    """Of the highest priority."""
    heads = (queue.head() for queue in queues)
    return min((head for head in heads if head is not None), key=RequestState.sort_key, default=None)


def make_way(
    waiting: RequestState,
    *,
    threshold: int,
    fits: Callable[[RequestState], bool],
    running: Callable[[], list[RequestState]],
    retract: Callable[[RequestState], object],
) -> None:
    """Retract running requests until `waiting` fits: the youngest of the lowest priority first, and only such whose
    priority is lower by `threshold`, by 1 at least. Who was retracted for another can't come back in its place.
    """
    while not fits(waiting):
        last = max(running(), key=RequestState.sort_key, default=None)
        if last is None or waiting.urgency - last.urgency < max(threshold, 1):
            return
        retract(last)
