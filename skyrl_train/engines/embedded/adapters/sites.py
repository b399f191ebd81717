"""The linear maps of a model that an adapter may change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from skyrl_train.errors import ConfigError
from skyrl_train.weight_sync.plan import TensorSpec

Sites = dict[str, TensorSpec]
"""Module name -> its weight as an adapter sees it: shape (out, in), however the module stores it."""


def find_sites(model: torch.nn.Module, target_modules: Sequence[str] | None) -> Sites:
    """All linear maps but the head, or those that are named. Raises ConfigError for a name that fits none."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    sites: Sites = {}
    for name, module in model.named_modules():
        if module is head or not isinstance(module, torch.nn.Linear | Conv1D):
            continue
        weight: Any = module.weight
        shape = tuple(weight.shape) if isinstance(module, torch.nn.Linear) else tuple(weight.shape[::-1])
        sites[name] = TensorSpec(name=f"{name}.weight", shape=shape, dtype=weight.dtype)
    if target_modules is None:
        return sites
    for wanted in target_modules:
        if not any(is_named(site, wanted) for site in sites):
            known = ", ".join(sorted({site.rpartition(".")[2] for site in sites}))
            raise ConfigError(
                f"generator.lora.target_modules: {wanted} is no linear map of {type(model).__name__} that adapters can "
                f"change; it has {known}"
            )
    return {site: spec for site, spec in sites.items() if any(is_named(site, wanted) for wanted in target_modules)}


def is_named(path: str, name: str) -> bool:
    """q_proj names model.layers.0.self_attn.q_proj."""
    return path == name or path.endswith(f".{name}")
