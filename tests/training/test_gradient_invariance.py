"""One denominator: whatever the loss, the gradient does not move with the cut, the order or the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from skyrl_train.algorithms.kl import k3
from skyrl_train.algorithms.objective import PolicyObjective
from skyrl_train.algorithms.off_policy import Corrections
from skyrl_train.algorithms.policy_losses import POLICY_LOSSES
from skyrl_train.algorithms.reductions import LOSS_REDUCTIONS
from skyrl_train.algorithms.selections import SELECTIONS
from skyrl_train.data.pack import pack
from skyrl_train.training.optimizer import OptimizerSettings
from skyrl_train.training.token_selection import canonical_order
from skyrl_train.training.trainer import PolicyTrainer
from skyrl_train.types import TrainBatch, TrainingSample
from tests.tiny import make_model
from tests.training.batches import make_samples
from tests.training.test_trainer import assert_near, gradients, shuffled

SETTINGS = OptimizerSettings(lr=1e-3)
SELECT_OPTIONS: dict[str, dict[str, float]] = {
    "clip_cov": {"clip_cov_ratio": 0.2, "clip_cov_lb": 0.0, "clip_cov_ub": 100.0},
    "kl_cov": {"kl_cov_frac": 0.3},
}


def joined(batch: TrainBatch) -> TrainBatch:
    """All ranks' micro-batches one after the other: their gradients add up, as an all-reduce would add them."""
    return replace(batch, micro_batches=(tuple(m for rank in batch.micro_batches for m in rank),))


def old_policy() -> PolicyTrainer:
    """A little apart from the policy that is trained, which is `make_model("qwen2")`."""
    model = make_model("qwen2").double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return PolicyTrainer(model, SETTINGS)


@pytest.fixture(scope="module")
def samples() -> list[TrainingSample]:
    """Sampled by an engine near the old policy; one has nothing to train."""
    made = make_samples()
    batch = pack(made, micro_batch_size=1)
    sampled: dict[int, torch.Tensor] = {}
    for micro_batch, now in zip(batch.micro_batches[0], old_policy().forward(batch), strict=True):
        sampled |= dict(zip(micro_batch.token_index.tolist(), now.float(), strict=True))
    generator = torch.Generator().manual_seed(4)
    near, at = [], 0
    for sample in made:
        rollout_logprobs = torch.zeros(len(sample.token_ids))
        for position in sample.loss_mask.nonzero()[:, 0].tolist():
            rollout_logprobs[position] = sampled[at] + 0.5 * torch.randn((), generator=generator)
            at += 1
        near.append(replace(sample, rollout_logprobs=rollout_logprobs))
    return [*near, replace(near[0], loss_mask=torch.zeros_like(near[0].loss_mask))]


def cuts(samples: Sequence[TrainingSample]) -> list[TrainBatch]:
    return [
        pack(samples, max_tokens_per_micro_batch=10_000),
        pack(samples, micro_batch_size=1),
        pack(shuffled(samples), max_tokens_per_micro_batch=33),
        joined(pack(samples, micro_batch_size=3, dp_size=2)),
        joined(pack(shuffled(samples), max_tokens_per_micro_batch=40, dp_size=3, share_prefix=False)),
    ]


def assert_invariant(objective: PolicyObjective, samples: Sequence[TrainingSample]) -> None:
    old, results = old_policy(), []
    for batch in cuts(samples):
        model = make_model("qwen2").double()
        trainer = PolicyTrainer(model, SETTINGS, reference=make_model("qwen2", seed=1).double(), version=5)
        metrics = trainer.forward_backward(
            batch,
            objective,
            old_logprobs=old.forward(batch),
            ref_logprobs=trainer.forward(batch, which="reference"),
        )
        results.append((gradients(model), metrics))
    wanted, wanted_metrics = results[0]
    assert all(g.abs().max() > 1e-6 for g in wanted.values())
    for found, metrics in results[1:]:
        assert metrics == pytest.approx(wanted_metrics, rel=1e-5, abs=1e-8)
        for name, gradient in wanted.items():
            assert_near(found[name], gradient, name)


@pytest.mark.parametrize("reduction", LOSS_REDUCTIONS)
@pytest.mark.parametrize("loss", POLICY_LOSSES)
def test_every_loss_and_reduction(loss: str, reduction: str, samples: list[TrainingSample]) -> None:
    options: dict[str, Any] = {"max_seq_len": 9} if reduction == "seq_mean_token_sum_norm" else {}
    select = partial(SELECTIONS[loss], **SELECT_OPTIONS[loss]) if loss in SELECTIONS else None
    objective = PolicyObjective(
        policy_loss=POLICY_LOSSES[loss],
        reduction=partial(LOSS_REDUCTIONS[reduction], **options),
        select=select,
    )
    assert_invariant(objective, samples)


@pytest.mark.parametrize("mask", ["geometric", "product"])
def test_corrections_kl_and_entropy(mask: Any, samples: list[TrainingSample]) -> None:
    objective = PolicyObjective(
        policy_loss=POLICY_LOSSES["gspo"],
        reduction=LOSS_REDUCTIONS["sequence_mean"],
        kl=k3,
        kl_loss_coef=lambda: 0.1,
        entropy_loss_coef=0.01,
        corrections=Corrections(
            tis_cap=1.2, sequence_mask=mask, sequence_mask_low=0.7, sequence_mask_high=1.4, token_veto_below=0.35
        ),
    )
    assert_invariant(objective, samples)


def test_masked_samples_count_in_the_denominator(samples: list[TrainingSample]) -> None:
    """What is left has the gradient that it has unmasked: the rest is not blown up by what was masked."""
    found = []
    for corrections in (Corrections(), Corrections(sequence_mask="product")):
        model = make_model("qwen2").double()
        trainer = PolicyTrainer(model, SETTINGS)
        batch = pack(samples, micro_batch_size=1)
        old = [micro_batch.rollout_logprobs.double() for micro_batch in batch.micro_batches[0]]
        # The engine's numbers of all but the first two samples are far off.
        for k in range(2, len(old)):
            old[k] = old[k] - 5
        kept = replace(
            batch,
            micro_batches=(batch.micro_batches[0][:2] if not corrections.any else batch.micro_batches[0],),
        )
        objective = PolicyObjective(
            policy_loss=POLICY_LOSSES["importance_sampling"],
            reduction=LOSS_REDUCTIONS["token_mean"],
            corrections=corrections,
        )
        metrics = trainer.forward_backward(kept, objective, old_logprobs=old[: len(kept.micro_batches[0])])
        found.append(gradients(model))
    assert metrics["policy/masked_sample_frac"] == pytest.approx((len(samples) - 3) / len(samples))
    for name, gradient in found[0].items():
        assert_near(found[1][name], gradient, name)


def test_canonical_order_is_by_trajectory_and_then_as_sampled(samples: list[TrainingSample]) -> None:
    def tokens(batch: TrainBatch) -> list[int]:
        micro_batches = batch.micro_batches[0]
        return torch.cat([m.target_ids for m in micro_batches])[canonical_order(micro_batches)].tolist()

    wanted = [int(t) for s in samples for t in s.token_ids[s.loss_mask]]
    assert [tokens(batch) for batch in cuts(samples)] == [wanted] * 5


def test_what_is_drawn_changes_from_version_to_version(samples: list[TrainingSample]) -> None:
    select = partial(SELECTIONS["clip_cov"], **SELECT_OPTIONS["clip_cov"])
    objective = PolicyObjective(
        policy_loss=POLICY_LOSSES["clip_cov"], reduction=LOSS_REDUCTIONS["token_mean"], select=select
    )
    losses = []
    for version in (1, 1, 2):
        trainer = PolicyTrainer(make_model("qwen2"), SETTINGS, version=version)
        losses.append(trainer.forward_backward(cuts(samples)[0], objective)["policy/loss"])
    assert losses[0] == losses[1] != losses[2]
