"""Paged attention on a GPU: one Triton kernel for prompt chunks and decoding, and its merge of splits.

A program takes a block of consecutive rows of one request and one key/value head; the query heads that share
this head become rows of the same matrix product. Long contexts with few rows are split over several programs
(split-KV), each leaving a partial result and its log-sum-exp, merged by a second kernel.

Shapes: T rows, Hq query heads, Hkv key/value heads, G = Hq / Hkv, D head size, R requests, L longest context.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    query,
    keys,
    values,
    slots,
    row_request,
    row_position,
    block_row,
    block_len,
    out,
    partial_lse,
    scaling,
    window,
    q_stride,
    q_head_stride,
    kv_stride,
    slots_stride,
    out_stride,
    out_split_stride,
    lse_split_stride,
    NUM_Q_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head = tl.program_id(1)
    split = tl.program_id(2)
    if BLOCK_ROWS == 1:
        first_row = tl.program_id(0)
        num_rows = 1
    else:
        first_row = tl.load(block_row + tl.program_id(0))
        num_rows = tl.load(block_len + tl.program_id(0))
    request = tl.load(row_request + first_row).to(tl.int64)
    first_position = tl.load(row_position + first_row)

    # Matrix row m is query head head * GROUP + m % GROUP of token row first_row + m // GROUP.
    m = tl.arange(0, BLOCK_M)
    row = m // GROUP
    q_head = head * GROUP + m % GROUP
    live = row < num_rows
    d = tl.arange(0, BLOCK_D)
    in_head = d < HEAD_DIM
    q_offset = (first_row + row).to(tl.int64) * q_stride
    q_offset += q_head * q_head_stride
    q = tl.load(query + q_offset[:, None] + d[None], mask=live[:, None] & in_head[None], other=0.0)
    position = first_position + row

    stop = first_position + num_rows
    start = 0
    if HAS_WINDOW:
        start = tl.maximum(first_position - window + 1, 0)
    if NUM_SPLITS > 1:
        share = tl.cdiv(tl.cdiv(stop - start, NUM_SPLITS), BLOCK_N) * BLOCK_N
        start = start + split * share
        stop = tl.minimum(stop, start + share)

    running_max = tl.full([BLOCK_M], -float("inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    n = tl.arange(0, BLOCK_N)
    for begin in range(start, stop, BLOCK_N):
        kv_position = begin + n
        present = kv_position < stop
        slot = tl.load(slots + request * slots_stride + kv_position, mask=present, other=0).to(tl.int64)
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
    result = acc / safe_sum[:, None]
    out_offset = split.to(tl.int64) * out_split_stride + (first_row + row).to(tl.int64) * out_stride + q_head * HEAD_DIM
    tl.store(out + out_offset[:, None] + d[None], result.to(out.dtype.element_ty), mask=live[:, None] & in_head[None])
    if NUM_SPLITS > 1:
        lse = tl.where(running_sum > 0, tl.log(safe_sum) + running_max, -float("inf"))
        tl.store(partial_lse + split * lse_split_stride + (first_row + row) * NUM_Q_HEADS + q_head, lse, mask=live)


@triton.jit  # type: ignore[untyped-decorator]
def _merge(  # type: ignore[no-untyped-def]
    partial,
    partial_lse,
    out,
    partial_split_stride,
    lse_split_stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
):
    """One program a (row, query head): partial results weighted by the exponential of their log-sum-exp."""
    index = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, NUM_SPLITS)
    d = tl.arange(0, BLOCK_D)
    in_head = d < HEAD_DIM
    lse = tl.load(partial_lse + s * lse_split_stride + index)
    weight = tl.exp(lse - tl.max(lse, 0))
    weight = weight / tl.sum(weight, 0)
    offset = (s * partial_split_stride)[:, None] + index * HEAD_DIM + d[None]
    parts = tl.load(partial + offset, mask=in_head[None], other=0.0)
    merged = tl.sum(parts * weight[:, None], 0)
    tl.store(out + index * HEAD_DIM + d, merged.to(out.dtype.element_ty), mask=in_head)


def rows_per_block(group: int) -> int:
    """Token rows of one program when a request has many: together with the heads that share a key, 64 matrix rows."""
    return max(64 // _power_of_two(group), 1)


def ragged_paged_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    row_request: torch.Tensor,
    row_position: torch.Tensor,
    *,
    blocks: tuple[torch.Tensor, torch.Tensor] | None,
    num_splits: int,
    scaling: float,
    sliding_window: int | None,
) -> torch.Tensor:
    """query [T, Hq, D] over keys and values [num_slots, Hkv, D] -> [T, Hq, D].

    slots [R, L] int32: where position p of request r lies. row_request, row_position [T] int32. `blocks` is (first
    row, number of rows) of each block, both int32 [num_blocks]: consecutive rows of one request, at most
    `rows_per_block`; None means that every row is a block of its own (decoding). `num_splits` is a power of two.
    Row t sees positions (p - window, p] of its request, its own key and value already in the pool.
    """
    num_rows, num_q_heads, head_dim = query.shape
    num_kv_heads = keys.shape[1]
    group = num_q_heads // num_kv_heads
    assert query.stride(2) == 1, query.stride()
    assert keys.stride(1) == head_dim and keys.stride() == values.stride(), (keys.stride(), values.stride())
    block_rows = 1 if blocks is None else rows_per_block(group)
    num_blocks = num_rows if blocks is None else blocks[0].shape[0]
    block_row, block_len = (row_request, row_request) if blocks is None else blocks
    block_m = max(16, _power_of_two(block_rows * group))
    block_d = max(16, _power_of_two(head_dim))
    out = torch.empty(num_rows, num_q_heads, head_dim, dtype=query.dtype, device=query.device)
    if num_splits > 1:
        partial = torch.empty(num_splits, num_rows, num_q_heads, head_dim, dtype=torch.float32, device=query.device)
        partial_lse = torch.empty(num_splits, num_rows, num_q_heads, dtype=torch.float32, device=query.device)
    else:
        partial, partial_lse = out.unsqueeze(0), out
    grid: Any = (num_blocks, num_kv_heads, num_splits)
    _attend[grid](
        query,
        keys,
        values,
        slots,
        row_request,
        row_position,
        block_row,
        block_len,
        partial,
        partial_lse,
        scaling,
        sliding_window or 0,
        query.stride(0),
        query.stride(1),
        keys.stride(0),
        slots.stride(0),
        partial.stride(1),
        partial.stride(0),
        num_rows * num_q_heads,
        NUM_Q_HEADS=num_q_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        BLOCK_ROWS=block_rows,
        BLOCK_M=block_m,
        BLOCK_N=64,
        NUM_SPLITS=num_splits,
        HAS_WINDOW=sliding_window is not None,
        # Triton's own choice for float32 is tf32, an error of 1e-3 in log-probabilities.
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        num_warps=4,
        num_stages=3 if head_dim <= 128 else 2,
    )
    if num_splits > 1:
        _merge[(num_rows * num_q_heads,)](
            partial,
            partial_lse,
            out,
            partial.stride(0),
            num_rows * num_q_heads,
            HEAD_DIM=head_dim,
            BLOCK_D=block_d,
            NUM_SPLITS=num_splits,
            num_warps=1,
        )
    return out


def choose_num_splits(num_blocks: int, num_kv_heads: int, num_processors: int) -> int:
    """Enough programs to fill the card twice, at most 16 splits: 1 request of 2 heads on 132 processors gives 16."""
    splits = 1
    while splits < 16 and num_blocks * num_kv_heads * splits < 2 * num_processors:
        splits *= 2
    return splits


def _power_of_two(value: int) -> int:
    return 1 << (value - 1).bit_length()
