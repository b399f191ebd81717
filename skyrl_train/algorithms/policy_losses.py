"""Policy losses per token. Pure tensor functions; add one as a function and a line in `POLICY_LOSSES`.

A loss takes a `LossInputs` and the options that it names, and returns a `TokenLosses`: values to minimise, not yet
reduced. Shapes: N loss tokens of one micro-batch; a sample is never cut in two, so sequence losses see whole ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, kw_only=True, eq=False)
class LossInputs:
    """What is known of a micro-batch's loss tokens. `logprobs` and `entropy` carry gradients, the others don't.

    `old_logprobs` are the trainer's before the update, `rollout_logprobs` the engine's.
    """

    logprobs: torch.Tensor  # [N]
    entropy: torch.Tensor  # [N]
    old_logprobs: torch.Tensor  # [N]
    rollout_logprobs: torch.Tensor  # [N]
    ref_logprobs: torch.Tensor | None  # [N]
    advantages: torch.Tensor  # [N]
    sample_index: torch.Tensor  # [N] int64, rising


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenLosses:
    """`values` [N] to minimise; `metrics`: name -> [N], averaged over the mini-batch's tokens."""

    values: torch.Tensor
    metrics: Mapping[str, torch.Tensor] = field(default_factory=dict)


def ppo_clip(inputs: LossInputs, *, eps_clip_low: float = 0.2, eps_clip_high: float = 0.2) -> TokenLosses:
    """-min(r A, clip(r, 1 - low, 1 + high) A), r = exp(logprobs - old_logprobs).

    PPO (arXiv:1707.06347), equation 7; the two bounds of DAPO (arXiv:2503.14476), equation 10.
    """
    ratio = torch.exp(inputs.logprobs - inputs.old_logprobs)
    free = -ratio * inputs.advantages
    clipped = -ratio.clamp(1 - eps_clip_low, 1 + eps_clip_high) * inputs.advantages
    return TokenLosses(
        values=torch.maximum(free, clipped),
        metrics={"ratio_mean": ratio.detach(), "clip_frac": (clipped > free).float()},
    )


def dual_clip(
    inputs: LossInputs, *, eps_clip_low: float = 0.2, eps_clip_high: float = 0.2, clip_ratio_c: float = 3.0
) -> TokenLosses:
    """PPO clip, and for A < 0 never more than -c A: one wild ratio can't own the gradient.

    Ye et al., "Mastering Complex Control in MOBA Games" (arXiv:1912.09729), equation 5.
    """
    clip = ppo_clip(inputs, eps_clip_low=eps_clip_low, eps_clip_high=eps_clip_high)
    bound = -clip_ratio_c * inputs.advantages
    bounded = (inputs.advantages < 0) & (clip.values > bound)
    return TokenLosses(
        values=torch.where(bounded, bound, clip.values),
        metrics={**clip.metrics, "dual_clip_frac": bounded.float()},
    )


POLICY_LOSSES: dict[str, Callable[..., TokenLosses]] = {"regular": ppo_clip, "dual_clip": dual_clip}
