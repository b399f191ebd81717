"""What weights one server has, and what it should have: given whole, proved, and given again to its next life.

wanted   the last update that the trainer gave    ──► what a server that is started again is brought up to
given    the update that this life has whole; None while one is on its way, or after one that failed
whole    False: nobody may be served
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import replace

import torch

from skyrl_train.engines.base import EngineInfo
from skyrl_train.engines.server.client import ServerBusy, ServerClient
from skyrl_train.engines.server.lifeline import Life
from skyrl_train.errors import RequestRejected, WeightUpdateError
from skyrl_train.types import AdapterWeights, DiskWeights, NamedWeights, WeightUpdate
from skyrl_train.weight_sync.folder import read_weights
from skyrl_train.weight_sync.plan import WeightPlan
from skyrl_train.weight_sync.threads import in_thread

Verify = Callable[[ServerClient, int], Awaitable[None]]
"""Proof that the server has the weights of a version: raises WeightUpdateError."""


class ServerWeights:
    """`weight_dtype` is the type that weights travel in, `version` what the server's own model is called at its start.
    `adapter` is the name under which the server has the policy's adapter; None where the policy is its model.
    """

    def __init__(
        self,
        info: EngineInfo,
        *,
        weight_dtype: torch.dtype,
        bucket_bytes: int,
        version: int,
        verify: Verify | None,
        check_adapter: Callable[[AdapterWeights], None],
    ) -> None:
        self._info = info
        self._weight_dtype = weight_dtype
        self._bucket_bytes = bucket_bytes
        self._verify = verify
        self._check_adapter = check_adapter
        self.version = version
        self.wanted: WeightUpdate | None = None
        self.given: WeightUpdate | None = None
        self.whole = True
        self.adapter: str | None = None
        self._unproved = False
        self._loaded: list[str] = []
        """Adapters of the policy's that this life may have."""
        self._left: list[str] = []
        """Those of earlier lives, where the server may never have been away."""
        self._num_named = 0
        self._mark = secrets.token_hex(3)

    @property
    def needs_proof(self) -> bool:
        return self._verify is not None and self._unproved

    def has(self, update: WeightUpdate) -> bool:
        return self.whole and self.wanted is update and self.given is update

    def life_over(self, *, server_stays: bool) -> None:
        """What the server had is gone, or, where it is somebody else's and stays, nobody knows."""
        self.given, self.adapter = None, None
        self._left = [*self._left, *self._loaded] if server_stays else []
        self._loaded = []

    def distrust(self) -> None:
        """Nobody is served until an update is whole."""
        self.whole, self.given = False, None

    def may_be_read(self) -> bool:
        """Whether the trainer still has what is wanted."""
        source = None if self.wanted is None else self.wanted.source
        return not isinstance(source, NamedWeights | AdapterWeights) or source.still_valid()

    async def readable(self, update: WeightUpdate) -> WeightUpdate:
        """As tensors. Raises WeightUpdateError for what this server can't be given; nothing has changed then."""
        source = update.source
        if isinstance(source, DiskWeights):
            path = source.path
            tensors = await in_thread("read-weights", lambda: read_weights(path))
            return replace(update, source=NamedWeights(tensors=tensors))
        if isinstance(source, AdapterWeights):
            if "adapter_weights" not in self._info.capabilities:
                raise WeightUpdateError(f"engine {self._info.name} serves no adapters; send it the merged matrices")
            self._check_adapter(source)
        elif not isinstance(source, NamedWeights):
            raise WeightUpdateError(
                f"engine {self._info.name} is a process of its own and needs the tensors, found {type(source).__name__}"
            )
        return update

    async def prepare(self, life: Life, update: WeightUpdate) -> None:
        """What of `give` the server has no part in."""
        if isinstance(update.source, NamedWeights):
            plan = self._plan(update.source)
            await life.channel.prepare(plan, update.source.tensors, version=update.version)

    async def give(self, life: Life, update: WeightUpdate) -> None:
        """To the paused server, whole; then it serves `update.version`.

        Raises WeightUpdateError, and EngineUnavailable where a call broke and nobody knows what the server has.
        """
        source, adapter = update.source, None
        self.given = None
        try:
            if isinstance(source, NamedWeights):
                plan = self._plan(source)
                self.whole = False
                await life.channel.push(plan, source.tensors, version=update.version)
            else:
                assert isinstance(source, AdapterWeights), source
                adapter = await self._change_adapter(life.client, source, update.version)
            served = await life.client.weight_version()
        except (RequestRejected, ServerBusy) as exc:
            raise WeightUpdateError(
                f"engine {self._info.name} does not take the weights of version {update.version}: {exc}"
            ) from exc
        if served is not None and served != str(update.version):
            self.whole = False
            raise WeightUpdateError(
                f"engine {self._info.name} reports weights {served!r} after an update to {update.version}"
            )
        self.whole, self.given, self.version, self.adapter = True, update, update.version, adapter
        # The base model is what can be scored. A paused server scores nothing: the proof comes when it goes on.
        self._unproved = isinstance(source, NamedWeights)

    async def prove(self, client: ServerClient) -> None:
        """After an update: the server, which goes on, scores as the trainer does. Raises WeightUpdateError."""
        if self._verify is None or not self._unproved:
            return
        try:
            await self._verify(client, self.version)
        except WeightUpdateError:
            self.distrust()
            raise
        self._unproved = False

    def _plan(self, source: NamedWeights) -> WeightPlan:
        return WeightPlan.of(source.tensors, dtype=self._weight_dtype, bucket_bytes=self._bucket_bytes)

    async def _change_adapter(self, client: ServerClient, adapter: AdapterWeights, version: int) -> str:
        self._num_named += 1
        # A name is never used twice: a server may go on serving an adapter that it unloaded.
        name = f"policy-{version}-{self._mark}.{self._num_named}"
        await client.load_adapter(name, adapter)
        self._loaded.append(name)
        # The old one goes now: until all is done there is none to serve.
        self.whole = False
        for old in self._loaded[:-1]:
            await client.unload_adapter(old)
            self._loaded.remove(old)
        while self._left:
            with contextlib.suppress(WeightUpdateError, RequestRejected):  # gone with the life that had it
                await client.unload_adapter(self._left[-1])
            self._left.pop()
        await client.flush_cache()
        await client.set_weight_version(str(version))
        return name
