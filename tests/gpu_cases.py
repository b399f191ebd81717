"""Slow definitions that kernels are compared with, on a GPU and under the interpreter."""

from __future__ import annotations

import torch


def slow_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    row_request: torch.Tensor,
    row_position: torch.Tensor,
    scaling: float,
    window: int | None,
) -> torch.Tensor:
    """One row at a time, float64."""
    group = query.shape[1] // keys.shape[1]
    out = torch.empty_like(query, dtype=torch.float64)
    for t in range(len(query)):
        position = int(row_position[t])
        start = max(0, position - window + 1) if window else 0
        slot = slots[int(row_request[t]), start : position + 1].long()
        k = keys[slot].double().repeat_interleave(group, 1)
        v = values[slot].double().repeat_interleave(group, 1)
        weights = torch.softmax(torch.einsum("hd,lhd->hl", query[t].double(), k) * scaling, -1)
        out[t] = torch.einsum("hl,lhd->hd", weights, v)
    return out
