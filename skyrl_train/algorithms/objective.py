"""The whole objective of a policy update: policy loss, KL to the reference, entropy bonus, one reduction.

loss = reduce(policy + kl_loss_coef * kl(policy || reference) - entropy_loss_coef * entropy)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from skyrl_train.algorithms.policy_losses import LossInputs, TokenLosses
from skyrl_train.algorithms.reductions import Denominators


@dataclass(frozen=True, kw_only=True, eq=False)
class MicroBatchLoss:
    """`loss` is this micro-batch's share of the mini-batch's; `token_metrics`: name -> [N], without gradients."""

    loss: torch.Tensor
    token_metrics: Mapping[str, torch.Tensor]


LossFn = Callable[[LossInputs, Denominators], MicroBatchLoss]
"""What `PolicyTrainer.forward_backward` takes."""


@dataclass(frozen=True, kw_only=True)
class PolicyObjective:
    """A LossFn. `reduction` and `policy_loss` come with their options bound; `kl` is needed for a KL coefficient."""

    policy_loss: Callable[[LossInputs], TokenLosses]
    reduction: Callable[[torch.Tensor, torch.Tensor, Denominators], torch.Tensor]
    kl: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    kl_loss_coef: float = 0.0
    entropy_loss_coef: float = 0.0

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
        if self.kl is not None:
            if inputs.ref_logprobs is None:
                raise ValueError("the objective has a KL term, but no reference log-probabilities were given")
            kl = self.kl(inputs.logprobs, inputs.ref_logprobs)
            metrics["ref_kl"] = kl.detach()
            if self.kl_loss_coef:
                values = values + self.kl_loss_coef * kl
        if self.entropy_loss_coef:
            values = values - self.entropy_loss_coef * inputs.entropy
        return MicroBatchLoss(
            loss=self.reduction(values, inputs.sample_index, denominators),
            token_metrics=metrics,
        )
