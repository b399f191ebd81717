"""Weights into a paused vLLM server, by a file or by a process group, over its weight-transfer calls.

    start ──► plan ──► file | bucket, bucket, … ──► apply ──► finish(version) ──► reset_prefix_cache
              refused here: nothing changed          the model changes, in the server, whole

The server's half is engines/vllm/inside/skyrl_receiver. vLLM's own transfer engines check nothing before they take
the model apart, and a refused update leaves their model without weights; ours keeps the old ones.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file

from skyrl_train.engines.vllm.connection import Connection
from skyrl_train.errors import EngineError, WeightsTorn, WeightUpdateError
from skyrl_train.weight_sync.broadcast import GroupAddress, GroupBackend, TrainerGroup
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

    async def carry(self, updates: UpdateCalls, plan: WeightPlan, tensors: Mapping[str, torch.Tensor]) -> None: ...

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

    def __init__(self, base_url: str, carrier: Carrier, *, timeout_s: float = UPDATE_TIMEOUT_S) -> None:
        self._http = Connection(base_url)
        self._updates = UpdateCalls(self._http, timeout_s=timeout_s)
        self._carrier = carrier

    async def open(self) -> None:
        await self._carrier.open(self._updates)

    async def push(self, plan: WeightPlan, tensors: Mapping[str, torch.Tensor], *, version: int) -> None:
        """Raises WeightUpdateError: the server has its old weights and their version; or WeightsTorn, a kind of it:
        it has neither the old nor the new ones.
        """
        _check_tensors(plan, tensors)
        began = time.monotonic()
        updates = self._updates
        await updates.start()
        applying = False
        try:
            await updates.step("plan", plan.specs)
            await self._carrier.carry(updates, plan, tensors)
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


class FileCarrier:
    """A safetensors file that both sides see, in `folder` or the system's temporary one; gone after each push."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder

    async def open(self, updates: UpdateCalls) -> None:
        await updates.init()

    async def carry(self, updates: UpdateCalls, plan: WeightPlan, tensors: Mapping[str, torch.Tensor]) -> None:
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="skyrl-weights-", dir=self._folder) as folder:
            path = Path(folder) / "update.safetensors"
            await in_thread("weight-file", lambda: _write(path, plan, tensors))
            await updates.step("file", path=str(path))

    async def close(self) -> None:
        return


class GroupCarrier:
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
        self._group: TrainerGroup | None = None
        self._num_formed = 0

    async def open(self, updates: UpdateCalls) -> None:
        await self.close()
        self._group = await self._form(updates)

    async def carry(self, updates: UpdateCalls, plan: WeightPlan, tensors: Mapping[str, torch.Tensor]) -> None:
        if self._group is None:
            self._group = await self._form(updates)
        try:
            for specs in plan.buckets():
                bucket = flatten(specs, tensors, device=self._device)
                await self._group.broadcast(bucket, request=updates.step("bucket", specs), deadline_s=updates.timeout_s)
        except BaseException:
            # Also ends the server's receive, which else stays until its deadline.
            await self.close()
            raise

    async def close(self) -> None:
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


def flatten(specs: Sequence[TensorSpec], tensors: Mapping[str, torch.Tensor], *, device: torch.device) -> torch.Tensor:
    """The tensors as bytes, one after the other in their wire type; each begins at a multiple of its number's size.

    Example: 3 bfloat16 numbers and 1 float32: bytes [0, 6) and [8, 12).
    """
    places, end = [], 0
    for spec in specs:
        end += -end % spec.dtype.itemsize
        places.append(end)
        end += spec.num_bytes
    bucket = torch.empty(end, dtype=torch.uint8, device=device)
    for spec, begin in zip(specs, places, strict=True):
        view = bucket[begin : begin + spec.num_bytes].view(spec.dtype).view(spec.shape)
        view.copy_(tensors[spec.name].detach())
    return bucket


def _write(path: Path, plan: WeightPlan, tensors: Mapping[str, torch.Tensor]) -> None:
    # A copy even where type and device are right: two names that share memory can't be in one file otherwise.
    held = {spec.name: tensors[spec.name].detach().to("cpu", spec.dtype, copy=True).contiguous() for spec in plan.specs}
    save_file(held, str(path))


def _check_tensors(plan: WeightPlan, tensors: Mapping[str, torch.Tensor]) -> None:
    for spec in plan.specs:
        tensor = tensors.get(spec.name)
        if tensor is None or tuple(tensor.shape) != spec.shape:
            found = "missing" if tensor is None else f"of shape {list(tensor.shape)}"
            raise WeightUpdateError(f"the plan has {spec.name} with shape {list(spec.shape)}, the tensor is {found}")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
