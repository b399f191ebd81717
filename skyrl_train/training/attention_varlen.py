"""Packed attention by flash attention's variable-length kernel: CUDA, half precision.

Queries and keys of segment s are rows [cu_seqlens[s], cu_seqlens[s + 1]) of two tensors of different length; flash
attention aligns its causal mask at the bottom right, which is what "ancestors first, itself last" needs:

    2 queries, 5 keys      1 1 1 1 0
                           1 1 1 1 1
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch

from skyrl_train.data.pack import MicroBatch


@cache
def varlen_is_available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch has the kernel for this device and dtype, with a scale and a window (torch >= 2.11)."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    try:
        return {"scale", "window_size"} <= _parameters()
    except ImportError:
        return False


@cache
def _grouped_queries() -> dict[str, Any]:
    """Fewer key than query heads: newer torch asks for a flag, older just computes it."""
    return {"enable_gqa": True} if "enable_gqa" in _parameters() else {}


def _parameters() -> frozenset[str]:
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


class VarlenAttention:
    """AttentionContext over cu_seqlens."""

    def __init__(self, micro_batch: MicroBatch, *, device: torch.device) -> None:
        self._cu_q = micro_batch.cu_seqlens_q.to(device, torch.int32)
        self._cu_k = micro_batch.cu_seqlens_k.to(device, torch.int32)
        self._max_q = int(micro_batch.cu_seqlens_q.diff().max())
        self._max_k = int(micro_batch.cu_seqlens_k.diff().max())
        num_rows = len(micro_batch.token_ids)
        shared = len(micro_batch.kv_rows) != num_rows
        self._kv_rows = micro_batch.kv_rows.to(device) if shared else None

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
        from torch.nn.attention.varlen import varlen_attn

        if self._kv_rows is not None:
            key, value = (_TakeRows.apply(x, self._kv_rows) for x in (key, value))  # type: ignore[no-untyped-call]
        window = self._max_k if sliding_window is None else sliding_window
        out = varlen_attn(
            query.contiguous(),
            key.contiguous(),
            value.contiguous(),
            self._cu_q,
            self._cu_k,
            self._max_q,
            self._max_k,
            scale=scaling,
            window_size=(-1 if window >= self._max_k else window - 1, 0),
            **_grouped_queries(),
        )
        assert isinstance(out, torch.Tensor)  # a pair only when auxiliary results are asked for
        return out


class _TakeRows(torch.autograd.Function):
    """rows [T, H, D] at index [K]. A shared prompt's row collects one gradient for each answer: summed in float32,
    where bfloat16 would round after every one."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(index)
        ctx.shape, ctx.dtype = rows.shape, rows.dtype
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[torch.Tensor, None]:
        (index,) = ctx.saved_tensors
        total = torch.zeros(ctx.shape, dtype=torch.float32, device=index.device)
        return total.index_add_(0, index, grads[0].float()).to(ctx.dtype), None
