"""New weights from a folder in HF format or from tensors of this process, all or nothing.

Names, shapes and dtypes of every tensor are compared with the model's before the first byte is copied.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from skyrl_train.errors import WeightUpdateError
from skyrl_train.types import DiskWeights, NamedWeights, WeightSource

MAX_NAMES_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class WeightPlan:
    """Which file each of the model's tensors comes from; checked, nothing copied yet."""

    files: dict[Path, tuple[str, ...]]


def planned_copy(model: torch.nn.Module, source: WeightSource) -> Callable[[], None] | None:
    """What moves the weights into the model, checked against it; None where its own tensors stay as they are.

    Raises WeightUpdateError; the model is untouched.
    """
    if isinstance(source, DiskWeights):
        plan = plan_disk_weights(model, source.path)
        return lambda: copy_disk_weights(model, plan)
    if isinstance(source, NamedWeights):
        return plan_tensor_copy(model, source.tensors)
    return None


def plan_disk_weights(model: torch.nn.Module, folder: str) -> WeightPlan:
    """Compare the folder with the model. Raises WeightUpdateError; the model is untouched."""
    root = Path(folder)
    wanted = _tensors_by_identity(model)
    files: dict[Path, tuple[str, ...]] = {}
    found: dict[str, str] = {}
    try:
        for path in _weight_files(root):
            with safe_open(path, framework="pt") as tensors:
                names = tuple(tensors.keys())
                for name in names:
                    piece = tensors.get_slice(name)
                    found[name] = f"{_DTYPES.get(piece.get_dtype(), piece.get_dtype())} {list(piece.get_shape())}"
            files[path] = names
    except (OSError, ValueError, KeyError, _safetensors_error()) as exc:
        raise WeightUpdateError(f"can't read the weights in {folder}: {exc}") from exc
    _compare(folder, wanted, found)
    return WeightPlan(files=files)


def copy_disk_weights(model: torch.nn.Module, plan: WeightPlan) -> None:
    """Copy in place. An error here leaves the model half loaded: the caller must not serve from it."""
    targets = {name: tensor for names in _tensors_by_identity(model) for name, tensor in names.items()}
    with torch.no_grad():
        for path, names in plan.files.items():
            with safe_open(path, framework="pt") as tensors:
                for name in names:
                    targets[name].copy_(tensors.get_tensor(name))


def plan_tensor_copy(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> Callable[[], None]:
    """A copy of these tensors into the model's of the same names, in place; those not named stay.

    Raises WeightUpdateError, with the model untouched, for an unknown name, another shape or another dtype.
    """
    targets: dict[str, torch.Tensor] = model.state_dict(keep_vars=True)
    unknown = sorted(set(tensors) - set(targets))
    different = [
        f"{name} (model {targets[name].dtype} {list(targets[name].shape)}, update {t.dtype} {list(t.shape)})"
        for name, t in tensors.items()
        if name in targets and (targets[name].shape, targets[name].dtype) != (t.shape, t.dtype)
    ]
    problems = [
        f"{len(names)} {what}: {', '.join(names[:MAX_NAMES_SHOWN])}"
        for what, names in (("unknown", unknown), ("different", different))
        if names
    ]
    if problems:
        raise WeightUpdateError(f"the tensors don't fit the model, nothing was copied: {'; '.join(problems)}")

    def copy() -> None:
        with torch.no_grad():
            for name, tensor in tensors.items():
                targets[name].copy_(tensor)

    return copy


def _weight_files(root: Path) -> list[Path]:
    index = root / "model.safetensors.index.json"
    if index.is_file():
        names = json.loads(index.read_text())["weight_map"].values()
        return [root / name for name in sorted(set(names))]
    single = root / "model.safetensors"
    if not single.is_file():
        raise OSError("neither model.safetensors nor model.safetensors.index.json is there")
    return [single]


def _tensors_by_identity(model: torch.nn.Module) -> list[dict[str, torch.Tensor]]:
    """The model's tensors; names of one tied tensor stand together, for a file holds any of them."""
    groups: dict[tuple[int, tuple[int, ...]], dict[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        groups.setdefault((tensor.data_ptr(), tuple(tensor.shape)), {})[name] = tensor
    return list(groups.values())


def _compare(folder: str, wanted: list[dict[str, torch.Tensor]], found: dict[str, str]) -> None:
    missing, different = [], []
    unknown = set(found)
    for group in wanted:
        unknown -= set(group)
        present = [name for name in group if name in found]
        if not present:
            missing.append(next(iter(group)))
        for name in present:
            expected = f"{str(group[name].dtype).removeprefix('torch.')} {list(group[name].shape)}"
            if found[name] != expected:
                different.append(f"{name} (model {expected}, file {found[name]})")
    problems = [
        f"{len(names)} {what}: {', '.join(sorted(names)[:MAX_NAMES_SHOWN])}"
        for what, names in (("missing", missing), ("unknown", unknown), ("different", different))
        if names
    ]
    if problems:
        raise WeightUpdateError(
            f"the weights in {folder} don't fit the model, nothing was copied: {'; '.join(problems)}"
        )


def _safetensors_error() -> type[Exception]:
    from safetensors import SafetensorError

    error: Any = SafetensorError
    return error  # type: ignore[no-any-return]


_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
