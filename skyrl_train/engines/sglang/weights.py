"""Weights into a paused SGLang server: as a folder, as a handle on memory, or through a process group.

    check against the server's model ──► begin ──► bucket, bucket, … ──► last bucket: version, flush ──► end
    refused here: nothing changed            each bucket changes the model: what fails from here on is WeightsTorn

Checked against 0.5.23 while it runs, and against the source of 0.5.17. What they do, and is handled here:
- A tensor of an unknown name is passed over in silence, and one of a wrong shape ends a server that is updated by
  tensor: names and shapes are compared with the server's checkpoint first.
- 0.5.23 takes tensors between begin_weight_update and end_weight_update alone; 0.5.17 has neither.
- Updates go to a draft model too unless they are told not to, and a draft of another shape ends the server.
- A failed load from disk is "rolled back" to the very folder that failed: the model is neither old nor new then.
- A server that is started with load_format dummy would load dummy weights from disk again: the format is named.
- 0.5.17 ends itself when the flush after an update finds requests running: they must be retracted or ended before.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
import time
import uuid
from abc import abstractmethod
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

import torch

from skyrl_train.engines.sglang.weights_calls import JOIN_TIMEOUT_S, UPDATE_TIMEOUT_S, UpdateCalls
from skyrl_train.engines.sglang.wire import Wire
from skyrl_train.errors import WeightsTorn, WeightUpdateError
from skyrl_train.weight_sync.address import own_address
from skyrl_train.weight_sync.broadcast import GroupBackend, TrainerGroup
from skyrl_train.weight_sync.buckets import BucketBuffer
from skyrl_train.weight_sync.channel import WeightChannel
from skyrl_train.weight_sync.cuda_ipc import allocate_shared, handle_bytes
from skyrl_train.weight_sync.disk import WeightFolders
from skyrl_train.weight_sync.model_folder import model_specs, tied_names
from skyrl_train.weight_sync.plan import WeightPlan
from skyrl_train.weight_sync.threads import in_thread

logger = logging.getLogger(__name__)

ChannelKind = Literal["disk", "tensor", "cuda_ipc", "gloo", "nccl"]


_NCCL_HINT = (
    " (NCCL_CUMEM_ENABLE must be the same for the trainer and the server; SGLang sets it to 0 where nobody else did)"
)


def sglang_channel(
    kind: ChannelKind,
    url: str,
    *,
    release: str,
    model_folder: Path,
    tp_size: int = 1,
    device: torch.device | None = None,
    disk_root: Path | None = None,
    host: str | None = None,
    name: str = "sglang",
    api_key: str | None = None,
    timeout_s: float = UPDATE_TIMEOUT_S,
    join_timeout_s: float = JOIN_TIMEOUT_S,
) -> WeightChannel:
    """The channel of this kind to the server at `url`, which was started with `model_folder`.

    `device` is where the trainer has its tensors (cuda_ipc: the GPU that it shares with the server). `disk_root` is a
    folder that both sides see; default: a temporary one. `host` is an address of this machine that the server reaches;
    default: the one that the way to `url` begins at. `timeout_s` bounds each call of an update.
    """
    calls = UpdateCalls(Wire(url, name=name, api_key=api_key), release=release, timeout_s=timeout_s)
    device = device or torch.device("cpu")
    if kind == "disk":
        return SGLangDisk(calls, model_folder=model_folder, root=disk_root)
    if kind in ("tensor", "cuda_ipc"):
        if kind == "cuda_ipc" and device.type != "cuda":
            raise WeightUpdateError(
                f"{name}: cuda_ipc hands over a GPU's memory, the trainer's tensors are on {device}"
            )
        return SGLangTensor(calls, model_folder=model_folder, tp_size=tp_size, device=device)
    backend: GroupBackend = "nccl" if kind == "nccl" else "gloo"
    return SGLangBroadcast(
        calls,
        backend=backend,
        model_folder=model_folder,
        tp_size=tp_size,
        device=device if kind == "nccl" else torch.device("cpu"),
        host=host or own_address(url),
        join_timeout_s=join_timeout_s,
    )


class _SGLangChannel(WeightChannel):
    """What the channels share: the check before the first byte, and the word for what failed after it."""

    def __init__(self, calls: UpdateCalls, *, model_folder: Path) -> None:
        self._calls = calls
        self._model_folder = model_folder
        self._model = model_specs(model_folder)
        self._tied = tied_names(model_folder)

    async def open(self) -> None:
        return

    async def push(self, plan: WeightPlan, tensors: Mapping[str, torch.Tensor], *, version: int) -> None:
        """Raises WeightUpdateError: the server has its old weights; or WeightsTorn, a kind of it."""
        self._check(plan, tensors)
        began = time.monotonic()
        await self._move(plan, tensors, version)
        logger.info(
            "%s: weights %d: %.1f MB in %d tensors, %.2f s",
            self._calls.name,
            version,
            plan.num_bytes / 1e6,
            len(plan.specs),
            time.monotonic() - began,
        )

    async def close(self) -> None:
        await self._calls.close()

    @abstractmethod
    async def _move(self, plan: WeightPlan, tensors: Mapping[str, torch.Tensor], version: int) -> None: ...

    def _check(self, plan: WeightPlan, tensors: Mapping[str, torch.Tensor]) -> None:
        plan.check_tensors(tensors)
        if not plan.specs:
            raise WeightUpdateError(f"{self._calls.name}: the update names no tensor")
        # A folder with a configuration alone (dummy weights) says nothing about names.
        if self._model:
            plan.check_model(self._model, tied=self._tied)

    @asynccontextmanager
    async def _changing_the_model(self) -> AsyncIterator[None]:
        try:
            yield
        except WeightUpdateError as error:
            hint = _NCCL_HINT if "unhandled cuda error" in str(error) else ""
            raise WeightsTorn(
                f"{error}{hint}. The server may hold half an update: it stays paused until it gets a whole one"
            ) from error


class SGLangDisk(_SGLangChannel):
    """A folder that the server loads. `prepare` writes it while requests run: the pause is for the load alone."""

    def __init__(self, calls: UpdateCalls, *, model_folder: Path, root: Path | None) -> None:
        super().__init__(calls, model_folder=model_folder)
        self._own_root = root is None
        self._root = root or Path(tempfile.mkdtemp(prefix="skyrl-weights-"))
        self._folders = WeightFolders(self._root, model_folder=model_folder)
        self._prepared: tuple[int, WeightPlan, Path] | None = None

    async def prepare(self, plan: WeightPlan, tensors: Mapping[str, torch.Tensor], *, version: int) -> None:
        self._check(plan, tensors)
        self._prepared = None
        folder = await in_thread("weight-folder", lambda: self._folders.write(plan, tensors, version=version))
        self._prepared = (version, plan, folder)

    async def _move(self, plan: WeightPlan, tensors: Mapping[str, torch.Tensor], version: int) -> None:
        if self._prepared is None or self._prepared[:2] != (version, plan):
            await self.prepare(plan, tensors, version=version)
        assert self._prepared is not None
        folder, self._prepared = self._prepared[2], None
        async with self._changing_the_model():
            await self._calls.load_folder(folder, version=version)

    async def close(self) -> None:
        await super().close()
        if self._own_root:
            await asyncio.to_thread(shutil.rmtree, self._root, ignore_errors=True)


class SGLangTensor(_SGLangChannel):
    """A handle on the trainer's bucket: CUDA IPC on a GPU that both share, a file in shared memory on a CPU."""

    def __init__(self, calls: UpdateCalls, *, model_folder: Path, tp_size: int, device: torch.device) -> None:
        super().__init__(calls, model_folder=model_folder)
        self._tp_size = tp_size
        self._buffer = BucketBuffer(device, allocate=allocate_shared)

    async def _move(self, plan: WeightPlan, tensors: Mapping[str, torch.Tensor], version: int) -> None:
        buckets = self._buffer.buckets(plan, tensors)
        async with self._calls.session(), self._changing_the_model():
            while (bucket := await in_thread("weight-bucket", lambda: next(buckets, None))) is not None:
                # A rank opens its own handle only: each counts as a holder of the memory.
                handles = [handle_bytes(bucket) for _ in range(self._tp_size)]
                await self._calls.load_handles(handles, last_of=version if bucket.is_last else None)

    async def close(self) -> None:
        await super().close()
        self._buffer.free()


class SGLangBroadcast(_SGLangChannel):
    """A process group of the trainer and the server's ranks. One that broke is formed anew at the next push."""

    def __init__(
        self,
        calls: UpdateCalls,
        *,
        backend: GroupBackend,
        model_folder: Path,
        tp_size: int,
        device: torch.device,
        host: str,
        join_timeout_s: float,
    ) -> None:
        super().__init__(calls, model_folder=model_folder)
        self._backend = backend
        self._tp_size = tp_size
        self._device = device
        self._host = host
        self._join_timeout_s = join_timeout_s
        self._buffer = BucketBuffer(device)
        self.group: TrainerGroup | None = None

    async def open(self) -> None:
        self._drop()
        self.group = await self._form()

    async def _move(self, plan: WeightPlan, tensors: Mapping[str, torch.Tensor], version: int) -> None:
        if self.group is None or self.group.closed:
            self.group = await self._form()
        group, buckets = self.group, self._buffer.buckets(plan, tensors)
        async with self._calls.session(), self._changing_the_model():
            while (bucket := await in_thread("weight-bucket", lambda: next(buckets, None))) is not None:
                await group.broadcast(
                    bucket.data,
                    request=self._calls.receive(
                        bucket.places,
                        group=group.address.name,
                        last_of=version if bucket.is_last else None,
                    ),
                    deadline_s=self._calls.timeout_s,
                )

    async def close(self) -> None:
        group = self.group
        self._drop()
        if group is not None:
            await self._calls.leave(group.address.name)
        self._buffer.free()
        await super().close()

    def _drop(self) -> None:
        group, self.group = self.group, None
        if group is not None:
            group.close()

    async def _form(self) -> TrainerGroup:
        # New for each group: a server that broke off may still have the last one under its name.
        name = f"skyrl-{uuid.uuid4().hex[:12]}"
        return await TrainerGroup.form(
            backend=self._backend,
            name=name,
            num_workers=self._tp_size,
            join=lambda address: self._calls.join(address, timeout_s=self._join_timeout_s),
            host=self._host,
            device=self._device,
            release=lambda: self._calls.leave(name),
            deadline_s=self._join_timeout_s,
        )
