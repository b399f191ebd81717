"""Whose log-probabilities are the old ones, and what an update reports."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from skyrl_train.algorithms.objective import MicroBatchLoss, PolicyObjective
from skyrl_train.algorithms.policy_losses import LossInputs
from skyrl_train.algorithms.reductions import Denominators
from skyrl_train.data.pack import pack
from skyrl_train.training.optimizer import OptimizerSettings
from skyrl_train.training.trainer import PolicyTrainer
from skyrl_train.training.update import update_policy
from skyrl_train.types import TrainBatch, TrainingSample
from tests.tiny import make_model
from tests.training.batches import make_samples


def trainer() -> PolicyTrainer:
    return PolicyTrainer(make_model("qwen2"), OptimizerSettings(lr=1e-2))


def batch(seed: int = 0) -> TrainBatch:
    return pack(make_samples(seed=seed), micro_batch_size=5)


class Recorder:
    """A loss that remembers how far each micro-batch's policy is from its old one."""

    def __init__(self, objective: PolicyObjective) -> None:
        self.objective = objective
        self.distances: list[float] = []

    def __call__(self, inputs: LossInputs, denominators: Denominators) -> MicroBatchLoss:
        self.distances.append(float((inputs.logprobs - inputs.old_logprobs).detach().abs().max()))
        return self.objective(inputs, denominators)


@pytest.mark.parametrize("use_reference", [True, False])
def test_a_reference_that_the_loss_does_not_need_is_not_run(objective: PolicyObjective, use_reference: bool) -> None:
    reference = make_model("qwen2", seed=1)
    policy = PolicyTrainer(make_model("qwen2"), OptimizerSettings(lr=1e-2), reference=reference)
    calls: list[None] = []
    reference.model.register_forward_pre_hook(lambda *_: calls.append(None))
    update_policy(policy, [batch()], objective, use_reference=use_reference)
    assert len(calls) == (3 if use_reference else 0)


def test_one_update_of_a_batch_needs_no_forward_for_old_logprobs(objective: PolicyObjective) -> None:
    policy = trainer()
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    policy._model.model.register_forward_pre_hook(count)
    recorder = Recorder(objective)
    one = batch()
    result = update_policy(policy, [one], recorder)
    assert calls == len(one.micro_batches[0]) == len(recorder.distances) == 3
    assert recorder.distances == [0.0] * 3
    assert result.version == policy.version == 1
    assert result.metrics["policy/ratio_mean"] == 1.0
    assert result.metrics["policy/clip_frac"] == 0.0


def test_old_logprobs_are_those_before_the_first_update(objective: PolicyObjective) -> None:
    policy, recorder = trainer(), Recorder(objective)
    batches = [batch(0), batch(1)]
    before = [policy.forward(b) for b in batches]
    old: list[list[float]] = []

    def check(inputs: LossInputs, denominators: Denominators) -> MicroBatchLoss:
        old.append(inputs.old_logprobs.tolist())
        return recorder(inputs, denominators)

    result = update_policy(policy, batches, check, num_epochs=2)
    assert old == 2 * [logprobs.tolist() for b in before for logprobs in b]
    assert max(recorder.distances[:3]) < 1e-5 < min(recorder.distances[3:])
    assert result.version == 4


def test_an_update_reports_what_it_did(objective: PolicyObjective) -> None:
    metrics = update_policy(trainer(), [batch(0), batch(1)], objective).metrics
    averages = {"loss", "ratio_mean", "clip_frac", "approx_kl", "entropy", "grad_norm", "lr"}
    ratios = {"importance_ratio_mean", "importance_ratio_max"}
    distances = {f"rollout_logprob_abs_diff_{name}" for name in ("mean", "p99", "max")}
    assert set(metrics) == {f"policy/{name}" for name in averages | distances | ratios}
    assert all(math.isfinite(value) for value in metrics.values())
    assert 0 < metrics["policy/entropy"] < math.log(300)


def test_the_reference_is_evaluated_where_there_is_one(
    samples: Sequence[TrainingSample], objective_with_kl: PolicyObjective
) -> None:
    policy = PolicyTrainer(make_model("qwen2"), OptimizerSettings(lr=1e-2), reference=make_model("qwen2", seed=1))
    assert update_policy(policy, [batch()], objective_with_kl).metrics["policy/ref_kl"] > 0.01
    with pytest.raises(ValueError, match="no reference log-probabilities"):
        update_policy(trainer(), [batch()], objective_with_kl)


def test_training_raises_the_likelihood_of_rewarded_answers(objective: PolicyObjective) -> None:
    """Ten updates on one batch: tokens with a positive advantage get likelier, those with a negative one rarer."""
    policy, one = trainer(), batch()
    gain = [(m.advantages, now) for m, now in zip(one.micro_batches[0], policy.forward(one), strict=True)]
    update_policy(policy, [one], objective, num_epochs=10)
    after = policy.forward(one)
    moved = sum(float((a * (new - old)).sum()) for (a, old), new in zip(gain, after, strict=True))
    assert moved > 1.0
