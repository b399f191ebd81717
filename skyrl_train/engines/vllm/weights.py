"""Weights into a paused vLLM server, by files, a process group or shared memory, over its weight-transfer calls.

    start ──► plan ──► file | bucket, … | shared, … ──► apply ──► finish(version) ──► reset_prefix_cache
              refused here: nothing changed          the model changes, in the server, whole

The server's half is engines/vllm/inside/skyrl_receiver. vLLM's own transfer engines check nothing before they take
the model apart, and a refused update leaves their model without weights; ours keeps the old ones.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch

from skyrl_train.engines.vllm.connection import Connection
from skyrl_train.errors import ConfigError, EngineError, WeightsTorn, WeightUpdateError
from skyrl_train.weight_sync.address import own_address
from skyrl_train.weight_sync.broadcast import GroupAddress, GroupBackend, TrainerGroup
from skyrl_train.weight_sync.buckets import BucketBuffer
from skyrl_train.weight_sync.cuda_ipc import allocate_shared, handle_bytes
from skyrl_train.weight_sync.disk import WeightFolders
from skyrl_train.weight_sync.plan import TensorSpec, WeightPlan
from skyrl_train.weight_sync.threads import in_thread

logger = logging.getLogger(__name__)

UPDATE_TIMEOUT_S = 600.0
JOIN_TIMEOUT_S = 120.0
TORN = "[weights torn]"
"""What the server's half writes into the error of an update that had begun to change the model."""


class Carrier(Protocol):
    """How the tensors of a plan that the server took get there. One push at a time."""

    async def open(self, updates: UpdateCalls) -> None: ...

    async def prepare(self, plan: WeightPlan, tensors: Mapping[str, torch.Tensor], *, version: int) -> None:
        """What needs no server: the same arguments are carried next."""
        return

    async def carry(
        self, updates: UpdateCalls, plan: WeightPlan, tensors: Mapping[str, torch.Tensor], *, version: int
    ) -> None: ...

    async def close(self) -> None: ...


class UpdateCalls:
    """The calls of one update, in vLLM's words. Every refusal is WeightUpdateError."""

    def __init__(self, http: Connection, *, timeout_s: float) -> None:
        self._http = http
        self.timeout_s = timeout_s

    async def num_workers(self) -> int:
        return int((await self._http.get("/get_world_size"))["world_size"])

    async def init(self, group: Mapping[str, Any] | None = None) -> None:
        """Blocks until every worker has joined `group`; None lets go of the one that there was."""
        timeout_s = JOIN_TIMEOUT_S if group is None else group["timeout_s"] + 10.0
        await self._post("/init_weight_transfer_engine", {"init_info": {"group": group}}, timeout_s)

    async def start(self) -> None:
        """Also where an update that nobody finished is still open."""
        try:
            await self._post("/start_weight_update", {}, self.timeout_s)
        except WeightUpdateError:
            await self.abandon()
            await self._post("/start_weight_update", {}, self.timeout_s)

    async def step(self, kind: str, specs: Sequence[TensorSpec] = (), **fields: Any) -> None:
        tensors = [[spec.name, _dtype_name(spec.dtype), list(spec.shape)] for spec in specs]
        body = {"kind": kind, "tensors": tensors, "timeout_s": self.timeout_s, **fields}
        await self._post("/update_weights", {"update_info": body}, self.timeout_s + 10.0)

    async def finish(self, version: int | None) -> None:
        body = {} if version is None else {"weight_version": str(version)}
        await self._post("/finish_weight_update", body, self.timeout_s)

    async def abandon(self) -> None:
        """Ends an update that may be open; the server forgets what it got. Never raises."""
        with suppress(WeightUpdateError):
            await self.step("abandon")
            await self.finish(None)

    async def reset_cache(self) -> None:
        answer = await self._post("/reset_prefix_cache", {}, self.timeout_s)
        if isinstance(answer, Mapping) and answer.get("success") is False:
            raise WeightUpdateError(
                "the new weights are in, but vLLM kept its prefix cache of the old ones: requests still run there"
            )

    async def _post(self, path: str, body: Mapping[str, Any], timeout_s: float) -> Any:
        try:
            return await self._http.post(path, body, timeout_s=timeout_s)
        except EngineError as exc:
            kind = WeightsTorn if TORN in str(exc) else WeightUpdateError
            raise kind(str(exc)) from exc


class VLLMChannel:
    """A WeightChannel: `carrier` moves the tensors, this does the rest."""

    def __init__(
        self, base_url: str, carrier: Carrier, *, api_key: str | None = None, timeout_s: float = UPDATE_TIMEOUT_S
    ) -> None:
        self._http = Connection(base_url, api_key=api_key)
        self._updates = UpdateCalls(self._http, timeout_s=timeout_s)
        self._carrier = carrier

    async def open(self) -> None:
        await self._carrier.open(self._updates)

    async def prepare(self, plan: WeightPlan, tensors: Mapping[str, torch.Tensor], *, version: int) -> None:
        plan.check_tensors(tensors)
        await self._carrier.prepare(plan, tensors, version=version)

    async def push(self, plan: WeightPlan, tensors: Mapping[str, torch.Tensor], *, version: int) -> None:
        """Raises WeightUpdateError: the server has its old weights and their version; or WeightsTorn, a kind of it:
        it has neither the old nor the new ones.
        """
        plan.check_tensors(tensors)
        began = time.monotonic()
        updates = self._updates
        await updates.start()
        applying = False
        try:
            await updates.step("plan", plan.specs)
            await self._carrier.carry(updates, plan, tensors, version=version)
            applying = True
            await updates.step("apply")
            await updates.finish(version)
        except WeightUpdateError as exc:
            # In the background of a cancellation nobody could wait for this; after an error there is time.
            await updates.abandon()
            # No answer to the one step that changes the model: nobody knows which weights it has.
            if (applying or TORN in str(exc)) and not isinstance(exc, WeightsTorn):
                raise WeightsTorn(str(exc)) from exc
            raise
        except asyncio.CancelledError:
            await asyncio.shield(updates.abandon())
            raise
        await updates.reset_cache()
        logger.info(
            "weights %d: %.1f MB in %d tensors, %.2f s",
            version,
            plan.num_bytes / 1e6,
            len(plan.specs),
            time.monotonic() - began,
        )

    async def close(self) -> None:
        await self._carrier.close()
        await self._http.close()


class FolderCarrier(Carrier):
    """A folder of safetensors files that both sides see, written while requests still run."""

    def __init__(self, folders: WeightFolders) -> None:
        self._folders = folders
        self._prepared: tuple[int, WeightPlan, Path] | None = None

    async def open(self, updates: UpdateCalls) -> None:
        await updates.init()

    async def prepare(self, plan: WeightPlan, tensors: Mapping[str, torch.Tensor], *, version: int) -> None:
        self._prepared = None
        folder = await in_thread("weight-folder", lambda: self._folders.write(plan, tensors, version=version))
        self._prepared = (version, plan, folder)

    async def carry(
        self, updates: UpdateCalls, plan: WeightPlan, tensors: Mapping[str, torch.Tensor], *, version: int
    ) -> None:
        if self._prepared is None or self._prepared[:2] != (version, plan):
            await self.prepare(plan, tensors, version=version)
        assert self._prepared is not None
        folder, self._prepared = self._prepared[2], None
        await updates.step("file", path=str(folder.absolute()))

    async def close(self) -> None:
        return


class GroupCarrier(Carrier):
    """A process group with the server's workers: gloo from host memory, NCCL from the trainer's GPU.

    `host` is the trainer's address that the server reaches. A group that broke is formed anew at the next push.
    """

    def __init__(
        self,
        backend: GroupBackend,
        *,
        host: str = "127.0.0.1",
        device: torch.device | None = None,
        join_timeout_s: float = JOIN_TIMEOUT_S,
    ) -> None:
        self._backend = backend
        self._host = host
        self._device = device or torch.device("cpu")
        self._join_timeout_s = join_timeout_s
        self._buffer = BucketBuffer(self._device)
        self._group: TrainerGroup | None = None
        self._num_formed = 0

    async def open(self, updates: UpdateCalls) -> None:
        await self.close()
        self._group = await self._form(updates)

    async def carry(
        self, updates: UpdateCalls, plan: WeightPlan, tensors: Mapping[str, torch.Tensor], *, version: int
    ) -> None:
        if self._group is None:
            self._group = await self._form(updates)
        try:
            for bucket in self._buffer.buckets(plan, tensors):
                request = updates.step("bucket", [place.spec for place in bucket.places])
                await self._group.broadcast(bucket.data, request=request, deadline_s=updates.timeout_s)
        except BaseException:
            # Also ends the server's receive, which else stays until its deadline.
            await self.close()
            raise

    async def close(self) -> None:
        self._buffer.free()
        group, self._group = self._group, None
        if group is not None:
            group.close()

    async def _form(self, updates: UpdateCalls) -> TrainerGroup:
        self._num_formed += 1

        async def join(address: GroupAddress) -> None:
            await updates.init(
                {
                    "host": address.host,
                    "port": address.port,
                    "name": address.name,
                    "backend": address.backend,
                    "world_size": address.world_size,
                    "first_worker_rank": address.first_worker_rank,
                    "timeout_s": self._join_timeout_s,
                }
            )

        return await TrainerGroup.form(
            backend=self._backend,
            name=f"skyrl-weights-{self._num_formed}",
            num_workers=await updates.num_workers(),
            join=join,
            host=self._host,
            device=self._device,
            deadline_s=self._join_timeout_s,
        )


class SharedCarrier(Carrier):
    """A buffer that the server's workers open: memory of the trainer's GPU, or of the host for a trainer on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self._buffer = BucketBuffer(device, allocate=allocate_shared)
        self._num_workers = 0

    async def open(self, updates: UpdateCalls) -> None:
        await updates.init()
        self._num_workers = await updates.num_workers()

    async def carry(
        self, updates: UpdateCalls, plan: WeightPlan, tensors: Mapping[str, torch.Tensor], *, version: int
    ) -> None:
        try:
            for bucket in self._buffer.buckets(plan, tensors):
                # Each worker counts as a holder of the memory until it let go: one handle each.
                handles = [base64.b64encode(handle_bytes(bucket)).decode() for _ in range(self._num_workers)]
                await updates.step("shared", [place.spec for place in bucket.places], handles=handles)
        finally:
            self._buffer.free()

    async def close(self) -> None:
        self._buffer.free()


def vllm_channel(
    kind: str,
    url: str,
    *,
    model_folder: Path,
    disk_root: Path,
    device: torch.device | None = None,
    api_key: str | None = None,
    timeout_s: float = UPDATE_TIMEOUT_S,
) -> VLLMChannel:
    """`kind` is generator.weight_sync_backend; `device` is where the trainer's tensors are. Raises ConfigError."""
    place = device or torch.device("cpu")
    carrier: Carrier
    if kind == "disk":
        carrier = FolderCarrier(WeightFolders(disk_root, model_folder=model_folder))
    elif kind == "gloo":
        carrier = GroupCarrier("gloo", host=own_address(url))
    elif kind == "nccl":
        carrier = GroupCarrier("nccl", host=own_address(url), device=place)
    elif kind == "cuda_ipc":
        carrier = SharedCarrier(place)
    else:
        raise ConfigError(f"generator.weight_sync_backend={kind}: vLLM takes disk, gloo, nccl and cuda_ipc")
    return VLLMChannel(url, carrier, api_key=api_key, timeout_s=timeout_s)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
