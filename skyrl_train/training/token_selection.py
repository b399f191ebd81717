"""Runs a loss's selection over a whole mini-batch, in an order that no packing moves.

micro-batches  [q r] [p]  ->  p q r  ->  select  ->  marks of [q r] and of [p]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from skyrl_train.data.pack import MicroBatch
from skyrl_train.types import TrajectoryId


def canonical_order(micro_batches: Sequence[MicroBatch]) -> torch.Tensor:
    """[T]: where each token in canonical order stands in the micro-batches' tokens, one after the other.

    Sequences of one trajectory stay in the order in which they were made.

        trajectories q r | p      tokens 2 1 | 2      order: those of p, then of q, then of r: 3 4 0 1 2
    """
    samples: list[tuple[TrajectoryId, int, int, int]] = []
    start = 0
    for micro_batch in micro_batches:
        counts = torch.bincount(micro_batch.sample_index, minlength=len(micro_batch.trajectory_ids)).tolist()
        at = 0
        for trajectory_id, count in zip(micro_batch.trajectory_ids, counts, strict=True):
            if count:
                samples.append((trajectory_id, int(micro_batch.token_index[at]), start + at, count))
            at += count
        start += at
    runs = [torch.arange(first, first + count) for _, _, first, count in sorted(samples)]
    return torch.cat(runs) if runs else torch.zeros(0, dtype=torch.int64)


def select_tokens(
    select: Callable[..., torch.Tensor],
    micro_batches: Sequence[MicroBatch],
    logprobs: Sequence[torch.Tensor],
    *,
    seed: int,
) -> list[torch.Tensor]:
    """`select` on the whole mini-batch: [N] bool for each micro-batch. `logprobs` are its tokens', in its order."""
    order = canonical_order(micro_batches)
    known = [m.advantages for m in micro_batches if m.advantages is not None]
    if len(known) < len(micro_batches):
        raise ValueError("these sequences have no advantages yet: nothing can be selected by them")
    advantages = torch.cat(known)
    chosen = select(torch.cat(list(logprobs)).cpu()[order], advantages[order], seed=seed)
    in_place = torch.zeros(len(order), dtype=torch.bool)
    in_place[order] = chosen
    return list(torch.split(in_place, [len(m.sample_index) for m in micro_batches]))
