"""What an update carries, and whether it fits the model that it goes to."""

from __future__ import annotations

import pytest
import torch

from skyrl_train.errors import WeightUpdateError
from skyrl_train.weight_sync.plan import TensorSpec, WeightPlan


def plan_of(**shapes: tuple[int, ...]) -> WeightPlan:
    return WeightPlan.of({name: torch.zeros(shape) for name, shape in shapes.items()}, dtype=torch.bfloat16)


MODEL = {name: TensorSpec(name=name, shape=(2, 3), dtype=torch.float32) for name in ("embed", "q_proj", "k_proj")}


def test_tied_tensors_are_named_once() -> None:
    embed = torch.zeros(4, 2)
    plan = WeightPlan.of({"embed": embed, "other": torch.zeros(4, 2), "head": embed}, dtype=torch.float32)
    assert [spec.name for spec in plan.specs] == ["embed", "other"]
    assert plan.num_bytes == 2 * 8 * 4


def test_buckets_keep_the_order_and_the_bound_and_lose_nothing() -> None:
    specs = tuple(TensorSpec(name=str(i), shape=(size,), dtype=torch.float32) for i, size in enumerate((3, 2, 9, 1, 1)))
    plan = WeightPlan(specs=specs, bucket_bytes=20)
    assert [[spec.name for spec in bucket] for bucket in plan.buckets()] == [["0", "1"], ["2"], ["3", "4"]]


def test_a_bucket_is_of_one_type() -> None:
    specs = tuple(TensorSpec(name=str(d), shape=(3,), dtype=d) for d in (torch.bfloat16, torch.float32))
    assert [len(bucket) for bucket in WeightPlan(specs=specs).buckets()] == [1, 1]


def test_a_plan_that_fits_passes_and_a_part_of_the_model_may_come_alone() -> None:
    plan_of(q_proj=(2, 3)).check_model(MODEL)
    plan_of(embed=(2, 3), q_proj=(2, 3), k_proj=(2, 3), head=(2, 3)).check_model(MODEL, tied={"head"}, whole=True)


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (plan_of(q_prog=(2, 3)), "q_prog is not in the model; it has q_proj"),
        (plan_of(head=(2, 3)), "head is not in the model"),
        (plan_of(embed=(3, 2)), r"embed has shape \[3, 2\], the model's has \[2, 3\]"),
    ],
)
def test_a_plan_that_does_not_fit_names_the_tensor(plan: WeightPlan, said: str) -> None:
    with pytest.raises(WeightUpdateError, match=said):
        plan.check_model(MODEL)


def test_a_whole_update_that_leaves_one_out_names_it() -> None:
    with pytest.raises(WeightUpdateError, match="k_proj is missing"):
        plan_of(embed=(2, 3), q_proj=(2, 3)).check_model(MODEL, whole=True)


def test_tensors_that_changed_since_the_plan_are_refused() -> None:
    plan = plan_of(w=(2, 3))
    with pytest.raises(WeightUpdateError, match=r"w: .*missing"):
        plan.check_tensors({})
    with pytest.raises(WeightUpdateError, match=r"w: .*\[6\]"):
        plan.check_tensors({"w": torch.zeros(6)})
