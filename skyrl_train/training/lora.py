"""Low-rank adapters on a frozen model (LoRA, Hu et al. 2021, equation 3), through peft.

    trained    h = W x + s B A dropout(x)      W [out, in] is frozen; A [rank, in] and B [out, rank] are trained
    served     h = (W + s B A) x               a plain module: it shares all that has no adapter with the trained one
    reference  h = W x                         the very model with its adapters off

s is alpha / rank. B starts at 0, and W + s B A at W.
PiSSA (Meng et al. 2024) starts from the principal part of W and freezes the rest: W = W' + s B0 A0. There the
reference is W' with the first A0 and B0, and an adapter for the untouched W is s (B A - B0 A0), of twice the rank.
"""

from __future__ import annotations

import copy
import enum
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from skyrl_train.errors import ConfigError
from skyrl_train.training.model import refuse_dropout

InitMethod = Literal["kaiming", "gaussian", "orthogonal", "pissa"]
ALL_LINEAR = "all-linear"
ADAPTER = "default"
"""peft's name for the one adapter of a layer."""


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """`target_modules`: names, or ends of names after a dot, of linear maps; all-linear is each but the head.

    `dropout` is on the adapters' input and in gradient passes only: log-probabilities that are compared with others
    (old, reference) and those of the engine are the whole model's. `seed` fixes the start and dropout's masks.
    """

    rank: int
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: str | Sequence[str] = ALL_LINEAR
    exclude_modules: Sequence[str] = ()
    init_method: InitMethod = "kaiming"
    seed: int = 0


class Adapters:
    """Owns the adapters of one model. Making it changes the model: linear maps get an adapter, the rest is frozen."""

    def __init__(self, model: PreTrainedModel, settings: LoraSettings, *, base_path: str | None = None) -> None:
        """`base_path` is where the model came from; exported adapters name it.

        Raises ConfigError for the model's own dropout and for names that don't stand for linear maps of it.
        """
        from peft import inject_adapter_in_model  # takes a second to import, and few runs want it

        refuse_dropout(model)
        self.settings = settings
        self._model = model
        self._base_path = base_path
        self._config = _peft_config(settings, targets=_targets(model, settings), base_path=base_path)
        # GPT-2's maps are [in, out]; peft finds that out by itself, with a warning.
        self._config.fan_in_fan_out = any(isinstance(module, Conv1D) for module in model.modules())
        weights = {name: parameter.data for name, parameter in model.named_parameters()}
        with torch.random.fork_rng(devices=[]):  # peft draws on the CPU
            torch.manual_seed(settings.seed)
            inject_adapter_in_model(self._config, model, ADAPTER)
        self._layers: dict[str, Any] = {
            name: module for name, module in model.named_modules() if hasattr(module, "lora_A")
        }
        adapted = tuple(f"{name}." for name in self._layers)
        self._not_adapted = [name for name, _ in model.named_modules() if not f"{name}.".startswith(adapted)]
        for name, layer in self._layers.items():
            # In float32 on any model: they are small, and so are their steps.
            a, b = layer.lora_A[ADAPTER].float(), layer.lora_B[ADAPTER].float()
            if settings.init_method == "pissa":
                layer.register_buffer("start_A", a.weight.detach().clone())
                layer.register_buffer("start_B", b.weight.detach().clone())
                # peft takes them off before it rounds them to the weights' type; W is to be the sum of what is here.
                layer.base_layer.weight.data = weights[f"{name}.weight"]
                layer.base_layer.weight.data = _merged(layer, sign=-1)

    @property
    def module_names(self) -> tuple[str, ...]:
        """The adapted modules, as the plain model calls them."""
        return tuple(self._layers)

    def merged_tensors(self) -> dict[str, torch.Tensor]:
        """New tensors W + s B A by the plain model's names; added in float32, in W's own type."""
        return {f"{name}.weight": _merged(layer) for name, layer in self._layers.items()}

    def merged_model(self) -> PreTrainedModel:
        """A plain module of the model as it is now. The adapted matrices are its own, all other tensors are shared."""
        plain = self.base_model()
        for name, merged in self.merged_tensors().items():
            linear: Any = plain.get_submodule(name.removesuffix(".weight"))
            linear.weight = torch.nn.Parameter(merged, requires_grad=False)
        return plain

    def base_model(self) -> PreTrainedModel:
        """A plain module of the frozen model, without adapters; every tensor is the trained model's very own."""
        shared: list[torch.Tensor] = [*self._model.parameters(), *self._model.buffers()]
        plain = copy.deepcopy(self._model, {id(tensor): tensor for tensor in shared})
        del plain.peft_config
        for path in self._layers:
            linear: Any = plain.get_submodule(path)
            plain.set_submodule(path, linear.base_layer)
        return plain.eval()  # type: ignore[no-any-return, no-untyped-call]

    @contextmanager
    def at_start(self) -> Iterator[None]:
        """Inside, the model computes what it did before the first update; for passes without gradients."""
        if self.settings.init_method == "pissa":
            self._exchange_with_start()
        else:
            self._enable(False)
        try:
            yield
        finally:
            if self.settings.init_method == "pissa":
                self._exchange_with_start()
            else:
                self._enable(True)

    @contextmanager
    def dropout_at(self, step: int) -> Iterator[None]:
        """Inside, dropout's masks depend on the seed, `step` and the packing alone, so that a resumed run has them."""
        if not self.settings.dropout:
            yield
            return
        device = self._model.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(random.Random(f"{self.settings.seed}/{step}").getrandbits(63))
            yield

    def is_changed(self, tensor: torch.Tensor) -> bool:
        """Whether it is one of ours: not to be found in the model's folder."""
        return id(tensor) in self._changed

    @property
    def _changed(self) -> set[int]:
        tensors: list[torch.Tensor] = []
        for layer in self._layers.values():
            tensors += [layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight]
            if self.settings.init_method == "pissa":
                tensors += [layer.base_layer.weight, layer.start_A, layer.start_B]
        return {id(tensor) for tensor in tensors}

    def export(self, folder: Path) -> None:
        """Write adapter_config.json and adapter_model.safetensors: `peft.PeftModel.from_pretrained(base, folder)`."""
        folder.mkdir(parents=True, exist_ok=True)
        self._exported_config().save_pretrained(str(folder))
        tensors = {name: tensor.cpu() for name, tensor in self.exported_tensors().items()}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    @torch.no_grad()
    def exported_tensors(self, *, for_base_model: bool = False) -> dict[str, torch.Tensor]:
        """Of the adapter for the untouched model, by peft's names: new tensors, which no update changes.

        `for_base_model`: for `base_model`, which PiSSA has taken its start out of.
        """
        tensors = {}
        for name, layer in self._layers.items():
            a, b = layer.lora_A[ADAPTER].weight.detach(), layer.lora_B[ADAPTER].weight.detach()
            if self.settings.init_method == "pissa" and not for_base_model:
                a, b = torch.cat([a, layer.start_A]), torch.cat([b, -layer.start_B], dim=1)
            tensors[f"base_model.model.{name}.lora_A.weight"] = a.clone(memory_format=torch.contiguous_format)
            tensors[f"base_model.model.{name}.lora_B.weight"] = b.clone(memory_format=torch.contiguous_format)
        return tensors

    def exported_config(self, *, for_base_model: bool = False) -> dict[str, Any]:
        """What adapter_config.json holds: plain values, as JSON has them. `for_base_model` as above."""
        config = self._exported_config(for_base_model=for_base_model).to_dict()
        return {name: _plain(value) for name, value in config.items()}

    def _exported_config(self, *, for_base_model: bool = False) -> Any:
        config = copy.deepcopy(self._config)
        config.inference_mode = True
        if self.settings.target_modules == ALL_LINEAR:
            # peft writes it out as every path; servers look at the last part of a name only.
            short = {name.rpartition(".")[2] for name in self._layers}
            says_the_same = not any(name.rpartition(".")[2] in short for name in self._not_adapted)
            config.target_modules = short if says_the_same else set(self._layers)
        if self.settings.init_method == "pissa":
            config.init_lora_weights = True
        if self.settings.init_method == "pissa" and not for_base_model:  # s stays what it is
            config.r, config.lora_alpha = 2 * config.r, 2 * config.lora_alpha
        return config

    def _enable(self, enabled: bool) -> None:
        for layer in self._layers.values():
            layer.enable_adapters(enabled)

    def _exchange_with_start(self) -> None:
        for layer in self._layers.values():
            for parameter, start in (
                (layer.lora_A[ADAPTER].weight, layer.start_A),
                (layer.lora_B[ADAPTER].weight, layer.start_B),
            ):
                parameter.data, start.data = start.data, parameter.data


class ChangedTensors:
    """The tensors of a module that its model's folder doesn't have: what a checkpoint keeps of it."""

    def __init__(self, module: torch.nn.Module, adapters: Adapters) -> None:
        """All that is trained, and what adapters change beside that."""
        self._tensors: dict[str, torch.Tensor] = {
            name: tensor
            for name, tensor in module.state_dict(keep_vars=True).items()
            if tensor.requires_grad or adapters.is_changed(tensor)
        }

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {name: tensor.detach() for name, tensor in self._tensors.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """In place. Raises ValueError, with nothing changed, for other names or shapes: another rank, other targets."""
        different = sorted(
            name
            for name in state.keys() | self._tensors.keys()
            if name not in state or name not in self._tensors or state[name].shape != self._tensors[name].shape
        )
        if different:
            raise ValueError(f"{len(different)} tensors of the adapters differ, the first is {different[0]}")
        for name, tensor in self._tensors.items():
            tensor.copy_(state[name])


def _peft_config(settings: LoraSettings, *, targets: list[str] | str, base_path: str | None) -> Any:
    from peft import LoraConfig

    start: Any = True if settings.init_method == "kaiming" else settings.init_method
    alpha: Any = int(settings.alpha) if settings.alpha == int(settings.alpha) else settings.alpha
    return LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_path,
        r=settings.rank,
        lora_alpha=alpha,  # peft names it a whole number and takes any
        lora_dropout=settings.dropout,
        target_modules=targets,
        exclude_modules=list(settings.exclude_modules) or None,
        init_lora_weights=start,
    )


def _targets(model: PreTrainedModel, settings: LoraSettings) -> list[str] | str:
    """peft's form of the names. Raises ConfigError for one that fits no linear map: it lists those that do."""
    modules = {name: module for name, module in model.named_modules() if name}
    head: object = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    linear = {name for name, m in modules.items() if isinstance(m, torch.nn.Linear | Conv1D) and m is not head}
    known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
    by_name = settings.target_modules != ALL_LINEAR
    named = [settings.target_modules] if isinstance(settings.target_modules, str) else list(settings.target_modules)
    chosen = set() if by_name else set(linear)
    for key, wanted in (("target_modules", named if by_name else ()), ("exclude_modules", settings.exclude_modules)):
        for name in wanted:
            found = {path for path in modules if _fits(path, name)}
            if not found or (key == "target_modules" and found - linear):
                problem = "is no module" if not found else "is not a linear map with an adapter"
                if any(modules[path] is head for path in found):
                    problem = "is the head, whose logits are computed from its own weights"
                raise ConfigError(
                    f"lora.{key}: {name} {problem} of {type(model).__name__}; its linear maps are {known}, "
                    f"or {ALL_LINEAR}"
                )
            chosen = chosen | found if key == "target_modules" else chosen - found
    if not chosen:
        raise ConfigError(
            f"lora.exclude_modules={list(settings.exclude_modules)} leaves no module of {type(model).__name__} to "
            f"train; its linear maps are {known}"
        )
    return named if by_name else ALL_LINEAR


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(value)
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _fits(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


@torch.no_grad()
def _merged(layer: Any, *, sign: int = 1) -> torch.Tensor:
    weight: torch.Tensor = layer.base_layer.weight
    dtype = torch.promote_types(weight.dtype, torch.float32)
    a, b = layer.lora_A[ADAPTER].weight.to(dtype), layer.lora_B[ADAPTER].weight.to(dtype)
    change: torch.Tensor = b @ a * (sign * layer.scaling[ADAPTER])
    merged = weight.to(dtype) + (change.T if layer.fan_in_fan_out else change)
    return merged.to(weight.dtype)
