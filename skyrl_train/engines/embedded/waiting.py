"""The queue of requests without a seat: higher priority first, then the older one."""

from __future__ import annotations

import heapq

from skyrl_train.engines.embedded.request import RequestState


class WaitingQueue:
    """A heap from which any request can be removed; what was removed is dropped when it reaches the top."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int], RequestState]] = []
        self._members: set[RequestState] = set()

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, state: RequestState) -> bool:
        return state in self._members

    def push(self, state: RequestState) -> None:
        assert state not in self._members
        self._members.add(state)
        heapq.heappush(self._heap, (state.sort_key(), state))

    def remove(self, state: RequestState) -> None:
        self._members.remove(state)

    def head(self) -> RequestState | None:
        while self._heap and self._heap[0][1] not in self._members:
            heapq.heappop(self._heap)
        return self._heap[0][1] if self._heap else None

    def first(self, count: int) -> list[RequestState]:
        """The first `count` in order, without taking them; costs nothing for those behind."""
        found: list[RequestState] = []
        while len(found) < count and (head := self.head()) is not None:
            heapq.heappop(self._heap)
            found.append(head)
        for state in found:
            heapq.heappush(self._heap, (state.sort_key(), state))
        return found

    def in_order(self) -> list[RequestState]:
        return sorted(self._members, key=RequestState.sort_key)
