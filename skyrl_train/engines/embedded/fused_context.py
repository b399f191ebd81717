"""Attention of a FusedDecoder's rows over the paged pool, with the kernels that write there too.

Shapes: T rows, S seats, C positions, Hq query heads, Hkv key/value heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from skyrl_train.engines.embedded.fused_decoder import Norms
from skyrl_train.engines.embedded.kv_pool import KVPool
from skyrl_train.engines.embedded.triton_attention import ragged_paged_attention
from skyrl_train.engines.embedded.triton_elementwise import rotate_and_store
from skyrl_train.engines.embedded.triton_shared_prefix import PrefixTiles, shared_prefix_attention


@dataclass(frozen=True, kw_only=True, eq=False)
class FusedContext:
    """DecoderContext over the pool. `blocks` None: every row is of another request; then `tiles` may be there."""

    pool: KVPool
    slot_table: torch.Tensor  # [S, C] int32
    row_slots: torch.Tensor  # [T] int64
    row_seats: torch.Tensor  # [T] int32
    row_positions: torch.Tensor  # [T] int32
    blocks: tuple[torch.Tensor, torch.Tensor] | None
    tiles: PrefixTiles | None
    num_splits: int

    def attend(
        self,
        layer_idx: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        tables: tuple[torch.Tensor, torch.Tensor],
        norms: Norms | None,
        scaling: float,
        sliding_window: int | None,
    ) -> torch.Tensor:
        keys, values = self.pool.keys[layer_idx], self.pool.values[layer_idx]
        cosines, sines = tables
        rotate_and_store(
            query,
            key,
            value,
            keys=keys,
            values=values,
            row_slots=self.row_slots,
            row_positions=self.row_positions,
            cosines=cosines,
            sines=sines,
            norms=norms,
        )
        rows = (query, keys, values, self.slot_table, self.row_seats, self.row_positions)
        if self.tiles is None:
            return ragged_paged_attention(
                *rows,
                blocks=self.blocks,
                num_splits=self.num_splits,
                scaling=scaling,
                sliding_window=sliding_window,
            )
        assert self.blocks is None
        return shared_prefix_attention(
            *rows, tiles=self.tiles, num_splits=self.num_splits, scaling=scaling, sliding_window=sliding_window
        )
