"""Weights and masks of samples that the engine drew from another distribution, against scalars on ragged samples."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from skyrl_train.algorithms.kl import k2
from skyrl_train.algorithms.objective import PolicyObjective
from skyrl_train.algorithms.off_policy import Corrections, importance_ratio
from skyrl_train.algorithms.policy_losses import LossInputs, importance_sampling, ppo_clip
from skyrl_train.algorithms.reductions import Denominators, token_mean
from skyrl_train.engines.logprob_space import comparable, correctable
from skyrl_train.types import SamplingParams


def slow_weights(ratios: list[list[float]], c: Corrections) -> list[float]:
    """Token weights, sample after sample, from each token's trainer / engine probability."""
    weights = []
    for sample in ratios:
        product = math.prod(sample)
        over = product ** (1 / len(sample)) if c.sequence_mask == "geometric" else product
        masked = c.sequence_mask is not None and not c.sequence_mask_low <= over <= c.sequence_mask_high
        masked = masked or (c.token_veto_below is not None and min(sample) < c.token_veto_below)
        for ratio in sample:
            weight = 1.0 if c.tis_cap is None else min(ratio, c.tis_cap)
            weights.append(0.0 if masked else weight)
    return weights


LOW, HIGH = 0.4321, 1.987
samples = st.lists(st.lists(st.floats(0.05, 8.0), min_size=1, max_size=5), min_size=1, max_size=5)


@settings(deadline=None, max_examples=100)
@given(
    samples,
    st.one_of(st.none(), st.floats(0.5, 4.0)),
    st.sampled_from([None, "geometric", "product"]),
    st.one_of(st.none(), st.floats(0.06, 0.9)),
)
def test_weights_equal_their_scalar_reference(ratios: list[list[float]], cap: Any, mask: Any, veto: Any) -> None:
    corrections = Corrections(
        tis_cap=cap, sequence_mask=mask, sequence_mask_low=LOW, sequence_mask_high=HIGH, token_veto_below=veto
    )
    over = [math.prod(s) ** (1 / len(s) if mask == "geometric" else 1) for s in ratios]
    near = [ratio - veto for s in ratios for ratio in s if veto is not None] + [
        r - b for r in over for b in (LOW, HIGH)
    ]
    assume(all(abs(distance) > 1e-9 for distance in near))  # at a bound, rounding decides
    flat = torch.tensor([math.log(ratio) for sample in ratios for ratio in sample], dtype=torch.float64)
    index = torch.tensor([i for i, sample in enumerate(ratios) for _ in sample])
    found = corrections(flat - 1, torch.full_like(flat, -1.0), index)
    assert found.values.tolist() == pytest.approx(slow_weights(ratios, corrections), rel=1e-9)


def make_inputs() -> LossInputs:
    """Ratios to the engine 1 4 | 1 | 0.01, of a policy that has not moved."""
    old = torch.tensor([-1.0, -0.5, -2.0, -5.0], dtype=torch.float64)
    return LossInputs(
        logprobs=old.clone().requires_grad_(),
        entropy=torch.ones(4, dtype=torch.float64),
        old_logprobs=old,
        rollout_logprobs=old - torch.tensor([1.0, 4.0, 1.0, 0.01], dtype=torch.float64).log(),
        ref_logprobs=old - 1,
        advantages=torch.tensor([1.0, 1.0, 1.0, 1.0], dtype=torch.float64),
        sample_index=torch.tensor([0, 0, 1, 2]),
    )


WHOLE = Denominators(num_loss_tokens=4, num_samples=3)


def gradient(corrections: Corrections, **options: Any) -> list[float]:
    objective = PolicyObjective(policy_loss=ppo_clip, reduction=token_mean, corrections=corrections, **options)
    inputs = make_inputs()
    (found,) = torch.autograd.grad(objective(inputs, WHOLE).loss, inputs.logprobs)
    return [4 * x for x in found.tolist()]  # over the denominator


def test_a_tokens_gradient_is_weighed_and_the_denominator_stays() -> None:
    assert gradient(Corrections()) == pytest.approx([-1, -1, -1, -1])
    assert gradient(Corrections(tis_cap=2.0)) == pytest.approx([-1, -2, -1, -0.01])
    assert gradient(Corrections(tis_cap=2.0, sequence_mask="product")) == pytest.approx([0, 0, -1, 0])
    assert gradient(Corrections(sequence_mask="geometric")) == pytest.approx([-1, -1, -1, 0])
    assert gradient(Corrections(token_veto_below=0.5)) == pytest.approx([-1, -1, -1, 0])


def test_kl_and_entropy_are_not_weighed() -> None:
    """d k2 / d logprob = logprob - ref = 1 for every token, masked or not."""
    with_kl = gradient(Corrections(tis_cap=2.0, sequence_mask="product"), kl=k2, kl_loss_coef=0.25)
    assert with_kl == pytest.approx([0.25, 0.25, -0.75, 0.25])


def test_an_importance_weighted_loss_is_corrected_once() -> None:
    """exp(new - old) A times exp(old - rollout) is exp(new - rollout) A: REINFORCE from the engine's samples."""
    objective = PolicyObjective(
        policy_loss=importance_sampling, reduction=token_mean, corrections=Corrections(tis_cap=10.0)
    )
    inputs = make_inputs()
    moved = replace(inputs, logprobs=(inputs.old_logprobs + 0.3).requires_grad_())
    wanted = -torch.exp(moved.logprobs - moved.rollout_logprobs).mean()
    assert objective(moved, WHOLE).loss.item() == pytest.approx(wanted.item())


def test_metrics_count_what_was_corrected() -> None:
    objective = PolicyObjective(
        policy_loss=ppo_clip,
        reduction=token_mean,
        corrections=Corrections(tis_cap=2.0, sequence_mask="product"),
    )
    metrics = objective(make_inputs(), WHOLE).token_metrics
    assert metrics["tis_truncated_frac"].tolist() == [0, 1, 0, 0]
    assert metrics["masked_token_frac"].tolist() == [1, 1, 0, 1]
    assert metrics["masked_sample_frac"].mean().item() == pytest.approx(2 / 3)


def test_what_cannot_be_compared_is_masked() -> None:
    rollout = torch.tensor([math.nan, -1.0])
    for corrections in (Corrections(sequence_mask="geometric"), Corrections(token_veto_below=0.1)):
        found = corrections(torch.tensor([-1.0, -1.0]), rollout, torch.tensor([0, 1]))
        assert found.masked_samples is not None and found.masked_samples.tolist() == [True, False]


def test_a_wild_ratio_stays_finite() -> None:
    assert importance_ratio(torch.tensor([0.0]), torch.tensor([-500.0])).tolist() == pytest.approx([math.exp(20)])


# The engine's space

SAMPLING = partial(SamplingParams, max_new_tokens=4)


@pytest.mark.parametrize("space", ["raw", "temperature", "penalised", "sampled"])
def test_plain_sampling_is_comparable_and_correctable_in_every_space(space: Any) -> None:
    assert comparable(space, SAMPLING()) is None and correctable(space, SAMPLING()) is None


def test_raw_logprobs_are_comparable_at_temperature_1_only() -> None:
    reason = comparable("raw", SAMPLING(temperature=0.7))
    assert reason == "the engine gives log-probabilities at temperature 1, the trainer those at 0.7"
    assert correctable("raw", SAMPLING(temperature=0.7)) == reason
    assert comparable("temperature", SAMPLING(temperature=0.7)) is None
    assert comparable("sampled", SAMPLING(temperature=0.7)) is None


@pytest.mark.parametrize(
    "setting",
    [
        {"top_p": 0.9},
        {"top_k": 50},
        {"min_p": 0.1},
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
        {"min_new_tokens": 2},
    ],
)
def test_truncation_and_penalties_can_be_compared_and_not_corrected(setting: dict[str, Any]) -> None:
    ((name, value),) = setting.items()
    assert comparable("temperature", SAMPLING(**setting)) is None and comparable("raw", SAMPLING(**setting)) is None
    assert f"{name}={value}" in str(comparable("sampled", SAMPLING(**setting)))
    for space in ("raw", "temperature", "sampled"):
        assert f"{name}={value}" in str(correctable(space, SAMPLING(**setting)))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["repetition_penalty", "presence_penalty", "frequency_penalty", "min_new_tokens"])
def test_penalised_logprobs_are_not_comparable_with_penalties(name: str) -> None:
    reason = comparable("penalised", SAMPLING(**{name: 2}, top_p=0.9))
    assert reason is not None and f"after {name}=2," in reason and "top_p" not in reason
    assert comparable("penalised", SAMPLING(top_p=0.9, top_k=5, min_p=0.1, temperature=0.7)) is None
    assert "top_p=0.9" in str(correctable("penalised", SAMPLING(top_p=0.9)))
