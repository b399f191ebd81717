"""All adapters of one engine: what their names stand for, who uses them, which leave when memory is short.

    paths at start, load_adapter ──► named ──┐                       ┌─► scheduler: has it a place in the batch?
                                             ├─ of(request) ─────────┤
    weight update (AdapterWeights) ► policy ─┘  None: plain model    └─► prefix cache: the namespace of its keys

An adapter in use is one that an open request asks for, queued or running. It can't be unloaded, and it is replaced
under its name only while the engine is paused, as weights are: running requests are then retracted and their keys
forgotten, and they go on under the new one.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from skyrl_train.engines.embedded.adapters.adapter import LoraAdapter, make_adapter
from skyrl_train.engines.embedded.adapters.folder import read_adapter_folder
from skyrl_train.engines.embedded.adapters.places import Places, number_of
from skyrl_train.engines.embedded.adapters.rows import NOT_SELECTED, AdaptedMaps, RowAdapters, Witness
from skyrl_train.engines.embedded.adapters.settings import LoraLimits
from skyrl_train.engines.embedded.adapters.sites import find_sites
from skyrl_train.engines.embedded.request import RequestState
from skyrl_train.errors import ConfigError, RequestRejected, WeightUpdateError
from skyrl_train.types import AdapterWeights, GenerateRequest

if TYPE_CHECKING:
    from skyrl_train.engines.embedded.scheduler import Scheduler

logger = logging.getLogger(__name__)

POLICY = "(policy)"
"""What the policy's adapter is called in messages; no request can name it."""


class ServedAdapters:
    """Made before the twin, which needs its `sites` and `rows`; `begin` once the model ran for the first time."""

    def __init__(self, limits: LoraLimits, model: torch.nn.Module, num_seats: int, *, engine: str) -> None:
        """Raises ConfigError for a folder that can't be served, and on a GPU, whose decode steps are captured."""
        device = next(model.parameters()).device
        if device.type != "cpu":
            raise ConfigError(
                f"embedded engine: adapters are served on the CPU, the model is on {device}; set "
                "generator.lora.enabled=false (a policy that trains one is then served merged)"
            )
        self.sites = find_sites(model, limits.target_modules)
        self.places = Places(limits.max_in_batch, num_seats)
        self.rows = RowAdapters(self.places)
        self.policy: LoraAdapter | None = None
        self._engine = engine
        self._limits = limits
        self._num_made = 0
        self._folders = dict(limits.paths)
        self._loaded: dict[str, LoraAdapter] = {}
        """The first of them leaves first."""
        self._num_open: Counter[str] = Counter()
        self._scheduler: Scheduler | None = None
        self._witness = Witness()
        self.rows.form = self._witness
        for name, folder in self._folders.items():
            try:
                self._load(name, read_adapter_folder(folder))
            except WeightUpdateError as exc:
                raise ConfigError(f"generator.lora.paths.{name}: {exc}") from exc
            self.trim()

    def begin(self, scheduler: Scheduler) -> None:
        """The model has run once: each linear map must have been reached, or adapters on it would be ignored."""
        missed = sorted(set(self.sites) - self._witness.seen)
        if missed:
            raise ConfigError(
                f"embedded engine: this model computes {len(missed)} linear maps in a way that adapters can't change, "
                f"the first is {missed[0]}; leave them out of generator.lora.target_modules"
            )
        self.rows.form = NOT_SELECTED
        self._scheduler = scheduler

    def maps(self) -> AdaptedMaps:
        """For the twin."""
        return AdaptedMaps(self.sites, self.rows)

    # -- what a name stands for

    @property
    def names(self) -> list[str]:
        return sorted(self._folders.keys() | self._loaded.keys())

    def of(self, request: GenerateRequest) -> LoraAdapter | None:
        """What an open request runs with; None is the plain model."""
        return self.policy if request.adapter is None else self._loaded[request.adapter]

    def check(self, request: GenerateRequest) -> None:
        """Its adapter is here, from its folder if need be. Raises RequestRejected.

        `opened` follows, or `trim` where the request is refused after all.
        """
        name = request.adapter
        if name is None or name in self._loaded:
            return
        rid, engine = request.request_id, self._engine
        if name not in self._folders:
            known = ", ".join(self.names) or "none"
            raise RequestRejected(f"request {rid}: engine {engine} has no adapter {name!r}; it has {known}")
        try:
            self._load(name, read_adapter_folder(self._folders[name]))
        except WeightUpdateError as exc:
            raise RequestRejected(f"request {rid}: adapter {name} can't be loaded again: {exc}") from exc

    def opened(self, request: GenerateRequest) -> None:
        name = request.adapter
        if name is None:
            return
        self._num_open[name] += 1
        if self._limits.eviction_policy == "lru":
            self._loaded[name] = self._loaded.pop(name)
        self.trim()

    def closed(self, request: GenerateRequest) -> None:
        if request.adapter is None:
            return
        self._num_open[request.adapter] -= 1
        self.trim()

    # -- in the scheduler

    def has_room(self, state: RequestState) -> bool:
        """Whether the request could run beside those that run: its adapter is among theirs, or a place is free."""
        return self.places.has_room(self.of(state.request))

    def sit(self, state: RequestState) -> None:
        """It was given a seat."""
        self.places.sit(state.seat, self.of(state.request))

    def namespace(self, state: RequestState) -> int:
        """Of its keys in the prefix cache."""
        return number_of(self.of(state.request))

    # -- they come and go

    def load(self, name: str, source: AdapterWeights | str, *, paused: bool) -> None:
        """Serve these tensors, or a folder in peft's format, under a name, new or known.

        Only `paused` may one in use be replaced. Raises WeightUpdateError, with nothing changed.
        """
        if self._num_open[name] and not paused:
            raise WeightUpdateError(
                f"engine {self._engine}: {self._num_open[name]} open requests use adapter {name}; pause to replace it"
            )
        made = self._make(name, read_adapter_folder(source) if isinstance(source, str) else source)
        old = self._loaded.pop(name, None)
        if old is not None:
            self._retract(name)
            self._drop(old)
        # A folder that it had no longer holds what the name stands for.
        self._folders.pop(name, None)
        if isinstance(source, str):
            self._folders[name] = source
        self._loaded[name] = made
        self.trim()

    def unload(self, name: str) -> None:
        """Raises RequestRejected for one that is unknown or in use."""
        if name not in self._loaded and name not in self._folders:
            known = ", ".join(self.names) or "none"
            raise RequestRejected(f"engine {self._engine} has no adapter {name!r}; it has {known}")
        if self._num_open[name]:
            raise RequestRejected(
                f"engine {self._engine}: {self._num_open[name]} open requests use adapter {name}; it can be unloaded "
                "when they have ended"
            )
        self._folders.pop(name, None)
        adapter = self._loaded.pop(name, None)
        if adapter is not None:
            self._drop(adapter)

    def make_policy(self, weights: AdapterWeights) -> LoraAdapter:
        """For `set_policy`. Raises WeightUpdateError."""
        return self._make(POLICY, weights, keep_source=True)

    def set_policy(self, adapter: LoraAdapter | None) -> None:
        """What requests that name no adapter are answered with; None: the plain model. None of them runs."""
        old, self.policy = self.policy, adapter
        if old is not None:
            self._drop(old)

    def check_integrity(self, open_requests: Iterable[RequestState], running: Iterable[RequestState]) -> None:
        self.places.check_integrity()
        counted = Counter(state.request.adapter for state in open_requests if state.request.adapter is not None)
        assert counted == +self._num_open, (counted, self._num_open)
        assert all(name in self._loaded for name in counted)
        assert self._scheduler is not None
        num_seated = 0
        for state in running:
            num_seated += 1
            number = self.namespace(state)
            assert self.places.number_at(state.seat) == number
            root = state.node
            while root is not None and root.parent is not None:
                root = root.parent
            assert root is self._scheduler.cache.root_of(number), (
                f"{state.request.request_id} runs on another adapter's keys"
            )
        assert num_seated == int((self.places.of_seat >= 0).sum())
        if self._limits.max_loaded is not None and len(self._loaded) > self._limits.max_loaded:
            assert all(self._num_open[name] or name not in self._folders for name in self._loaded)

    def _make(self, name: str, weights: AdapterWeights, *, keep_source: bool = False) -> LoraAdapter:
        self._num_made += 1
        return make_adapter(
            name, self._num_made, weights, self.sites, max_rank=self._limits.max_rank, keep_source=keep_source
        )

    def _load(self, name: str, weights: AdapterWeights) -> None:
        self._loaded[name] = self._make(name, weights)

    def trim(self) -> None:
        """Idle ones that can be read again leave, until `max_loaded` are left or none of the rest may go."""
        most = self._limits.max_loaded
        for name in list(self._loaded):
            if most is None or len(self._loaded) <= most:
                return
            if name in self._folders and not self._num_open[name]:
                self._drop(self._loaded.pop(name))
                logger.info(
                    "engine %s: adapter %s left memory; it is read again when it is asked for", self._engine, name
                )

    def _drop(self, adapter: LoraAdapter) -> None:
        self.places.forget(adapter.number)
        if self._scheduler is not None:
            self._scheduler.cache.forget(adapter.number)

    def _retract(self, name: str) -> None:
        assert self._scheduler is not None
        for state in self._scheduler.running():
            if state.request.adapter == name:
                self._scheduler.release(state, retract=True)
