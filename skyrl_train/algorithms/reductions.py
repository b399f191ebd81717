"""Per-token losses to one number, by the whole mini-batch's denominators.

A micro-batch returns its share: shares add up to the mini-batch's loss however it was cut.
Shapes: N loss tokens of a micro-batch, B samples in it; a sample is never cut in two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Denominators:
    """Of the whole mini-batch, all ranks and micro-batches."""

    num_loss_tokens: int
    num_samples: int


def token_mean(values: torch.Tensor, sample_index: torch.Tensor, denominators: Denominators) -> torch.Tensor:
    """Every token weighs the same: sum / tokens. DAPO (arXiv:2503.14476), equation 8."""
    return values.sum() / denominators.num_loss_tokens


def sequence_mean(values: torch.Tensor, sample_index: torch.Tensor, denominators: Denominators) -> torch.Tensor:
    """Every sample weighs the same: the mean over samples of their token means. DeepSeekMath, equation 3."""
    lengths = torch.bincount(sample_index).to(values.dtype)
    return (values / lengths[sample_index]).sum() / denominators.num_samples


def seq_mean_token_sum_norm(
    values: torch.Tensor, sample_index: torch.Tensor, denominators: Denominators, *, max_seq_len: int
) -> torch.Tensor:
    """Token sums over a constant: sum / (samples * max_seq_len). Dr. GRPO (arXiv:2503.20783), appendix A."""
    return values.sum() / (denominators.num_samples * max_seq_len)


def sum_per_sample(values: torch.Tensor, sample_index: torch.Tensor) -> torch.Tensor:
    """[N] -> [B]: 1 2 6 | 4 -> 9 4, for sample_index 0 0 0 1."""
    num_samples = int(sample_index[-1]) + 1 if len(sample_index) else 0
    return values.new_zeros(num_samples).index_add(0, sample_index, values)


def mean_per_sample(values: torch.Tensor, sample_index: torch.Tensor) -> torch.Tensor:
    """[N] -> [B]: 1 2 6 | 4 -> 3 4, for sample_index 0 0 0 1."""
    sums = sum_per_sample(values, sample_index)
    return sums / torch.bincount(sample_index, minlength=len(sums)).clamp_min(1).to(sums.dtype)


LOSS_REDUCTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "token_mean": token_mean,
    "sequence_mean": sequence_mean,
    "seq_mean_token_sum_norm": seq_mean_token_sum_norm,
}
