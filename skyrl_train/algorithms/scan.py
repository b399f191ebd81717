"""A linear recursion from the last token of each trajectory to its first, all trajectories at once."""

from __future__ import annotations

import numpy as np
import torch


def scan_backwards(values: torch.Tensor, trajectory_index: torch.Tensor, decay: float) -> torch.Tensor:
    """y_t = x_t + decay * y_{t+1} within each trajectory, starting anew in the next: [T] -> [T] float64.

    Tokens are laid out by their distance to the end, longest trajectory first, so that those which have a successor
    are always the first ones of a run and a step is one operation on slices, without padding:

        values  a b c | d e          runs  c e | b d | a          y_a = a + decay * y_b
    """
    if len(values) == 0:
        return values.double()
    _, lengths = np.unique(trajectory_index.numpy(), return_counts=True)
    ends = np.cumsum(lengths)
    from_end = np.repeat(ends, lengths) - 1 - np.arange(len(values))
    # Stable: among trajectories of one length the first comes first.
    order = np.lexsort((-np.repeat(lengths, lengths), from_end))
    bounds = np.concatenate([[0], np.cumsum(np.bincount(from_end))])
    laid_out = values.double().numpy()[order]
    for before, start, end in zip(bounds[:-2], bounds[1:-1], bounds[2:], strict=True):
        laid_out[start:end] += decay * laid_out[before : before + (end - start)]
    result = np.empty_like(laid_out)
    result[order] = laid_out
    return torch.from_numpy(result)
