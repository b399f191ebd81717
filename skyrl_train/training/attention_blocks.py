"""Packed attention as a few padded batches of dense blocks: any device, any dtype.

A block is some segments with the same ancestors. Its queries are their rows, its keys the ancestors and those rows:

    prompt p (3 rows), answers a (2), b (1)       block 1: queries p        block 2: queries a a b
                                                           keys    p                 keys    p p p a a b
                                                           mask    causal            mask    1 1 1 1 0 0
                                                                                             1 1 1 1 1 0
                                                                                             1 1 1 0 0 1
Short siblings share a block: one call for all, and the prompt's keys are gathered once. Long ones get their own,
for a shared block computes the masked corners too. Blocks of about one size are padded to one batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from skyrl_train.data.pack import MicroBatch

Index = np.ndarray[tuple[int], np.dtype[np.int64]]

MIN_SHARED_QUERIES = 32
MIN_SHARED_FRAC = 1 / 16
"""Siblings share a block up to this many rows, or this part of their ancestors': below it a call, or gathering the
ancestors again, costs more than the masked corners."""
CALL_COST = 16
"""Rows and columns that a block's fixed cost is worth when sizes are compared for batching."""
MAX_PADDED_FRAC = 1.5
"""A batch's cost over what its smallest block alone would cost per block."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """`queries` [q] and `keys` [k] are rows; keys are ancestors first. `segment_lens` adds up to q."""

    queries: Index
    keys: Index
    segment_lens: tuple[int, ...]

    @property
    def num_ancestors(self) -> int:
        return len(self.keys) - len(self.queries)

    @property
    def is_plain(self) -> bool:
        """One sequence from its start: causal attention without a mask, padded or not."""
        return len(self.segment_lens) == 1 and self.num_ancestors == 0


@dataclass(eq=False)
class Batch:
    """b blocks padded to [b, q] queries and [b, k] keys; `masks` are made when a layer first needs its window."""

    blocks: list[Block]
    num_queries: int
    num_keys: int
    query_rows: Index  # [b * q], padding repeats row 0
    key_rows: Index  # [b * k], padding repeats row 0
    masks: dict[tuple[int | None, torch.dtype], torch.Tensor | None] = field(default_factory=dict)

    @property
    def max_distance(self) -> int:
        return max(block.num_ancestors + max(block.segment_lens) for block in self.blocks)


class BlockAttention:
    """AttentionContext over a micro-batch's segments. Modifies nothing; masks are cached per sliding window."""

    def __init__(self, micro_batch: MicroBatch, *, device: torch.device) -> None:
        self._device = device
        self._batches = [_pad(blocks) for blocks in _batch(_blocks(micro_batch))]
        # Where each row's output lies in the concatenated, padded outputs of all batches.
        slots = np.empty(len(micro_batch.token_ids), dtype=np.int64)
        offset = 0
        for batch in self._batches:
            for i, block in enumerate(batch.blocks):
                at = offset + i * batch.num_queries
                slots[block.queries] = np.arange(at, at + len(block.queries))
            offset += len(batch.blocks) * batch.num_queries
        self._slots = torch.from_numpy(slots).to(device)
        self._query_rows = torch.from_numpy(np.concatenate([b.query_rows for b in self._batches])).to(device)
        self._key_rows = torch.from_numpy(np.concatenate([b.key_rows for b in self._batches])).to(device)
        self._query_sizes = [len(b.query_rows) for b in self._batches]
        self._key_sizes = [len(b.key_rows) for b in self._batches]

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
        outs = []
        # One gather for all batches: its gradient is one scatter, not one per batch.
        queries = torch.split(query.index_select(0, self._query_rows), self._query_sizes)
        keys = torch.split(key.index_select(0, self._key_rows), self._key_sizes)
        values = torch.split(value.index_select(0, self._key_rows), self._key_sizes)
        for batch, q, k, v in zip(self._batches, queries, keys, values, strict=True):
            window = sliding_window if sliding_window is not None and sliding_window < batch.max_distance else None
            mask = self._mask(batch, window, query.dtype)
            out = F.scaled_dot_product_attention(
                q.view(-1, batch.num_queries, *q.shape[1:]).transpose(1, 2),
                k.view(-1, batch.num_keys, *k.shape[1:]).transpose(1, 2),
                v.view(-1, batch.num_keys, *v.shape[1:]).transpose(1, 2),
                attn_mask=mask,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=key.shape[1] != query.shape[1],
            )
            outs.append(out.transpose(1, 2).flatten(0, 1))
        return torch.cat(outs).index_select(0, self._slots)

    def _mask(self, batch: Batch, window: int | None, dtype: torch.dtype) -> torch.Tensor | None:
        """[b, 1, q, k], 0 where a query may look and -inf elsewhere; None is causal."""
        if (window, dtype) not in batch.masks:
            plain = window is None and batch.blocks[0].is_plain
            batch.masks[window, dtype] = None if plain else _make_mask(batch, window).to(self._device, dtype)
        return batch.masks[window, dtype]


def _blocks(micro_batch: MicroBatch) -> list[Block]:
    """Segments with the same ancestors, cut so that only short ones share a block."""
    q_bounds, k_bounds = micro_batch.cu_seqlens_q.tolist(), micro_batch.cu_seqlens_k.tolist()
    kv_rows = micro_batch.kv_rows.numpy()
    open_blocks: dict[bytes, tuple[Index, list[tuple[int, int]]]] = {}
    closed: list[tuple[Index, list[tuple[int, int]]]] = []
    for s in range(len(q_bounds) - 1):
        start, end = q_bounds[s], q_bounds[s + 1]
        ancestors = kv_rows[k_bounds[s] : k_bounds[s + 1] - (end - start)]
        if len(ancestors) == 0:
            closed.append((ancestors, [(start, end)]))
            continue
        key = ancestors.tobytes()
        _, members = open_blocks.setdefault(key, (ancestors, []))
        room = max(MIN_SHARED_QUERIES, int(MIN_SHARED_FRAC * len(ancestors)))
        if members and sum(e - b for b, e in members) + end - start > room:
            closed.append(open_blocks.pop(key))
            open_blocks[key] = (ancestors, members := [])
        members.append((start, end))
    closed += open_blocks.values()
    blocks = []
    for ancestors, members in closed:
        own = np.concatenate([np.arange(start, end) for start, end in members])
        blocks.append(
            Block(
                queries=own,
                keys=np.concatenate([ancestors, own]),
                segment_lens=tuple(end - start for start, end in members),
            )
        )
    return blocks


def _batch(blocks: Sequence[Block]) -> list[list[Block]]:
    """Neighbours in size share a batch while padding them to its largest costs little more than they do.

    Plain blocks stay among themselves: they need no mask.
    """
    batches: list[list[Block]] = []
    top = (0, 0)
    for block in sorted(blocks, key=lambda b: (b.is_plain, -len(b.keys), -len(b.queries), int(b.queries[0]))):
        size = (len(block.queries) + CALL_COST, len(block.keys) + CALL_COST)
        wide = max(top[0], size[0])
        alike = batches and batches[-1][0].is_plain == block.is_plain
        if alike and wide * top[1] <= MAX_PADDED_FRAC * size[0] * size[1]:
            batches[-1].append(block)
            top = (wide, top[1])
        else:
            batches.append([block])
            top = size
    return batches


def _pad(blocks: list[Block]) -> Batch:
    num_queries = max(len(b.queries) for b in blocks)
    num_keys = max(len(b.keys) for b in blocks)
    query_rows = np.zeros((len(blocks), num_queries), dtype=np.int64)
    key_rows = np.zeros((len(blocks), num_keys), dtype=np.int64)
    for i, block in enumerate(blocks):
        query_rows[i, : len(block.queries)] = block.queries
        key_rows[i, : len(block.keys)] = block.keys
    return Batch(
        blocks=blocks,
        num_queries=num_queries,
        num_keys=num_keys,
        query_rows=query_rows.reshape(-1),
        key_rows=key_rows.reshape(-1),
    )


def _make_mask(batch: Batch, window: int | None) -> torch.Tensor:
    """Padded queries look at key 0, so that no softmax is empty; nothing reads what they compute."""
    visible = np.zeros((len(batch.blocks), 1, batch.num_queries, batch.num_keys), dtype=bool)
    visible[..., 0] = True
    for i, block in enumerate(batch.blocks):
        num_ancestors, q = block.num_ancestors, len(block.queries)
        segment = np.repeat(np.arange(len(block.segment_lens)), block.segment_lens)
        starts = np.repeat(np.cumsum(block.segment_lens) - block.segment_lens, block.segment_lens)
        offset = np.arange(q) - starts
        own = (segment[:, None] == segment[None, :]) & (offset[:, None] >= offset[None, :])
        before = np.ones((q, num_ancestors), dtype=bool)
        if window is not None:
            own &= offset[:, None] - offset[None, :] < window
            before = num_ancestors + offset[:, None] - np.arange(num_ancestors)[None, :] < window
        visible[i, 0, :q, : num_ancestors + q] = np.concatenate([before, own], axis=1)
    mask = torch.zeros(visible.shape)
    return mask.masked_fill_(torch.from_numpy(~visible), -torch.inf)
