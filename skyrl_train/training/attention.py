"""The trainer's attention: each packed segment looks at its ancestors and, causally, at itself.

`packed_attention` plans once per micro-batch; the plan serves every layer and both passes.

    reference   one [T, T] mask: the definition, slow, the judge in tests
    blocks      segments gathered into a few padded batches for scaled_dot_product_attention; any device, any dtype
    varlen      flash attention over cu_seqlens: CUDA, half precision

Shapes: T rows, S segments, K key rows, Hq / Hkv heads, D head size.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from skyrl_train.attention import AttentionContext
from skyrl_train.data.pack import MicroBatch
from skyrl_train.training.attention_blocks import BlockAttention
from skyrl_train.training.attention_varlen import VarlenAttention, varlen_is_available

Backend = Literal["auto", "reference", "blocks", "varlen"]


def packed_attention(
    micro_batch: MicroBatch, *, device: torch.device, dtype: torch.dtype, backend: Backend = "auto"
) -> AttentionContext:
    """The attention of one packed row, differentiable. Valid for that micro-batch only."""
    if backend == "auto":
        backend = "varlen" if varlen_is_available(device, dtype) else "blocks"
    if backend == "reference":
        return ReferenceAttention(micro_batch, device=device)
    if backend == "varlen":
        return VarlenAttention(micro_batch, device=device)
    return BlockAttention(micro_batch, device=device)


class ReferenceAttention:
    """Every row against every row under an explicit mask: what the other backends must equal."""

    def __init__(self, micro_batch: MicroBatch, *, device: torch.device) -> None:
        num_rows = len(micro_batch.token_ids)
        # distance[i, j]: how many tokens row i lies behind row j on its own path; -1 where it may not look.
        distance = torch.full((num_rows, num_rows), -1)
        q_bounds, k_bounds = micro_batch.cu_seqlens_q.tolist(), micro_batch.cu_seqlens_k.tolist()
        for s in range(len(q_bounds) - 1):
            keys = micro_batch.kv_rows[k_bounds[s] : k_bounds[s + 1]]
            num_before = len(keys) - (q_bounds[s + 1] - q_bounds[s])
            for offset, row in enumerate(range(q_bounds[s], q_bounds[s + 1])):
                visible = keys[: num_before + offset + 1]
                distance[row, visible] = torch.arange(len(visible) - 1, -1, -1)
        self._distance = distance.to(device)

    def attend(
        self,
        layer_idx: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float,
        sliding_window: int | None,
    ) -> torch.Tensor:
        visible = self._distance >= 0
        if sliding_window is not None:
            visible &= self._distance < sliding_window
        out = F.scaled_dot_product_attention(
            query.transpose(0, 1).unsqueeze(0),
            key.transpose(0, 1).unsqueeze(0),
            value.transpose(0, 1).unsqueeze(0),
            attn_mask=visible,
            scale=scaling,
            enable_gqa=True,
        )
        return out[0].transpose(0, 1)
