"""Paged attention in plain torch, one request at a time: slow, and the judge of the other backends."""

from __future__ import annotations

import torch

from skyrl_train.engines.embedded.attention import PagedBatch


class ReferenceAttention:
    name = "reference"

    def attend(
        self,
        batch: PagedBatch,
        key_pool: torch.Tensor,
        value_pool: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        window: int | None,
    ) -> torch.Tensor:
        key_pool[batch.row_slots] = key
        value_pool[batch.row_slots] = value
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        group = query.shape[1] // key.shape[1]
        for seat, begin, end in zip(batch.request_seats, batch.cu_rows, batch.cu_rows[1:], strict=False):
            positions = batch.row_positions[begin:end]
            num_keys = int(positions[-1]) + 1
            slots = batch.slot_table[seat, :num_keys].long()
            k = key_pool[slots].float().repeat_interleave(group, dim=1)
            v = value_pool[slots].float().repeat_interleave(group, dim=1)
            scores = torch.einsum("thd,shd->hts", query[begin:end].float(), k) * scaling
            key_positions = torch.arange(num_keys, device=query.device)
            visible = key_positions[None] <= positions[:, None]
            if window is not None:
                visible &= key_positions[None] > positions[:, None] - window
            weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
            out[begin:end] = torch.einsum("hts,shd->thd", weights, v).to(query.dtype)
        return out
