"""Tokens that a loss treats differently, chosen over the whole mini-batch, before its gradient is taken.

Shapes: T loss tokens of the mini-batch in canonical order: by trajectory, then as they were sampled. The trainer puts
them there (training/token_selection.py), so neither packing, nor micro-batches, nor ranks, nor the samples' order move
a choice.
A selection is a function `select(logprobs, advantages, *, seed, **options it names) -> [T] bool` on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def covariance(logprobs: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """(log p - mean) (A - mean) of each token, [T] float64; its mean is the covariance that drives entropy down.

    The Entropy Mechanism (arXiv:2505.22617), equation 10: high where a likely token is rewarded more than others.

        logprobs -1 -3    advantages 1 -1    covariance 1 1
    """
    logprobs, advantages = logprobs.double(), advantages.double()
    return (logprobs - logprobs.mean()) * (advantages - advantages.mean())


def clip_cov_tokens(
    logprobs: torch.Tensor,
    advantages: torch.Tensor,
    *,
    seed: int,
    clip_cov_ratio: float = 0.0002,
    clip_cov_lb: float = 1.0,
    clip_cov_ub: float = 5.0,
) -> torch.Tensor:
    """floor(ratio T) tokens drawn at random from those whose covariance is in [lb, ub]; all of them if there are fewer.

    Equation 11. At least one is drawn, as in the authors' code: a small mini-batch would never be clipped otherwise.
    """
    among = ((value := covariance(logprobs, advantages)) >= clip_cov_lb) & (value <= clip_cov_ub)
    candidates = among.nonzero()[:, 0]
    count = max(int(clip_cov_ratio * len(value)), 1) if clip_cov_ratio else 0
    order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed))
    return _marked(candidates[order[:count]], len(value))


def kl_cov_tokens(
    logprobs: torch.Tensor, advantages: torch.Tensor, *, seed: int, kl_cov_frac: float = 0.2
) -> torch.Tensor:
    """The floor(frac T) tokens of highest covariance, at least one. Equation 13; of equal ones the earlier token."""
    value = covariance(logprobs, advantages)
    count = max(int(kl_cov_frac * len(value)), 1) if kl_cov_frac else 0
    return _marked(value.sort(descending=True, stable=True).indices[:count], len(value))


def _marked(chosen: torch.Tensor, length: int) -> torch.Tensor:
    return torch.zeros(length, dtype=torch.bool).index_fill_(0, chosen, True)


SELECTIONS: dict[str, Callable[..., torch.Tensor]] = {"clip_cov": clip_cov_tokens, "kl_cov": kl_cov_tokens}
"""By the name of the loss that needs it."""
