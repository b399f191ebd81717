"""Paged attention: one step's rows attend to tokens that lie anywhere in the pool.

A backend writes the rows' keys and values into their slots, all of them, before any row attends: rows of one step
may look at each other through the cache (see scheduler). Row t of request r at position p attends to the slots of
r at positions [max(0, p - window + 1), p].

Shapes: T rows, R requests in the step, S seats, C positions, Hq query heads, Hkv key/value heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from skyrl_train.engines.embedded.config import KVShape
from skyrl_train.engines.embedded.kv_pool import KVPool


@dataclass(frozen=True, kw_only=True)
class PagedBatch:
    """The rows of one step. A request's rows are consecutive, in the order of their positions.

    Two requests: seat 4 decodes at position 7, seat 0 computes its prompt's positions 2 to 4:
        row_slots 31 | 12 13 14     row_positions 7 | 2 3 4     row_seats 4 | 0 0 0
        cu_rows 0 1 4               request_seats 4 0
    """

    row_slots: torch.Tensor  # [T] int64: where this row's key and value go
    row_positions: torch.Tensor  # [T] int64
    row_seats: torch.Tensor  # [T] int32
    request_seats: list[int]  # [R]
    cu_rows: list[int]  # [R + 1]
    slot_table: torch.Tensor  # [S, C] int32: slot of each position of each seat


class AttentionBackend(Protocol):
    """Computes one layer's attention for one step."""

    name: str

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
        """pools [num_slots, Hkv, D], query [T, Hq, D], key and value [T, Hkv, D] -> [T, Hq, D]."""
        ...


class PagedContext:
    """The engine's AttentionContext for one forward pass."""

    def __init__(self, backend: AttentionBackend, pool: KVPool, batch: PagedBatch) -> None:
        self._backend = backend
        self._pool = pool
        self._batch = batch

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
        keys, values = self._pool.keys[layer_idx], self._pool.values[layer_idx]
        return self._backend.attend(self._batch, keys, values, query, key, value, scaling, sliding_window)


class ShapeProbe:
    """An AttentionContext that computes nothing and notes what each layer would cache."""

    def __init__(self) -> None:
        self.layers: dict[int, KVShape] = {}

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
        if key.shape != value.shape or query.shape[-1] != key.shape[-1] or query.shape[1] % key.shape[1]:
            raise NotImplementedError(
                f"layer {layer_idx} has queries {tuple(query.shape)}, keys {tuple(key.shape)}, values "
                f"{tuple(value.shape)}: the KV pool wants one head size and query heads in equal groups"
            )
        if layer_idx in self.layers:
            raise NotImplementedError(f"two attention layers share the index {layer_idx}")
        self.layers[layer_idx] = KVShape(
            num_heads=query.shape[1], num_kv_heads=key.shape[1], head_dim=key.shape[2], dtype=key.dtype
        )
        return query.new_zeros(query.shape)
