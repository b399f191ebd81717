"""A module and its optimizer into a checkpoint's folder and back, to the bit.

state.json                    plain values: steps done, and what the owner adds
shard-00001-....safetensors   model.<name>, optimizer.<name>.{exp_avg, exp_avg_sq, step, master}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from skyrl_train.training.optimizer import MasterAdamW
from skyrl_train.training.sharded_state import (
    load_tensors,
    save_tensors,
    stored_names,
    unique_tensors,
    with_tied,
)

VALUES = "state.json"
MODEL, OPTIMIZER = "model.", "optimizer."


class Kept(Protocol):
    """The tensors that a checkpoint keeps: a whole module's, or what its model's folder doesn't have."""

    def state_dict(self) -> dict[str, torch.Tensor]: ...

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> Any: ...


def save_model_state(
    folder: Path, kept: Kept, module: torch.nn.Module, optimizer: MasterAdamW, values: Mapping[str, Any]
) -> None:
    """`module` owns the parameters that `optimizer` trains; `values` must survive JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"{MODEL}{name}": tensor for name, tensor in unique_tensors(kept.state_dict()).items()}
    tensors |= {f"{OPTIMIZER}{name}": tensor for name, tensor in optimizer.tensors(_trained(module)).items()}
    save_tensors(folder, tensors)
    (folder / VALUES).write_text(json.dumps({**values, "num_steps_done": optimizer.num_steps_done}, allow_nan=False))


def load_model_state(folder: Path, kept: Kept, module: torch.nn.Module, optimizer: MasterAdamW) -> dict[str, Any]:
    """The plain values. Raises OSError, ValueError or KeyError for another model's folder; nothing is loaded then."""
    values: dict[str, Any] = json.loads((folder / VALUES).read_text())
    names, state = _trained(module), kept.state_dict()
    stored = {name.removeprefix(OPTIMIZER) for name in stored_names(folder) if name.startswith(OPTIMIZER)}
    weights = {name: torch.empty_like(tensor) for name, tensor in unique_tensors(state).items()}
    moments = optimizer.empty_tensors(names, stored)
    targets = {f"{MODEL}{name}": tensor for name, tensor in weights.items()}
    load_tensors(folder, {**targets, **{f"{OPTIMIZER}{name}": tensor for name, tensor in moments.items()}})
    kept.load_state_dict(with_tied(weights, state))
    optimizer.load_tensors(names, moments, values["num_steps_done"])
    return values


def _trained(module: torch.nn.Module) -> list[str]:
    return [name for name, parameter in module.named_parameters() if parameter.requires_grad]
