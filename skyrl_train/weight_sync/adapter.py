"""A LoRA adapter is checked against the model before a server sees it: one may load what doesn't fit in silence."""

from __future__ import annotations

from collections.abc import Mapping

from skyrl_train.errors import WeightUpdateError
from skyrl_train.types import AdapterWeights
from skyrl_train.weight_sync.plan import TensorSpec

PREFIX = "base_model.model."
LOW, HIGH = ".lora_A.weight", ".lora_B.weight"


def check_adapter(adapter: AdapterWeights, specs: Mapping[str, TensorSpec]) -> None:
    """Each pair of matrices fits its module [out, in]: lora_A [r, in], lora_B [out, r], r being the config's rank.

    `specs` are the base model's tensors by their names in its checkpoint; empty: unknown, and the pairs are compared
    with each other alone. Raises WeightUpdateError.
    """
    problems = []
    ranks_differ = bool(adapter.config.get("rank_pattern"))
    pairs = {name.removesuffix(LOW) for name in adapter.tensors if name.endswith(LOW)}
    pairs |= {name.removesuffix(HIGH) for name in adapter.tensors if name.endswith(HIGH)}
    if not pairs:
        raise WeightUpdateError("the adapter has no pair of lora_A and lora_B")
    for pair in sorted(pairs):
        low, high = adapter.tensors.get(pair + LOW), adapter.tensors.get(pair + HIGH)
        if low is None or high is None:
            problems.append(f"{pair} has no {LOW if low is None else HIGH}")
            continue
        name = f"{pair.removeprefix(PREFIX)}.weight"
        base = specs.get(name)
        if specs and base is None:
            problems.append(f"the model has no {name}")
            continue
        rank = low.shape[0] if ranks_differ else adapter.config["r"]
        wide = (high.shape[0], low.shape[1]) if base is None else base.shape
        found, wanted = (tuple(low.shape), tuple(high.shape)), ((rank, wide[1]), (wide[0], rank))
        if found != wanted:
            problems.append(f"{pair}: lora_A and lora_B are {found}, the model and the rank ask for {wanted}")
    if problems:
        raise WeightUpdateError(
            f"the adapter does not fit the model, nothing was sent: {len(problems)} of {len(pairs)} modules, "
            f"{'; '.join(problems[:3])}"
        )
