"""Sleep and wake: which occupants of memory were given back, and what may happen meanwhile.

    kv_cache   the pool's memory, the host tier's and a drafter's; cached prefixes are forgotten, sessions keep their
               tokens
    weights    what the engine made of them for itself (packed copies, see packed_linear); the model's own tensors stay
               where they are, for they are the trainer's, who needs them while the engine sleeps (in the asynchronous
               loop the engine has a copy, and works all the time)

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
from skyrl_train.engines.embedded.drafts.base import Drafter
from skyrl_train.engines.embedded.kv_pool import KVPool
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
    """The pool under a prefix cache, the host tier behind it, and a drafter's pools, where slots mean the same."""

    def __init__(self, cache: RadixCache, pools: Sequence[KVPool]) -> None:
        self._cache = cache
        self._holders: list[Memory] = [*cache.holders(), *pools]

    def give_back(self) -> int:
        self._cache.flush()
        return sum(holder.give_back() for holder in self._holders)

    def take_again(self) -> None:
        for holder in self._holders:
            holder.take_again()


class CopiedWeights:
    """Packed copies of the weights: dropped, and made anew where they are next used."""

    def __init__(self, models: Sequence[InferenceModel]) -> None:
        self._models = models

    def give_back(self) -> int:
        # Looked up now: a model whose modules were replaced has packed them anew.
        packings = [model.packing for model in self._models if model.packing is not None]
        num_bytes = sum(packing.num_bytes for packing in packings)
        for packing in packings:
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


def make_sleep(name: str, cache: RadixCache, model: InferenceModel, drafter: Drafter | None = None) -> Sleep:
    """Of an engine with this cache and this model."""
    if not sleep_capabilities(next(model.original.parameters()).device):
        return Sleep(name, None)
    pools, models = ((), ()) if drafter is None else (drafter.pools, drafter.models)
    return Sleep(name, {"kv_cache": CacheMemory(cache, pools), "weights": CopiedWeights([model, *models])})


def trim_heap() -> None:
    """Return what the C library's allocator keeps for later; nothing where it can't."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc has it
        trim(0)
