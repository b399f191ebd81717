"""Decode attention that reads the keys of a shared prefix once for all requests that share it.

    positions      0 ......... prefix ........ now
    _attend_prefix [ one tile of rows of a group ]            keys read once a tile
    _attend_suffix                 [ each row by itself ]
    _merge_parts   results weighted by the exponential of their log-sum-exp

Eight samples of one prompt have the prompt's keys and values in the same slots (see radix_cache). Their query heads
together fill a matrix product whose other side is the prefix (the idea of Hydragen, Juravsky et al. 2024, and of
FlashInfer's cascade). Which rows share what may change from step to step under one captured graph: tiles are data.

Shapes: T rows, N tiles of up to R rows, Hq query heads, Hkv key/value heads, G = Hq / Hkv, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from skyrl_train.engines.embedded.triton_attention import rows_per_block

BLOCK_N = 64


@dataclass(frozen=True, kw_only=True, eq=False)
class PrefixTiles:
    """Rows that read a common prefix together.

    `lengths` [N] int32: positions of the prefix, 0 for a tile that nobody uses. `rows` [N, R] int32: the tile's rows,
    then -1; its first row says where the prefix lies. `row_starts` [T] int32: the length of each row's prefix, 0 for a
    row in no tile.
    """

    lengths: torch.Tensor
    rows: torch.Tensor
    row_starts: torch.Tensor
    num_splits: int


@triton.jit  # type: ignore[untyped-decorator]
def _scan(  # type: ignore[no-untyped-def]
    q,
    position,
    start,
    stop,
    keys,
    values,
    request_slots,
    head,
    kv_stride,
    scaling,
    window,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """q [M, D] over positions [start, stop) of one request -> its result [M, D] and log-sum-exp [M]."""
    running_max = tl.full([BLOCK_M], -float("inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    n = tl.arange(0, BLOCK_KEYS)
    d = tl.arange(0, BLOCK_D)
    in_head = d < HEAD_DIM
    for begin in range(start, stop, BLOCK_KEYS):
        kv_position = begin + n
        present = kv_position < stop
        slot = tl.load(request_slots + kv_position, mask=present, other=0).to(tl.int64)
        kv_offset = (slot * kv_stride)[:, None] + head * HEAD_DIM + d[None]
        kv_mask = present[:, None] & in_head[None]
        k = tl.load(keys + kv_offset, mask=kv_mask, other=0.0)
        v = tl.load(values + kv_offset, mask=kv_mask, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scaling
        visible = present[None] & (kv_position[None] <= position[:, None])
        if HAS_WINDOW:
            visible = visible & (kv_position[None] > position[:, None] - window)
        score = tl.where(visible, score, -float("inf"))
        new_max = tl.maximum(running_max, tl.max(score, 1))
        # A row that sees nothing yet has no maximum: keep exp() away from inf - inf.
        shift = tl.where(new_max == -float("inf"), 0.0, new_max)
        weight = tl.exp(score - shift[:, None])
        decay = tl.exp(running_max - shift)
        running_sum = running_sum * decay + tl.sum(weight, 1)
        acc = acc * decay[:, None] + tl.dot(weight.to(v.dtype), v, input_precision=PRECISION)
        running_max = new_max
    safe_sum = tl.where(running_sum > 0, running_sum, 1.0)
    lse = tl.where(running_sum > 0, tl.log(safe_sum) + running_max, -float("inf"))
    return acc / safe_sum[:, None], lse


@triton.jit  # type: ignore[untyped-decorator]
def _attend_prefix(  # type: ignore[no-untyped-def]
    query,
    keys,
    values,
    slots,
    row_request,
    row_position,
    tile_lengths,
    tile_rows,
    partial,
    partial_lse,
    scaling,
    window,
    q_stride,
    q_head_stride,
    kv_stride,
    slots_stride,
    split_stride,
    lse_split_stride,
    NUM_Q_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    FIRST_SPLIT: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(tile_lengths + tile)
    if length > 0:
        # Matrix row m is query head head * GROUP + m % GROUP of the tile's row m // GROUP.
        m = tl.arange(0, BLOCK_M)
        member = m // GROUP
        q_head = head * GROUP + m % GROUP
        row = tl.load(tile_rows + tile * TILE_ROWS + member, mask=member < TILE_ROWS, other=-1).to(tl.int64)
        live = row >= 0
        row = tl.where(live, row, 0)
        first = tl.load(tile_rows + tile * TILE_ROWS)
        request = tl.load(row_request + first).to(tl.int64)
        position = tl.load(row_position + row)
        d = tl.arange(0, BLOCK_D)
        mask = live[:, None] & (d < HEAD_DIM)[None]
        q = tl.load(query + (row * q_stride + q_head * q_head_stride)[:, None] + d[None], mask=mask, other=0.0)
        share = tl.cdiv(tl.cdiv(length, NUM_SPLITS), BLOCK_KEYS) * BLOCK_KEYS
        start = split * share
        result, lse = _scan(
            q,
            position,
            start,
            tl.minimum(length, start + share),
            keys,
            values,
            slots + request * slots_stride,
            head,
            kv_stride,
            scaling,
            window,
            HEAD_DIM,
            BLOCK_D,
            BLOCK_M,
            BLOCK_KEYS,
            HAS_WINDOW,
            PRECISION,
        )
        at = row * NUM_Q_HEADS + q_head
        out = (FIRST_SPLIT + split).to(tl.int64) * split_stride + at * HEAD_DIM
        tl.store(partial + out[:, None] + d[None], result, mask=mask)
        tl.store(partial_lse + (FIRST_SPLIT + split) * lse_split_stride + at, lse, mask=live)


@triton.jit  # type: ignore[untyped-decorator]
def _attend_suffix(  # type: ignore[no-untyped-def]
    query,
    keys,
    values,
    slots,
    row_request,
    row_position,
    row_starts,
    partial,
    partial_lse,
    scaling,
    window,
    q_stride,
    q_head_stride,
    kv_stride,
    slots_stride,
    split_stride,
    lse_split_stride,
    NUM_Q_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    NUM_PREFIX_SPLITS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    split = tl.program_id(2)
    request = tl.load(row_request + row).to(tl.int64)
    last = tl.load(row_position + row)
    after = tl.load(row_starts + row)
    m = tl.arange(0, BLOCK_M)
    q_head = head * GROUP + m
    live = m < GROUP
    d = tl.arange(0, BLOCK_D)
    mask = live[:, None] & (d < HEAD_DIM)[None]
    q = tl.load(query + row * q_stride + (q_head * q_head_stride)[:, None] + d[None], mask=mask, other=0.0)
    start = after
    if HAS_WINDOW:
        start = tl.maximum(start, last - window + 1)
    stop = last + 1
    if NUM_SPLITS > 1:
        share = tl.cdiv(tl.cdiv(stop - start, NUM_SPLITS), BLOCK_KEYS) * BLOCK_KEYS
        start = start + split * share
        stop = tl.minimum(stop, start + share)
    result, lse = _scan(
        q,
        last + tl.zeros([BLOCK_M], tl.int32),
        start,
        stop,
        keys,
        values,
        slots + request * slots_stride,
        head,
        kv_stride,
        scaling,
        window,
        HEAD_DIM,
        BLOCK_D,
        BLOCK_M,
        BLOCK_KEYS,
        HAS_WINDOW,
        PRECISION,
    )
    at = row * NUM_Q_HEADS + q_head
    out = split.to(tl.int64) * split_stride + at * HEAD_DIM
    tl.store(partial + out[:, None] + d[None], result, mask=mask)
    tl.store(partial_lse + split * lse_split_stride + at, lse, mask=live)
    # Nobody else writes the prefix's share of a row that is in no tile.
    if (after == 0) & (split == 0):
        for prefix_split in tl.static_range(NUM_PREFIX_SPLITS):
            nothing = tl.full([BLOCK_M], -float("inf"), tl.float32)
            tl.store(partial_lse + (NUM_SPLITS + prefix_split) * lse_split_stride + at, nothing, mask=live)


@triton.jit  # type: ignore[untyped-decorator]
def _merge_parts(  # type: ignore[no-untyped-def]
    partial,
    partial_lse,
    out,
    split_stride,
    lse_split_stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """One program a (row, query head). A part without a log-sum-exp has no numbers either: it is not read."""
    index = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, BLOCK_PARTS)
    d = tl.arange(0, BLOCK_D)
    in_head = d < HEAD_DIM
    lse = tl.load(partial_lse + s * lse_split_stride + index, mask=s < NUM_PARTS, other=-float("inf"))
    weight = tl.exp(lse - tl.max(lse, 0))
    weight = weight / tl.sum(weight, 0)
    offset = (s.to(tl.int64) * split_stride)[:, None] + index * HEAD_DIM + d[None]
    mask = (lse > -float("inf"))[:, None] & in_head[None]
    merged = tl.sum(tl.load(partial + offset, mask=mask, other=0.0) * weight[:, None], 0)
    tl.store(out + index * HEAD_DIM + d, merged.to(out.dtype.element_ty), mask=in_head)


def tile_rows(group: int) -> int:
    """R: rows whose query heads of one key/value head fill a tile."""
    return rows_per_block(group)


def shared_prefix_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    row_request: torch.Tensor,
    row_position: torch.Tensor,
    *,
    tiles: PrefixTiles,
    num_splits: int,
    scaling: float,
    sliding_window: int | None,
) -> torch.Tensor:
    """One row a request: query [T, Hq, D] over keys and values [num_slots, Hkv, D] -> [T, Hq, D].

    slots [S, C] int32, row_request and row_position [T] int32 as for `ragged_paged_attention`, which computes the same.
    `num_splits`: of each row's own part; a power of two.
    """
    num_rows, num_q_heads, head_dim = query.shape
    num_kv_heads = keys.shape[1]
    group = num_q_heads // num_kv_heads
    assert query.stride(2) == 1 and keys.stride(1) == head_dim and keys.stride() == values.stride()
    assert tiles.rows.shape[1] == tile_rows(group) and tiles.rows.is_contiguous()
    num_parts = num_splits + tiles.num_splits
    block_d = max(16, _power_of_two(head_dim))
    partial = torch.empty(num_parts, num_rows, num_q_heads, head_dim, dtype=torch.float32, device=query.device)
    partial_lse = torch.empty(num_parts, num_rows, num_q_heads, dtype=torch.float32, device=query.device)
    out = torch.empty(num_rows, num_q_heads, head_dim, dtype=query.dtype, device=query.device)
    strides = (
        query.stride(0),
        query.stride(1),
        keys.stride(0),
        slots.stride(0),
        partial.stride(0),
        partial_lse.stride(0),
    )
    has_window = sliding_window is not None
    # Triton's own choice for float32 is tf32, an error of 1e-3 in log-probabilities.
    precision = "ieee" if query.dtype == torch.float32 else "tf32"
    num_stages = 3 if head_dim <= 128 else 2
    _attend_prefix[(len(tiles.lengths), num_kv_heads, tiles.num_splits)](
        query,
        keys,
        values,
        slots,
        row_request,
        row_position,
        tiles.lengths,
        tiles.rows,
        partial,
        partial_lse,
        scaling,
        sliding_window or 0,
        *strides,
        NUM_Q_HEADS=num_q_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        TILE_ROWS=tiles.rows.shape[1],
        BLOCK_M=max(16, _power_of_two(tiles.rows.shape[1] * group)),
        BLOCK_KEYS=BLOCK_N,
        FIRST_SPLIT=num_splits,
        NUM_SPLITS=tiles.num_splits,
        HAS_WINDOW=has_window,
        PRECISION=precision,
        num_warps=4,
        num_stages=num_stages,
    )
    _attend_suffix[(num_rows, num_kv_heads, num_splits)](
        query,
        keys,
        values,
        slots,
        row_request,
        row_position,
        tiles.row_starts,
        partial,
        partial_lse,
        scaling,
        sliding_window or 0,
        *strides,
        NUM_Q_HEADS=num_q_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        BLOCK_M=max(16, _power_of_two(group)),
        BLOCK_KEYS=BLOCK_N,
        NUM_SPLITS=num_splits,
        NUM_PREFIX_SPLITS=tiles.num_splits,
        HAS_WINDOW=has_window,
        PRECISION=precision,
        num_warps=4,
        num_stages=num_stages,
    )
    _merge_parts[(num_rows * num_q_heads,)](
        partial,
        partial_lse,
        out,
        partial.stride(0),
        partial_lse.stride(0),
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        NUM_PARTS=num_parts,
        BLOCK_PARTS=_power_of_two(num_parts),
        num_warps=1,
    )
    return out


def _power_of_two(value: int) -> int:
    return 1 << max(value - 1, 0).bit_length()
