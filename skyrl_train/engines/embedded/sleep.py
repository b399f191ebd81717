"""Sleep and wake: which occupants of memory were given back, and what may happen meanwhile.

    kv_cache   the pool's memory and the host tier's; cached prefixes are forgotten, sessions keep their tokens
    weights    what the engine made of them for itself (packed copies, see packed_linear); the model's own tensors stay
               where they are, for they are the trainer's, who needs them while the engine sleeps

Only a drained engine sleeps. Requests that come meanwhile wait, `resume` is refused, and weights that sleep take no
update. To sleep twice is to sleep, and to wake what is awake does nothing; what woke up of a wake that failed is awake.

On the CPU the memory goes back to the system: large tensors are mappings of their own, and the C library is asked to
trim the heap that smaller ones came from. On a GPU the engine can't sleep: captured graphs hold the pool's addresses.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

import torch

from skyrl_train.engines.base import Capability, Occupant
from skyrl_train.engines.embedded.radix_cache import RadixCache
from skyrl_train.engines.embedded.twin import InferenceModel
from skyrl_train.errors import EngineError, RequestRejected


class Memory(Protocol):
    """What one occupant holds."""

    def give_back(self) -> int:
        """To the system; how many bytes."""
        ...

    def take_again(self) -> None:
        """Raises RuntimeError where there is no room; can be called again then."""
        ...


class CacheMemory:
    """The pool under a prefix cache, and the host tier behind it."""

    def __init__(self, cache: RadixCache) -> None:
        self._cache = cache

    def give_back(self) -> int:
        self._cache.flush()
        given = [holder.give_back() for holder in self._cache.holders()]
        return sum(given)

    def take_again(self) -> None:
        for holder in self._cache.holders():
            holder.take_again()


class CopiedWeights:
    """Packed copies of the weights: dropped, and made anew where they are next used."""

    def __init__(self, model: InferenceModel) -> None:
        self._model = model

    def give_back(self) -> int:
        packing = self._model.packing
        if packing is None:
            return 0
        num_bytes = packing.num_bytes
        packing.release()
        return num_bytes

    def take_again(self) -> None:
        pass


class Sleep:
    """Of one engine. `memory` None: it can't."""

    def __init__(self, name: str, memory: Mapping[Occupant, Memory] | None) -> None:
        self._name = name
        self._memory = memory
        self.asleep: set[Occupant] = set()

    def begin(self, release: Collection[Occupant], *, num_busy: int) -> int:
        """Bytes that went back to the system. `num_busy` requests are under way. Raises RequestRejected."""
        memory = self._possible()
        if num_busy:
            raise RequestRejected(f"engine {self._name}: {num_busy} requests run; it sleeps only when drained")
        given = 0
        for occupant in release:
            if occupant not in self.asleep:
                given += memory[occupant].give_back()
                self.asleep.add(occupant)
        trim_heap()
        return given

    def end(self, restore: Sequence[Occupant]) -> None:
        """Raises EngineError where there is no room; it can be repeated."""
        memory = self._possible()
        for occupant in restore:
            if occupant not in self.asleep:
                continue
            try:
                memory[occupant].take_again()
            except RuntimeError as exc:
                raise EngineError(
                    f"engine {self._name}: there is no room to wake {occupant} up: {exc}; free some and wake it again"
                ) from exc
            self.asleep.remove(occupant)

    def check_awake(self) -> None:
        """Raises RequestRejected."""
        if self.asleep:
            raise RequestRejected(f"engine {self._name} sleeps ({', '.join(sorted(self.asleep))}); wake it first")

    def _possible(self) -> Mapping[Occupant, Memory]:
        if self._memory is None:
            raise RequestRejected(f"engine {self._name} can't sleep")
        return self._memory


def sleep_capabilities(device: torch.device) -> frozenset[Capability]:
    """Of an engine with a model on this device."""
    return frozenset({"sleep"}) if device.type == "cpu" else frozenset()


def make_sleep(name: str, cache: RadixCache, model: InferenceModel) -> Sleep:
    """Of an engine with this cache and this model."""
    if not sleep_capabilities(next(model.original.parameters()).device):
        return Sleep(name, None)
    return Sleep(name, {"kv_cache": CacheMemory(cache), "weights": CopiedWeights(model)})


def trim_heap() -> None:
    """Return what the C library's allocator keeps for later; nothing where it can't."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc has it
        trim(0)
