"""The whole objective and its reductions, against scalars on ragged samples."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch

from skyrl_train.algorithms.kl import KL_ESTIMATORS
from skyrl_train.algorithms.objective import PolicyObjective
from skyrl_train.algorithms.policy_losses import LossInputs, ppo_clip
from skyrl_train.algorithms.reductions import LOSS_REDUCTIONS, Denominators, seq_mean_token_sum_norm

VALUES = [[1.0, 2.0, 6.0], [4.0], [3.0, 5.0]]  # three samples of a mini-batch
WHOLE = Denominators(num_loss_tokens=6, num_samples=4)  # and a fourth without loss tokens
BY_HAND = {
    "token_mean": (9 + 4 + 8) / 6,
    "sequence_mean": (3 + 4 + 4 + 0) / 4,
    "seq_mean_token_sum_norm": (9 + 4 + 8) / (4 * 10),
}


def reduction(name: str) -> Any:
    found = LOSS_REDUCTIONS[name]
    return partial(found, max_seq_len=10) if found is seq_mean_token_sum_norm else found


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize("cut", [[[0, 1, 2]], [[0], [1], [2]], [[0, 2], [1]], [[], [2, 1, 0]]])
def test_shares_of_micro_batches_add_up_however_they_are_cut(name: str, cut: list[list[int]]) -> None:
    total = 0.0
    for members in cut:
        values = torch.tensor([v for s in members for v in VALUES[s]])
        sample_index = torch.tensor([i for i, s in enumerate(members) for _ in VALUES[s]], dtype=torch.int64)
        total += reduction(name)(values, sample_index, WHOLE).item()
    assert total == pytest.approx(BY_HAND[name])


def make_inputs(**replaced: Any) -> LossInputs:
    fields: dict[str, Any] = {
        "logprobs": torch.tensor([-1.0, -0.5, -2.0], dtype=torch.float64, requires_grad=True),
        "entropy": torch.tensor([0.3, 0.9, 0.6], dtype=torch.float64, requires_grad=True),
        "old_logprobs": torch.tensor([-1.1, -0.5, -1.9], dtype=torch.float64),
        "rollout_logprobs": torch.tensor([-1.1, -0.5, -1.9], dtype=torch.float64),
        "ref_logprobs": torch.tensor([-1.5, -0.4, -1.0], dtype=torch.float64),
        "advantages": torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64),
        "sample_index": torch.tensor([0, 0, 1]),
    }
    return LossInputs(**{**fields, **replaced})


def test_the_objective_is_policy_plus_kl_minus_entropy() -> None:
    objective = PolicyObjective(
        policy_loss=ppo_clip,
        reduction=LOSS_REDUCTIONS["token_mean"],
        kl=KL_ESTIMATORS["k2"],
        kl_loss_coef=0.5,
        entropy_loss_coef=0.1,
    )
    inputs = make_inputs()
    result = objective(inputs, Denominators(num_loss_tokens=5, num_samples=2))
    policy = -math.exp(0.1) * 1.0 + 2.0 - math.exp(-0.1) * 0.5
    kl = (0.5**2 + 0.1**2 + 1.0**2) / 2
    entropy = 0.3 + 0.9 + 0.6
    assert result.loss.item() == pytest.approx((policy + 0.5 * kl - 0.1 * entropy) / 5)
    gradients = torch.autograd.grad(result.loss, [inputs.logprobs, inputs.entropy])
    # d policy / d logprob = -ratio A inside the clip; d k2 = logprob - ref.
    wanted = [(-math.exp(0.1) + 0.5 * 0.5) / 5, (2.0 - 0.5 * 0.1) / 5, (-math.exp(-0.1) * 0.5 - 0.5 * 1.0) / 5]
    assert gradients[0].tolist() == pytest.approx(wanted)
    assert gradients[1].tolist() == pytest.approx([-0.02] * 3)
    assert not any(values.requires_grad for values in result.token_metrics.values())
    assert result.token_metrics["ref_kl"].tolist() == pytest.approx([0.125, 0.005, 0.5])
    assert result.token_metrics["approx_kl"].tolist() == pytest.approx([math.exp(0.1) - 1.1, 0.0, math.exp(-0.1) - 0.9])


def test_a_kl_without_a_coefficient_is_watched_and_not_trained() -> None:
    objective = PolicyObjective(policy_loss=ppo_clip, reduction=LOSS_REDUCTIONS["token_mean"], kl=KL_ESTIMATORS["k3"])
    without = PolicyObjective(policy_loss=ppo_clip, reduction=LOSS_REDUCTIONS["token_mean"])
    denominators = Denominators(num_loss_tokens=3, num_samples=2)
    result = objective(make_inputs(), denominators)
    assert "ref_kl" in result.token_metrics
    assert result.loss.item() == without(make_inputs(ref_logprobs=None), denominators).loss.item()


def test_a_kl_coefficient_needs_an_estimator_and_a_reference() -> None:
    with pytest.raises(ValueError, match=r"kl_loss_coef 0.1 needs a KL estimator"):
        PolicyObjective(policy_loss=ppo_clip, reduction=LOSS_REDUCTIONS["token_mean"], kl_loss_coef=0.1)
    objective = PolicyObjective(
        policy_loss=ppo_clip, reduction=LOSS_REDUCTIONS["token_mean"], kl=KL_ESTIMATORS["k1"], kl_loss_coef=0.1
    )
    with pytest.raises(ValueError, match="no reference log-probabilities"):
        objective(make_inputs(ref_logprobs=None), Denominators(num_loss_tokens=3, num_samples=2))
