"""Sampling whose token and log-probability depend on the row alone, and on how many threads there are not at all.

Shapes: n rows, V words.
"""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt
import torch

from skyrl_train.engines.embedded.invariant.kernels import invariant_kernels
from skyrl_train.engines.embedded.sampler import (
    FEW_CANDIDATES,
    Doubles,
    Floats,
    Indices,
    NativePick,
    Picked,
    Sampler,
)
from skyrl_train.engines.embedded.sampling_table import SamplingTable


class InvariantSampler(Sampler):
    def __init__(self, native: ctypes.CDLL) -> None:
        super().__init__(native)
        self._pick = InvariantPick(native)
        self._truncate = truncated


class InvariantPick:
    """Tokens by native/sampling.c, which looks at one row at a time; log-probabilities by the trainer's kernel."""

    def __init__(self, native: ctypes.CDLL) -> None:
        self._tokens = NativePick(native)

    def __call__(self, draw: torch.Tensor, score: torch.Tensor, temperature: Floats, uniform: Doubles) -> Picked:
        tokens, _ = self._tokens(draw, score, temperature, uniform)
        inverse = np.float32(1) / np.where(temperature == 0, np.float32(1), temperature)
        score = score if score.stride(1) == 1 else score.contiguous()
        logprobs, _ = invariant_kernels().logprobs(score, torch.from_numpy(inverse), torch.from_numpy(tokens))
        return tokens, logprobs.numpy()


def truncated(logits: torch.Tensor, table: SamplingTable, chosen: Indices) -> torch.Tensor:
    """As `sampler.truncated`, one row at a time: -inf where top-k, then top-p, then min-p drop a token."""
    result = logits.clone()
    for row in np.nonzero(table.truncates[chosen] & (table.temperature[chosen] > 0))[0]:
        seat = chosen[row]
        dropped = ~kept(
            logits[row].numpy(),
            temperature=float(table.temperature[seat]),
            top_k=int(table.top_k[seat]),
            top_p=float(table.top_p[seat]),
            min_p=float(table.min_p[seat]),
        )
        result[row, torch.from_numpy(dropped)] = -torch.inf
    return result


def kept(
    logits: npt.NDArray[np.float32], *, temperature: float, top_k: int, top_p: float, min_p: float
) -> npt.NDArray[np.bool_]:
    """Which words [V] stay, seen by sorting a few of them, or all where that is not enough."""
    vocab = len(logits)
    for width in (FEW_CANDIDATES, vocab) if vocab > 4 * FEW_CANDIDATES else (vocab,):
        candidates = np.arange(vocab)
        if width < vocab:
            candidates = np.sort(np.argpartition(-logits, width)[:width])
        order = candidates[np.argsort(-logits[candidates], kind="stable")]  # equal logits rank by id
        ordered = logits[order]
        weights = np.exp((ordered - ordered[0]).astype(np.float64) / temperature)
        keep = np.ones(width, dtype=bool)
        if top_k:
            keep[top_k:] = False
            weights = weights * keep
        if top_k or top_p >= 1 or width == vocab:
            total = weights.sum()
        else:
            total = np.exp((logits - ordered[0]).astype(np.float64) / temperature).sum()
        if top_p < 1:
            keep &= np.cumsum(weights) - weights < top_p * total
        keep &= weights >= min_p
        keep[0] = True
        # Enough: the last word that stays is more likely than all that were not looked at.
        if width == vocab or (ordered[np.nonzero(keep)[0][-1]] > ordered[-1] and top_k < width):
            break
    result = np.zeros(vocab, dtype=bool)
    result[order[keep]] = True
    return result
