"""Estimators of KL(policy || reference) from log-probabilities of sampled tokens, with gradients.

Schulman, "Approximating KL Divergence" (joschu.net/blog/kl-approx.html), with log r = ref - policy:
    k1 = -log r          k2 = (log r)^2 / 2          k3 = r - 1 - log r          abs = |log r|
The value of k1 and k3 is unbiased. As a loss on sampled tokens it is the gradient that counts: that of k2 is unbiased
for the reverse KL, that of k1 is 0 on average.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

MAX_LOG_RATIO = 20.0
"""Bound on log r inside exp: e^20 is far outside any trust region, and float32 ends at e^88."""


def k1(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """Unbiased, high variance, may be negative."""
    return logprobs - ref_logprobs


def k2(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """Biased in value, unbiased in gradient."""
    return 0.5 * (logprobs - ref_logprobs).square()


def k3(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """Unbiased, never negative; GRPO's (arXiv:2402.03300, equation 4)."""
    log_ratio = (ref_logprobs - logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.expm1(log_ratio) - log_ratio


def absolute(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """The distance between the two log-probabilities."""
    return (logprobs - ref_logprobs).abs()


KL_ESTIMATORS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "k1": k1,
    "k2": k2,
    "k3": k3,
    "abs": absolute,
}
