"""The whole objective of a policy update: policy loss, KL to the reference, entropy bonus, one reduction.

loss = reduce(weights * policy + kl_loss_coef * kl(policy || reference) - entropy_loss_coef * entropy)
The weights are the off-policy corrections', 1 where there are none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from skyrl_train.algorithms.off_policy import Corrections
from skyrl_train.algorithms.policy_losses import LossInputs, TokenLosses
from skyrl_train.algorithms.reductions import Denominators


@dataclass(frozen=True, kw_only=True, eq=False)
class MicroBatchLoss:
    """`loss` is this micro-batch's share of the mini-batch's; `token_metrics`: name -> [N], without gradients."""

    loss: torch.Tensor
    token_metrics: Mapping[str, torch.Tensor]


LossFn = Callable[[LossInputs, Denominators], MicroBatchLoss]
"""What `PolicyTrainer.forward_backward` takes."""


NO_CORRECTIONS = Corrections()


@dataclass(frozen=True, kw_only=True)
class PolicyObjective:
    """A LossFn. `reduction`, `policy_loss` and `select` have their options bound; a KL coefficient needs `kl`.

    `kl_loss_coef` may be a function, such as a KlController: it is asked at every micro-batch and must not change
    within an update. With `select` (see `selections`) the trainer hands `LossInputs.selected` to the policy loss.
    """

    policy_loss: Callable[[LossInputs], TokenLosses]
    reduction: Callable[[torch.Tensor, torch.Tensor, Denominators], torch.Tensor]
    kl: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    kl_loss_coef: float | Callable[[], float] = 0.0
    entropy_loss_coef: float = 0.0
    select: Callable[..., torch.Tensor] | None = None
    corrections: Corrections = NO_CORRECTIONS

    def __post_init__(self) -> None:
        if self.kl_loss_coef and self.kl is None:
            raise ValueError(f"kl_loss_coef {self.kl_loss_coef} needs a KL estimator")

    def __call__(self, inputs: LossInputs, denominators: Denominators) -> MicroBatchLoss:
        token_losses = self.policy_loss(inputs)
        values = token_losses.values
        metrics = dict(token_losses.metrics)
        log_ratio = (inputs.logprobs - inputs.old_logprobs).detach()
        metrics["approx_kl"] = torch.expm1(log_ratio) - log_ratio
        metrics["entropy"] = inputs.entropy.detach()
        if self.corrections.any:
            weights = self.corrections(inputs.old_logprobs, inputs.rollout_logprobs, inputs.sample_index)
            values = weights.values * values
            metrics |= weights.token_metrics
            if weights.masked_samples is not None:
                metrics["masked_sample_frac"] = _as_sample_mean(weights.masked_samples, inputs, denominators)
        if self.kl is not None:
            if inputs.ref_logprobs is None:
                raise ValueError("the objective has a KL term, but no reference log-probabilities were given")
            kl = self.kl(inputs.logprobs, inputs.ref_logprobs)
            metrics["ref_kl"] = kl.detach()
            coefficient = self.kl_loss_coef() if callable(self.kl_loss_coef) else self.kl_loss_coef
            if coefficient:
                values = values + coefficient * kl
        if self.entropy_loss_coef:
            values = values - self.entropy_loss_coef * inputs.entropy
        return MicroBatchLoss(
            loss=self.reduction(values, inputs.sample_index, denominators),
            token_metrics=metrics,
        )


def _as_sample_mean(per_sample: torch.Tensor, inputs: LossInputs, denominators: Denominators) -> torch.Tensor:
    """[B] -> [N] whose mean over the mini-batch's tokens is the mean over its samples."""
    lengths = torch.bincount(inputs.sample_index, minlength=len(per_sample))[inputs.sample_index]
    share = per_sample[inputs.sample_index].to(inputs.logprobs.dtype) / lengths
    return share * (denominators.num_loss_tokens / denominators.num_samples)
