from __future__ import annotations

import pytest
import torch

from skyrl_train.errors import WeightUpdateError
from skyrl_train.types import AdapterWeights
from skyrl_train.weight_sync.adapter import check_adapter
from skyrl_train.weight_sync.plan import TensorSpec

SPECS = {"a.q_proj.weight": TensorSpec(name="a.q_proj.weight", shape=(6, 4), dtype=torch.float32)}
Shape = tuple[int, int]


def adapter(low: Shape = (2, 4), high: Shape = (6, 2), *, module: str = "a.q_proj", **config: object) -> AdapterWeights:
    name = f"base_model.model.{module}.lora"
    tensors = {f"{name}_A.weight": torch.zeros(low), f"{name}_B.weight": torch.zeros(high)}
    return AdapterWeights(tensors=tensors, config={"r": 2, **config})


def test_an_adapter_that_fits_passes_also_where_the_model_is_not_known() -> None:
    check_adapter(adapter(), SPECS)
    check_adapter(adapter(), {})
    check_adapter(adapter((3, 4), (6, 3), rank_pattern={"q_proj": 3}), SPECS)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (adapter((3, 4), (6, 3)), r"a.q_proj: lora_A and lora_B are \(\(3, 4\), \(6, 3\)\)"),
        (adapter((2, 5)), "the model and the rank ask for"),
        (adapter(high=(7, 2)), "the model and the rank ask for"),
        (adapter(module="b.q_proj"), "the model has no b.q_proj.weight"),
        (AdapterWeights(tensors={"x.lora_A.weight": torch.zeros(2, 4)}, config={"r": 2}), "x has no .lora_B.weight"),
        (AdapterWeights(tensors={}, config={"r": 2}), "no pair"),
    ],
)
def test_one_that_does_not_fit_is_refused_with_the_module(bad: AdapterWeights, message: str) -> None:
    with pytest.raises(WeightUpdateError, match=message):
        check_adapter(bad, SPECS)
