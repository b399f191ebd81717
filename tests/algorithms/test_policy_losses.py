"""Policy losses against scalar definitions, on the corners of the clip."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl_train.algorithms.policy_losses import POLICY_LOSSES, LossInputs, dual_clip, ppo_clip


def make_inputs(logprobs: list[float], old: list[float], advantages: list[float]) -> LossInputs:
    new = torch.tensor(logprobs, dtype=torch.float64, requires_grad=True)
    return LossInputs(
        logprobs=new,
        entropy=torch.zeros(len(logprobs), dtype=torch.float64),
        old_logprobs=torch.tensor(old, dtype=torch.float64),
        rollout_logprobs=torch.tensor(old, dtype=torch.float64),
        ref_logprobs=None,
        advantages=torch.tensor(advantages, dtype=torch.float64),
        sample_index=torch.zeros(len(logprobs), dtype=torch.int64),
    )


def slow_ppo(new: float, old: float, advantage: float, low: float, high: float) -> float:
    ratio = math.exp(new - old)
    return -min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)


def slow_dual(new: float, old: float, advantage: float, low: float, high: float, c: float) -> float:
    loss = slow_ppo(new, old, advantage, low, high)
    return min(loss, -c * advantage) if advantage < 0 else loss


tokens = st.lists(st.tuples(st.floats(-4, 0), st.floats(-4, 0), st.floats(-3, 3)).map(list), min_size=1, max_size=12)


@settings(deadline=None, max_examples=100)
@given(tokens, st.floats(0.05, 0.9), st.floats(0.05, 2.0), st.floats(1.5, 5))
def test_losses_equal_their_scalar_references(rows: list[list[float]], low: float, high: float, c: float) -> None:
    new, old, advantages = (list(column) for column in zip(*rows, strict=True))
    inputs = make_inputs(new, old, advantages)
    found = ppo_clip(inputs, eps_clip_low=low, eps_clip_high=high).values
    assert found.tolist() == pytest.approx([slow_ppo(*row, low, high) for row in rows], rel=1e-9, abs=1e-12)
    found = dual_clip(inputs, eps_clip_low=low, eps_clip_high=high, clip_ratio_c=c).values
    assert found.tolist() == pytest.approx([slow_dual(*row, low, high, c) for row in rows], rel=1e-9, abs=1e-12)


def test_the_clip_stops_the_gradient_on_one_side_only() -> None:
    """What went far enough gets no gradient, what went the wrong way does."""
    ratios, advantages = [1.5, 1.5, 0.5, 0.5], [1.0, -1.0, 1.0, -1.0]
    inputs = make_inputs([math.log(r) for r in ratios], [0.0] * 4, advantages)
    losses = ppo_clip(inputs, eps_clip_low=0.2, eps_clip_high=0.28)
    assert losses.values.tolist() == pytest.approx([-1.28, 1.5, -0.5, 0.8])
    losses.values.sum().backward()  # type: ignore[no-untyped-call]
    assert inputs.logprobs.grad is not None
    assert inputs.logprobs.grad.tolist() == pytest.approx([0.0, 1.5, -0.5, 0.0])  # -ratio * advantage or 0
    assert losses.metrics["clip_frac"].tolist() == [1, 0, 0, 1]
    assert losses.metrics["ratio_mean"].tolist() == pytest.approx(ratios)


def test_dual_clip_bounds_a_wild_ratio_with_a_negative_advantage() -> None:
    inputs = make_inputs([math.log(10), math.log(2)], [0.0, 0.0], [-1.0, -1.0])
    losses = dual_clip(inputs, clip_ratio_c=3.0)
    assert losses.values.tolist() == pytest.approx([3.0, 2.0])
    losses.values.sum().backward()  # type: ignore[no-untyped-call]
    assert inputs.logprobs.grad is not None and inputs.logprobs.grad.tolist() == pytest.approx([0.0, 2.0])
    assert losses.metrics["dual_clip_frac"].tolist() == [1, 0]


def test_on_policy_the_gradient_is_that_of_reinforce() -> None:
    inputs = replace(
        make_inputs([-1.0, -2.0], [-1.0, -2.0], [0.7, -0.4]), selected=torch.zeros(2, dtype=torch.bool)
    )
    for loss in POLICY_LOSSES.values():
        (gradient,) = torch.autograd.grad(loss(inputs).values.sum(), inputs.logprobs)
        assert gradient.tolist() == pytest.approx([-0.7, 0.4])


def test_the_names_of_the_configuration_are_known() -> None:
    assert POLICY_LOSSES["regular"] is ppo_clip and POLICY_LOSSES["dual_clip"] is dual_clip
