"""Policy losses against scalar definitions, on the corners of the clip."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl_train.algorithms.policy_losses import POLICY_LOSSES, LossInputs, cispo, dual_clip, gspo, ppo_clip, sapo
from skyrl_train.algorithms.reductions import Denominators, sequence_mean


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
    inputs = replace(make_inputs([-1.0, -2.0], [-1.0, -2.0], [0.7, -0.4]), selected=torch.zeros(2, dtype=torch.bool))
    for loss in POLICY_LOSSES.values():
        (gradient,) = torch.autograd.grad(loss(inputs).values.sum(), inputs.logprobs)
        assert gradient.tolist() == pytest.approx([-0.7, 0.4])


def test_the_names_of_the_configuration_are_known() -> None:
    assert POLICY_LOSSES["regular"] is ppo_clip and POLICY_LOSSES["dual_clip"] is dual_clip


# The other losses, token by token, on two ragged samples


def slow_loss(name: str, inputs: LossInputs) -> list[float]:
    """Each loss in scalars, with the options of `OPTIONS`."""
    new, old, advantages = inputs.logprobs.tolist(), inputs.old_logprobs.tolist(), inputs.advantages.tolist()
    sample, selected = inputs.sample_index.tolist(), inputs.selected.tolist() if inputs.selected is not None else []
    losses = []
    for i, (p, q, a) in enumerate(zip(new, old, advantages, strict=True)):
        ratio = math.exp(p - q)
        if name == "gspo":
            own = [new[j] - old[j] for j in range(len(new)) if sample[j] == sample[i]]
            mean = sum(own) / len(own)
            losses.append(slow_ppo(mean, 0.0, a, 0.02, 0.03))
        elif name == "cispo":
            losses.append(-min(max(ratio, 0.6), 1.5) * a * p)
        elif name == "sapo":
            tau = 1.5 if a > 0 else 3.0
            losses.append(-a * 4 / tau / (1 + math.exp(-tau * (ratio - 1))))
        elif name == "clip_cov":
            losses.append(0.0 if selected[i] else slow_ppo(p, q, a, 0.1, 0.2))
        elif name == "kl_cov":
            losses.append(-ratio * a + (0.7 * abs(p - q) if selected[i] else 0.0))
        else:
            assert name == "importance_sampling"
            losses.append(-ratio * a)
    return losses


OPTIONS: dict[str, dict[str, float]] = {
    "gspo": {"eps_clip_low": 0.02, "eps_clip_high": 0.03},
    "cispo": {"cispo_eps_clip_low": 0.4, "cispo_eps_clip_high": 0.5},
    "sapo": {"tau_pos": 1.5, "tau_neg": 3.0},
    "clip_cov": {"eps_clip_low": 0.1, "eps_clip_high": 0.2},
    "kl_cov": {"ppo_kl_coef": 0.7},
    "importance_sampling": {},
}


def ragged(rows: list[list[float]], cut: int) -> LossInputs:
    """The first `cut` tokens are one sample, the others another; every second token is selected."""
    new, old, advantages = (list(column) for column in zip(*rows, strict=True))
    count = torch.arange(len(rows))
    return replace(make_inputs(new, old, advantages), sample_index=(count >= cut).long(), selected=count % 2 == 1)


@settings(deadline=None, max_examples=60)
@given(tokens, st.integers(1, 12))
def test_the_other_losses_equal_their_scalar_references(rows: list[list[float]], cut: int) -> None:
    inputs = ragged(rows, cut)
    for name, options in OPTIONS.items():
        found = POLICY_LOSSES[name](inputs, **options).values
        assert found.tolist() == pytest.approx(slow_loss(name, inputs), rel=1e-9, abs=1e-12), name


def test_no_loss_lacks_a_reference() -> None:
    assert {*OPTIONS, "regular", "dual_clip"} == set(POLICY_LOSSES)


ROWS = [
    [-0.9, -1.0, 1.0],
    [-2.5, -2.0, 1.0],
    [-0.2, -1.0, 1.0],
    [-1.3, -1.0, -0.5],
    [-0.4, -0.7, -0.5],
    [-3.0, -1.0, -0.5],
]


@pytest.mark.parametrize("name", [name for name in POLICY_LOSSES if name != "cispo"])
def test_gradients_equal_finite_differences(name: str) -> None:
    """Of the reduced loss. cispo's weight is a constant, so its gradient is not its value's derivative: see below."""
    inputs = ragged(ROWS, 3)
    loss = partial(POLICY_LOSSES[name], **OPTIONS.get(name, {}))

    def reduced(logprobs: torch.Tensor) -> torch.Tensor:
        values = loss(replace(inputs, logprobs=logprobs)).values
        return sequence_mean(values, inputs.sample_index, Denominators(num_loss_tokens=6, num_samples=2))

    assert torch.autograd.gradcheck(reduced, inputs.logprobs)


def test_gspo_gives_each_token_the_gradient_of_its_samples_ratio() -> None:
    """-A s / length for each token, in a sample inside the clip; nothing in one that went far enough."""
    inputs = ragged([[-1.0, -1.1, 2.0], [-2.0, -2.06, 2.0], [-0.5, -0.1, -1.0]], 2)
    losses = gspo(inputs, eps_clip_low=0.2, eps_clip_high=0.2)
    weights = Denominators(num_loss_tokens=3, num_samples=2)
    (gradient,) = torch.autograd.grad(sequence_mean(losses.values, inputs.sample_index, weights), inputs.logprobs)
    sequence = math.exp((0.1 + 0.06) / 2)
    assert gradient.tolist() == pytest.approx([-2 * sequence / 2 / 2] * 2 + [0.0])
    assert losses.metrics["clip_frac"].tolist() == [0, 0, 1]


def test_cispos_gradient_is_the_clipped_weight_and_never_0() -> None:
    inputs = ragged([[math.log(r), 0.0, a] for r, a in ((0.1, 1.0), (0.1, -1.0), (3.0, 1.0), (3.0, -1.0))], 2)
    (gradient,) = torch.autograd.grad(
        cispo(inputs, cispo_eps_clip_low=0.5, cispo_eps_clip_high=1.0).values.sum(), inputs.logprobs
    )
    assert gradient.tolist() == pytest.approx([-0.5, 0.5, -2.0, 2.0])


@pytest.mark.parametrize("low", [0.0, 1.0, 1.5])
def test_cispo_without_a_lower_bound_does_not_lift_small_ratios(low: float) -> None:
    inputs = ragged([[math.log(0.25), 0.0, -1.0]], 1)
    losses = cispo(inputs, cispo_eps_clip_low=low)
    (gradient,) = torch.autograd.grad(losses.values.sum(), inputs.logprobs)
    assert gradient.tolist() == pytest.approx([0.25])
    assert losses.metrics["clip_frac"].tolist() == [0]


def test_sapo_fades_on_both_sides_of_a_ratio_of_1() -> None:
    inputs = ragged([[math.log(r), 0.0, 1.0] for r in (0.1, 1.0, 3.0)], 1)
    losses = sapo(inputs, tau_pos=2.0)
    slopes = [1 / math.cosh(r - 1) ** 2 for r in (0.1, 1.0, 3.0)]  # 4 sigmoid(2 x) sigmoid(-2 x) = 1 / cosh(x)^2
    assert losses.metrics["gate_slope"].tolist() == pytest.approx(slopes)
    (gradient,) = torch.autograd.grad(losses.values.sum(), inputs.logprobs)
    assert gradient.tolist() == pytest.approx([-r * s for r, s in zip((0.1, 1.0, 3.0), slopes, strict=True)])


@pytest.mark.parametrize("name", ["clip_cov", "kl_cov"])
def test_a_loss_that_needs_a_selection_says_so(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} needs tokens selected over the whole mini-batch"):
        POLICY_LOSSES[name](make_inputs([-1.0], [-1.0], [1.0]))
