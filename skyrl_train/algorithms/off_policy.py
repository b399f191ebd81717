"""The engine sampled from a distribution that isn't quite the trainer's: weights and masks for the policy loss.

    rollout_logprobs    old_logprobs           logprobs
    engine, when     ─► trainer, before     ─► trainer, now
    it sampled          the update
             └ corrected here ┘   └ the policy loss's ratio ┘

The two ratios multiply: a loss that is itself an importance weight (importance_sampling) is not corrected twice.
Weights are constants, and they are the policy loss's alone: KL and entropy are taken where the tokens are.
A masked token or sample has weight 0 and counts in the denominator all the same. So a mask can only take gradient
away; over what is left, the mean would blow the rest up, and it would differ with how a batch is cut.

Shapes: N loss tokens of a micro-batch, B samples in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from skyrl_train.algorithms.kl import MAX_LOG_RATIO
from skyrl_train.algorithms.reductions import mean_per_sample, sum_per_sample

SequenceMask = Literal["geometric", "product"]


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenWeights:
    """`values` [N] for the policy loss; `masked_samples` [B] bool where masks are on; `token_metrics`: name -> [N]."""

    values: torch.Tensor
    token_metrics: Mapping[str, torch.Tensor]
    masked_samples: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Corrections:
    """Which corrections are on, and their bounds. None is off.

    tis_cap: a token weighs min(w, cap) with w = exp(old_logprobs - rollout_logprobs): V-trace's truncation
        (IMPALA, arXiv:1802.01561, equation 1), here against the engine's numerics (Yao et al. 2025, "Your Efficient RL
        Framework Secretly Brings You Off-Policy RL Training").
    sequence_mask: a sample's ratio is the geometric mean of its w, or their product, which is its true importance
        ratio and grows with its length. Outside [low, high] the sample has weight 0 (Liu et al. 2025, "When Speed Kills
        Stability: Demystifying RL Collapse from the Training-Inference Mismatch").
    token_veto_below: one w under this, and the sample has weight 0: a token that the trainer could hardly have drawn
        is a sign of a broken sample, and a mean over many tokens hides it.
    """

    tis_cap: float | None = None
    sequence_mask: SequenceMask | None = None
    sequence_mask_low: float = 0.5
    sequence_mask_high: float = 2.0
    token_veto_below: float | None = None

    @property
    def masks(self) -> bool:
        return self.sequence_mask is not None or self.token_veto_below is not None

    @property
    def any(self) -> bool:
        return self.tis_cap is not None or self.masks

    def __call__(
        self, old_logprobs: torch.Tensor, rollout_logprobs: torch.Tensor, sample_index: torch.Tensor
    ) -> TokenWeights:
        """Two samples, tokens with w = 1 4 | 1, cap 2, product in [0.5, 2]: weights 0 0 1, masked true false."""
        log_ratio = old_logprobs.detach() - rollout_logprobs
        ratio = importance_ratio(old_logprobs, rollout_logprobs)
        weights = torch.ones_like(ratio)
        metrics: dict[str, torch.Tensor] = {}
        if self.tis_cap is not None:
            weights = ratio.clamp_max(self.tis_cap)
            metrics["tis_truncated_frac"] = (ratio > self.tis_cap).float()
        if not self.masks:
            return TokenWeights(values=weights, token_metrics=metrics)
        masked = torch.zeros_like(sum_per_sample(log_ratio, sample_index), dtype=torch.bool)
        if self.sequence_mask is not None:
            over = mean_per_sample if self.sequence_mask == "geometric" else sum_per_sample
            sequence_ratio = torch.exp(over(log_ratio, sample_index))
            # Also true for a NaN: what can't be compared is not trained on.
            masked = ~((sequence_ratio >= self.sequence_mask_low) & (sequence_ratio <= self.sequence_mask_high))
        if self.token_veto_below is not None:
            masked = masked | (sum_per_sample((~(ratio >= self.token_veto_below)).to(ratio.dtype), sample_index) > 0)
        metrics["masked_token_frac"] = masked[sample_index].float()
        return TokenWeights(
            values=torch.where(masked[sample_index], 0.0, weights), masked_samples=masked, token_metrics=metrics
        )


def importance_ratio(old_logprobs: torch.Tensor, rollout_logprobs: torch.Tensor) -> torch.Tensor:
    """exp(old - rollout) [N], a constant; the exponent is bounded at +-20 so that it stays finite."""
    return torch.exp((old_logprobs.detach() - rollout_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))
