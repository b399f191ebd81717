"""One batch's policy update: epochs over mini-batches, and whose log-probabilities are the old ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from skyrl_train.algorithms.objective import LossFn
from skyrl_train.training.mismatch import MismatchWatch
from skyrl_train.training.trainer import PolicyTrainer
from skyrl_train.types import TrainBatch

ROLLOUT_DIFF_MAX = "policy/rollout_logprob_abs_diff_max"


@dataclass(frozen=True, kw_only=True)
class PolicyUpdate:
    """The policy's new version, and `policy/...` metrics: means over the mini-batches' updates."""

    version: int
    metrics: dict[str, float]


def update_policy(
    trainer: PolicyTrainer,
    mini_batches: Sequence[TrainBatch],
    loss_fn: LossFn,
    *,
    num_epochs: int = 1,
    use_reference: bool = True,
    watch: MismatchWatch | None = None,
) -> PolicyUpdate:
    """One optimizer step per mini-batch and epoch.

    Old log-probabilities are those before the first update: with one mini-batch and one epoch that is the forward
    pass of the update itself, otherwise a pass over all mini-batches comes first. Reference ones are computed
    wherever the trainer has a reference, unless `use_reference` says that the loss doesn't look at them.
    With a `watch`, LogprobMismatchError is raised before the first step if a rollout's log-probability is too far off.
    """
    old = None
    if len(mini_batches) * num_epochs > 1:
        old = [trainer.forward(batch) for batch in mini_batches]
        if watch is not None:
            for batch, logprobs in zip(mini_batches, old, strict=True):
                watch.check(trainer, batch, logprobs)
    ref = None
    if use_reference and trainer.has_reference:
        ref = [trainer.forward(batch, which="reference") for batch in mini_batches]
    steps: list[dict[str, float]] = []
    for _ in range(num_epochs):
        for i, batch in enumerate(mini_batches):
            metrics = trainer.forward_backward(
                batch, loss_fn, old_logprobs=old[i] if old else None, ref_logprobs=ref[i] if ref else None
            )
            if watch is not None and old is None and not metrics[ROLLOUT_DIFF_MAX] <= watch.max_diff:
                watch.check(trainer, batch, trainer.forward(batch))
            trainer.optim_step()
            assert trainer.last_step is not None
            steps.append(
                {**metrics, "policy/grad_norm": trainer.last_step.grad_norm, "policy/lr": trainer.last_step.lr}
            )
    mean = {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}
    # The engine's error shows as an extreme; a mean of maxima would hide it again.
    for worst in (ROLLOUT_DIFF_MAX, "policy/importance_ratio_max"):
        mean[worst] = max(step[worst] for step in steps)
    return PolicyUpdate(version=trainer.version, metrics=mean)
