"""Who may be in the batch together: a few places, each for one adapter or for the model without one.

A place stays with its adapter after the last request left it, until somebody else wants it: stacked tensors are made
anew only when occupants change.
"""

from __future__ import annotations

import numpy as np

from skyrl_train.engines.embedded.adapters.adapter import LoraAdapter
from skyrl_train.engines.embedded.radix_cache import BASE

FREE = -1


class Places:
    """`of_seat` [S] is the place of each seat's request, FREE where nobody sits. `num_changes` only rises."""

    def __init__(self, num_places: int, num_seats: int) -> None:
        self.of_seat = np.full(num_seats, FREE, dtype=np.int32)
        self.adapters: list[LoraAdapter | None] = [None] * num_places
        """By place; None is the model without an adapter, or nobody."""
        self.num_adapted = 0
        """Seats whose request has an adapter."""
        self.num_changes = 0
        self._numbers = [FREE] * num_places
        self._num_seated = [0] * num_places
        self._last_used = [0] * num_places
        self._clock = 0

    def has_room(self, adapter: LoraAdapter | None) -> bool:
        """Whether a request of this adapter could be seated now."""
        return number_of(adapter) in self._numbers or not all(self._num_seated)

    def sit(self, seat: int, adapter: LoraAdapter | None) -> None:
        """There must be room."""
        number = number_of(adapter)
        if number in self._numbers:
            place = self._numbers.index(number)
        else:
            idle = [place for place, seated in enumerate(self._num_seated) if not seated]
            place = min(idle, key=lambda place: (self._numbers[place] != FREE, self._last_used[place]))
            self._numbers[place], self.adapters[place] = number, adapter
            self.num_changes += 1
        self._num_seated[place] += 1
        self.num_adapted += adapter is not None
        self.of_seat[seat] = place

    def leave(self, seat: int) -> None:
        place = int(self.of_seat[seat])
        self._clock += 1
        self._last_used[place] = self._clock
        self._num_seated[place] -= 1
        self.num_adapted -= self.adapters[place] is not None
        self.of_seat[seat] = FREE

    def forget(self, number: int) -> None:
        """An adapter is gone; no request of it sits."""
        if number in self._numbers:
            place = self._numbers.index(number)
            assert not self._num_seated[place], f"{self._num_seated[place]} requests run with adapter {number}"
            self._numbers[place], self.adapters[place] = FREE, None
            self.num_changes += 1

    def number_at(self, seat: int) -> int:
        """Of the adapter that this seat's request runs with."""
        return self._numbers[int(self.of_seat[seat])]

    def check_integrity(self) -> None:
        taken = [number for number in self._numbers if number != FREE]
        assert len(taken) == len(set(taken)), "an adapter has two places"
        for place, number in enumerate(self._numbers):
            assert self._num_seated[place] == int((self.of_seat == place).sum())
            assert number == FREE or number == number_of(self.adapters[place])
            assert number != FREE or not self._num_seated[place]
        adapted = [place for place, adapter in enumerate(self.adapters) if adapter is not None]
        assert self.num_adapted == int(np.isin(self.of_seat, adapted).sum())


def number_of(adapter: LoraAdapter | None) -> int:
    return BASE if adapter is None else adapter.number
