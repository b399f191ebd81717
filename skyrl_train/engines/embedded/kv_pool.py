"""Keys and values of all tokens: one slot a token, and the list of free slots.

    slot   0   1   2   3   4   5 ...           num_slots
    K[l]  [Hkv, D] each; V[l] alike; one tensor a layer

A request's tokens may lie in any slots; a table [request, position] -> slot says where. Nothing here knows
who owns a slot: the prefix cache and the scheduler do, and `check_integrity` of the core adds them up.

`give_back` returns the tensors' memory to the system and `take_again` gets as much again, without content. The tensors
stay the same objects; their addresses change.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from skyrl_train.engines.embedded.config import KVShape

Slots = npt.NDArray[np.int32]


class KVPool:
    """`keys[layer]` and `values[layer]` are [num_slots + 1, Hkv, D]; slot `num_slots` belongs to nobody."""

    def __init__(self, layers: dict[int, KVShape], num_slots: int, device: torch.device) -> None:
        self.num_slots = num_slots
        self.layers = layers
        # Uninitialised on purpose: on a CPU, pages that no token ever used are never touched.
        self.keys = {i: self._empty(shape, device) for i, shape in layers.items()}
        self.values = {i: self._empty(shape, device) for i, shape in layers.items()}
        self._stack: Slots = np.arange(num_slots - 1, -1, -1, dtype=np.int32)
        self._num_free = num_slots

    def _empty(self, shape: KVShape, device: torch.device) -> torch.Tensor:
        # One more than is handed out: padding rows of a fixed-size GPU step write there.
        return torch.empty(self.num_slots + 1, shape.num_kv_heads, shape.head_dim, dtype=shape.dtype, device=device)

    @property
    def num_free(self) -> int:
        return self._num_free

    @property
    def num_bytes(self) -> int:
        """Of all keys and values while the memory is here."""
        return sum(tensor.nbytes for tensor in self._tensors())

    def give_back(self) -> int:
        """How many bytes. No slot may be taken. Nothing but `take_again` may follow."""
        assert self._num_free == self.num_slots, f"{self.num_slots - self._num_free} slots are in use"
        for tensor in self._tensors():
            tensor.untyped_storage().resize_(0)
        return self.num_bytes

    def take_again(self) -> None:
        """Raises torch's RuntimeError where there is no room; it can be called again then."""
        for tensor in self._tensors():
            tensor.untyped_storage().resize_(tensor.nbytes)

    def _tensors(self) -> Iterator[torch.Tensor]:
        yield from self.keys.values()
        yield from self.values.values()

    def allocate(self, count: int) -> Slots:
        """`count` free slots, the most recently freed first (their pages are warm)."""
        assert count <= self._num_free, (count, self._num_free)
        start = self._num_free - count
        taken = self._stack[start : self._num_free][::-1].copy()
        self._num_free = start
        return taken

    def free(self, slots: Slots) -> None:
        end = self._num_free + len(slots)
        assert end <= self.num_slots, f"slots freed twice: {end} free of {self.num_slots}"
        self._stack[self._num_free : end] = slots[::-1]
        self._num_free = end

    def free_slots(self) -> Slots:
        """A copy of the free list, for integrity checks."""
        return self._stack[: self._num_free].copy()
