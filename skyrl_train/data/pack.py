"""Sequence packing: many samples in one row, a shared prompt computed once.

(The packing functions follow; `MicroBatch` is the contract between data, algorithms and trainer.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from skyrl_train.types import TrajectoryId


@dataclass(frozen=True, kw_only=True, eq=False)
class MicroBatch:
    """One packed row of tokens and the predictions to train in it.

    T rows (packed tokens), S segments, K key rows, N loss tokens, B samples. Integers are int64.

    A segment is a run of rows [cu_seqlens_q[s], cu_seqlens_q[s + 1]) that attends to the rows
    kv_rows[cu_seqlens_k[s] : cu_seqlens_k[s + 1]]: its ancestors first, itself last, causal and aligned at
    the end. A prompt shared by a group is one segment; each answer is a segment whose keys are prompt + itself.

    Two answers "ab" and "c" to the prompt "xyz":
        token_ids      x y z a b c          position_ids   0 1 2 3 4 3
        cu_seqlens_q   0 3 5 6
        kv_rows        0 1 2 | 0 1 2 3 4 | 0 1 2 5         cu_seqlens_k   0 3 8 12
        predict_rows   2 3 2                target_ids     a b c          sample_index   0 0 1
    The row of z predicts both a and c: predictions are pairs of a row and a target, not a shift by one.
    """

    token_ids: torch.Tensor  # [T]
    position_ids: torch.Tensor  # [T]
    cu_seqlens_q: torch.Tensor  # [S + 1]
    kv_rows: torch.Tensor  # [K]
    cu_seqlens_k: torch.Tensor  # [S + 1]
    predict_rows: torch.Tensor  # [N] row in [0, T) whose logits predict the target
    target_ids: torch.Tensor  # [N]
    sample_index: torch.Tensor  # [N] sample in [0, B)
    rollout_logprobs: torch.Tensor  # [N] float32
    advantages: torch.Tensor  # [N] float32
    trajectory_ids: tuple[TrajectoryId, ...]  # [B]
