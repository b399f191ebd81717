"""The weight-transfer engine: what vLLM's update calls do in a worker.

    init(group?) ──► start ──► update: plan ──► update: file | bucket | shared … ──► update: apply ──► finish
                               checked here      kept, or loaded as it comes            the model changes

`start` and `plan` touch nothing, so a refused update leaves the old weights served. Tensors that come through host
memory are kept until all are there and then loaded at once: that update is whole or not at all. Tensors that come to
a GPU are loaded as they come, because a second copy of the model would not fit; when such an update breaks off, the
model is neither old nor new, the error says so, and only a whole update or a restart makes it right.

Loading goes through vLLM's layerwise reload: on a CPU linears are packed and can't be written in place, and on a GPU
it writes into the memory that CUDA graphs know.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import safe_open
from vllm.config import set_current_vllm_config
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from .manifest import Manifest, UpdateRefused, file_shapes, read_headers, update_files
from .shared import open_shared
from .wire import Piece, cut, num_bytes, pieces, worker_end

TORN = "[weights torn]"
"""Marks the error of an update that broke off after it had changed the model."""


@dataclass
class InitInfo(WeightTransferInitInfo):
    """`group`: host, port, name, backend, world_size, first_worker_rank and timeout_s of a group to join, or None."""

    group: dict[str, Any] | None = None


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """One message: `kind` is plan, file, bucket, shared, apply or abandon.

    `tensors` [[name, dtype, shape], ...]: of the whole update (plan) or of this bucket. `timeout_s` bounds a receive.
    """

    kind: str
    tensors: list[Any] = field(default_factory=list)
    path: str = ""
    handles: list[str] = field(default_factory=list)
    timeout_s: float = 120.0


@dataclass
class _Update:
    """One update so far. `missing` are parts of its layers that it lacks: they are read from the checkpoint."""

    plan: dict[str, Piece] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    kept: dict[str, torch.Tensor] = field(default_factory=dict)
    arrived: set[str] = field(default_factory=set)


class SkyRLTransferEngine(WeightTransferEngine):
    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._manifest: Manifest | None = None
        self._group: Any = None
        self._group_info: dict[str, Any] = {}
        self._ever_updated: set[str] = set()
        self._update = _Update()
        self._loading = False

    # -- vLLM's calls

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        self.shutdown()
        if init_info.group is not None:
            self._join(init_info.group)

    def start_weight_update(self) -> None:
        self._update = _Update()

    def receive_weights(self, update_info: UpdateInfo) -> None:
        step = {
            "plan": self._take_plan,
            "file": self._take_files,
            "bucket": self._take_bucket,
            "shared": self._take_shared,
            "apply": self._apply,
            "abandon": self._abandon,
        }.get(update_info.kind)
        if step is None:
            raise UpdateRefused(f"an update has no step {update_info.kind!r}")
        try:
            # Some layers read it when they process their weights; 0.26 doesn't set it around an update.
            with set_current_vllm_config(self.vllm_config):
                step(update_info)
        except BaseException as error:
            loading = self._loading
            self._abandon(update_info)
            if loading:
                raise RuntimeError(f"{TORN} {type(error).__name__}: {error}") from error
            raise

    def finish_weight_update(self) -> None:
        self._update = _Update()

    def shutdown(self) -> None:
        group, self._group = self._group, None
        if group is not None and self._group_info.get("backend") == "nccl":
            group.abort()
        self._group_info = {}

    @staticmethod
    def trainer_send_weights(iterator: Any, trainer_args: Any) -> None:
        raise NotImplementedError("the trainer's end is skyrl_train.engines.vllm.weights")

    # -- the steps

    def _take_plan(self, info: UpdateInfo) -> None:
        parts = pieces(info.tensors)
        manifest = self._known()
        manifest.check((part.name, part.shape) for part in parts)
        floats = [part.name for part in parts if not part.dtype.is_floating_point]
        if floats:
            raise UpdateRefused(f"{floats[0]} is announced with numbers that are no floats")
        names = {part.name for part in parts}
        self._update.missing = manifest.missing_parts(names)
        changed = [name for name in self._update.missing if name in self._ever_updated]
        absent = [name for name in self._update.missing if name not in manifest.files]
        for which, why in ((changed, "an earlier update changed it"), (absent, "no checkpoint has its first values")):
            if which:
                raise UpdateRefused(
                    f"the update holds a part of the layer {manifest.layer_of(which[0])} and lacks {which[0]}, and "
                    f"{why}; send all parts of a layer"
                )
        self._update.plan = {part.name: part for part in parts}

    def _take_files(self, info: UpdateInfo) -> None:
        """From safetensors files, each checked to be whole and as the plan says before the first tensor is loaded."""
        self._need_plan()
        where: dict[str, str] = {}
        for path in update_files(info.path):
            for name, shape in file_shapes(path).items():
                if name not in self._update.plan:
                    continue  # the folder is a whole model, the update may be a part
                self._expect(name, shape)
                if name in where:
                    raise UpdateRefused(f"{name} is in {where[name]} and in {path}")
                where[name] = path
        lacking = [name for name in self._update.plan if name not in where]
        if lacking:
            raise UpdateRefused(f"{info.path} lacks {len(lacking)} of the update's tensors, {lacking[0]} among them")
        if self._streams:
            self._begin_loading()
            self._load(_read(where, self._update.plan))
        else:
            self._update.kept.update(_read(where, self._update.plan))
        self._update.arrived.update(where)

    def _take_bucket(self, info: UpdateInfo) -> None:
        """What rank 0 of the group broadcasts next: one flat tensor of bytes."""
        parts = self._parts_of(info)
        if self._group is None:
            raise UpdateRefused("no group was joined: init_weight_transfer_engine comes first")
        device = self.device if self._group_info["backend"] == "nccl" else torch.device("cpu")
        bucket = torch.empty(num_bytes(parts), dtype=torch.uint8, device=device)
        worker_end().receive(self._group, bucket, timeout_s=info.timeout_s)
        self._take(cut(bucket, parts), streams=device.type != "cpu")

    def _take_shared(self, info: UpdateInfo) -> None:
        """A flat tensor of bytes in the trainer's memory; one handle for each worker. The trainer fills it again after
        our answer, and a layer's tensors are held until its last one is there: so the bucket is copied.
        """
        parts = self._parts_of(info)
        if len(info.handles) <= self._worker:
            raise UpdateRefused(f"{len(info.handles)} handles came, worker {self._worker} has none")
        shared = open_shared(info.handles[self._worker])
        if shared.numel() < num_bytes(parts):
            raise UpdateRefused(f"the shared bucket has {shared.numel()} bytes, its tensors need {num_bytes(parts)}")
        copy = shared.to(self.device, copy=True)
        if self._streams:
            torch.cuda.synchronize(self.device)
        del shared
        self._take(cut(copy, parts), streams=self._streams)

    def _apply(self, info: UpdateInfo) -> None:
        self._need_plan()
        lacking = [name for name in self._update.plan if name not in self._update.arrived]
        if lacking:
            raise UpdateRefused(f"{len(lacking)} of the update's tensors did not come, {lacking[0]} among them")
        self._begin_loading()
        self._load(self._update.kept.items())
        files = self._known().files
        self._load(_read({name: files[name] for name in self._update.missing}, self._update.missing))
        finalize_layerwise_reload(self.model, self.model_config)
        self._pack_tied_head()
        self._loading = False
        self._ever_updated.update(self._update.plan)
        self._update = _Update()

    def _abandon(self, info: UpdateInfo) -> None:
        """Gives every layer that was not loaded its tensors back. What was loaded stays loaded."""
        self._update = _Update()
        if not self._loading:
            return
        self._loading = False
        for layer in self.model.modules():
            state = get_layerwise_info(layer)
            if state.can_load():
                state.loaded_weights = []
                state.load_numel = 0
        finalize_layerwise_reload(self.model, self.model_config)
        self._pack_tied_head()

    # -- below the steps

    @property
    def _worker(self) -> int:
        """This worker's number among all of the server's."""
        parallel = self.parallel_config
        return int(parallel.data_parallel_index * parallel.world_size + parallel.rank)

    @property
    def _streams(self) -> bool:
        return bool(self.device.type != "cpu")

    def _take(self, named: list[tuple[str, torch.Tensor]], *, streams: bool) -> None:
        if streams:
            self._begin_loading()
            self._load(named)
        else:
            self._update.kept.update(named)
        self._update.arrived.update(name for name, _ in named)

    def _begin_loading(self) -> None:
        if not self._loading:
            self._loading = True
            initialize_layerwise_reload(self.model)

    def _pack_tied_head(self) -> None:
        """A head that is the embedding's matrix is loaded with that one, but on a CPU it multiplies by a packed copy of
        its own, which no reload makes anew.
        """
        if self.device.type != "cpu" or not self._known().tied:
            return
        for layer in self.model.modules():
            if isinstance(layer, ParallelLMHead) and not layer.weight.is_meta:
                layer.quant_method.process_weights_after_loading(layer)

    @torch.no_grad()
    def _load(self, named: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.model.load_weights(named)

    def _need_plan(self) -> None:
        if not self._update.plan:
            raise UpdateRefused("the update's plan comes first")

    def _parts_of(self, info: UpdateInfo) -> list[Piece]:
        self._need_plan()
        parts: list[Piece] = pieces(info.tensors)
        for part in parts:
            self._expect(part.name, part.shape)
        return parts

    def _expect(self, name: str, shape: tuple[int, ...]) -> None:
        planned = self._update.plan.get(name)
        if planned is None or planned.shape != tuple(shape):
            wanted = "not in the plan" if planned is None else f"{list(planned.shape)} in the plan"
            raise UpdateRefused(f"{name} came as {list(shape)}, it is {wanted}")
        if name in self._update.arrived:
            raise UpdateRefused(f"{name} came twice")

    def _join(self, group: dict[str, Any]) -> None:
        self._group = worker_end().join_group(
            host=group["host"],
            port=group["port"],
            name=group["name"],
            backend=group["backend"],
            rank=group["first_worker_rank"] + self._worker,
            world_size=group["world_size"],
            timeout_s=group["timeout_s"],
        )
        self._group_info = dict(group)

    def _known(self) -> Manifest:
        """What the model is made of, read once: from its checkpoint's headers, or from its configuration."""
        if self._manifest is None:
            config = self.model_config.hf_config
            shapes, files = read_headers(self.model_config.model)
            if not shapes:
                shapes = _shapes_by_config(config)
            self._manifest = Manifest(
                shapes=shapes,
                files=files,
                fused=getattr(self.model, "packed_modules_mapping", None) or {},
                tied=bool(getattr(config, "tie_word_embeddings", False)),
            )
        return self._manifest


def _shapes_by_config(config: Any) -> dict[str, tuple[int, ...]]:
    """Of a model that has no checkpoint here (random weights): transformers' names, which checkpoints have too."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _read(where: dict[str, str], names: Iterable[str]) -> Iterable[tuple[str, torch.Tensor]]:
    """Tensors one by one, in the order of `names`, each file opened once."""
    opened: dict[str, Any] = {}
    for name in names:
        path = where[name]
        if path not in opened:
            opened[path] = safe_open(path, framework="pt")
        yield name, opened[path].get_tensor(name)
