"""One adapter, checked against the model and ready to be added.

Shapes: r its rank at a module, `in` and `out` the module's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from skyrl_train.engines.embedded.adapters.sites import Sites
from skyrl_train.errors import WeightUpdateError
from skyrl_train.types import AdapterWeights
from skyrl_train.weight_sync.adapter import HIGH, LOW, PREFIX, check_adapter

MAX_SHOWN = 3

_MUST_BE_OFF: Mapping[str, str] = {
    "use_dora": "its weights have a magnitude of their own",
    "use_qalora": "it pools its input",
    "lora_bias": "biases of lora_B are not served",
    "alpha_pattern": "one alpha for all modules is served",
    "modules_to_save": "whole modules are not part of an adapter here; merge them into the model",
    "trainable_token_indices": "changed embeddings are not part of an adapter here",
    "layer_replication": "the model keeps its layers",
    "target_parameters": "only linear maps can be changed",
}
"""Keys of adapter_config.json under which an adapter computes something else than W x + s B A x."""

_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")
"""Values of init_lora_weights with which peft takes something off the model's own weights first."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LowRank:
    """low [r, in], high [r, out], `scale`: y += scale * (x low^T) high."""

    low: torch.Tensor
    high: torch.Tensor
    scale: float


@dataclass(frozen=True, kw_only=True, eq=False)
class LoraAdapter:
    """`number` is never used twice in one engine's life: it names the namespace of the keys that were made with it.

    `pairs` by module name; a module that isn't there is not changed. `source` is what it was made from, its tensors
    as they came; kept where somebody may want to compare them.
    """

    name: str
    number: int
    pairs: Mapping[str, LowRank]
    source: AdapterWeights | None = None


def make_adapter(
    name: str, number: int, weights: AdapterWeights, sites: Sites, *, max_rank: int | None, keep_source: bool = False
) -> LoraAdapter:
    """Copies of its tensors, in the model's type. Raises WeightUpdateError that names what doesn't fit."""
    try:
        rank, scaling = _rank_and_scaling(weights.config)
        _check_names(weights, sites)
        check_adapter(weights, {spec.name: spec for spec in sites.values()})
        pairs = {}
        for site, spec in sites.items():
            low = weights.tensors.get(f"{PREFIX}{site}{LOW}")
            if low is None:
                continue
            high = weights.tensors[f"{PREFIX}{site}{HIGH}"]
            rank = max(rank, low.shape[0])
            pairs[site] = LowRank(
                low=low.detach().to(spec.dtype, copy=True).contiguous(),
                high=high.detach().T.to(spec.dtype, copy=True).contiguous(),
                scale=scaling(low.shape[0]),
            )
        if max_rank is not None and rank > max_rank:
            raise WeightUpdateError(f"its rank is {rank}, generator.lora.max_rank is {max_rank}")
        for site, pair in pairs.items():
            # Rows of others pass through the same product and are then weighed with 0, which a NaN survives.
            if not (pair.low.isfinite().all() and pair.high.isfinite().all()):
                raise WeightUpdateError(f"{site} has numbers that are not finite")
    except WeightUpdateError as exc:
        raise WeightUpdateError(f"adapter {name}: {exc}") from exc
    return LoraAdapter(name=name, number=number, pairs=pairs, source=weights if keep_source else None)


def _rank_and_scaling(config: Mapping[str, Any]) -> tuple[int, Any]:
    """The config's rank, and the scale by rank: alpha / r, with rslora alpha / sqrt(r) (Kalajdzievski 2023, eq. 4)."""
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise WeightUpdateError(f"peft_type is {kind}, only LORA is served")
    if (bias := config.get("bias", "none")) != "none":
        raise WeightUpdateError(f'bias is {bias!r}, only "none" is served')
    for key, reason in _MUST_BE_OFF.items():
        if config.get(key):
            raise WeightUpdateError(f"{key} is {config[key]!r}: {reason}")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise WeightUpdateError(
            f"init_lora_weights is {start!r}: it belongs to a model that is not the untouched one; save it with "
            "peft's path_initial_model_for_weight_conversion"
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1:
        raise WeightUpdateError(f"its config needs r, a rank of at least 1; found {rank!r}")
    if not isinstance(alpha, int | float):
        raise WeightUpdateError(f"its config needs lora_alpha, a number; found {alpha!r}")
    if config.get("use_rslora"):
        return rank, lambda r: alpha / math.sqrt(r)
    return rank, lambda r: alpha / r


def _check_names(weights: AdapterWeights, sites: Sites) -> None:
    """Every tensor is one of a pair, at a module that may be changed."""
    unknown = sorted(name for name in weights.tensors if not name.endswith((LOW, HIGH)))
    if unknown:
        raise WeightUpdateError(
            f"{len(unknown)} of its tensors are no lora_A or lora_B of a linear map: {', '.join(unknown[:MAX_SHOWN])}"
        )
    modules = {name.removeprefix(PREFIX).removesuffix(LOW).removesuffix(HIGH) for name in weights.tensors}
    elsewhere = sorted(modules - set(sites))
    if elsewhere:
        known = ", ".join(sorted({site.rpartition(".")[2] for site in sites}))
        raise WeightUpdateError(
            f"{len(elsewhere)} of its {len(modules)} modules can't be changed here: "
            f"{', '.join(elsewhere[:MAX_SHOWN])}; adapters may change {known} of this model "
            "(generator.lora.target_modules)"
        )
