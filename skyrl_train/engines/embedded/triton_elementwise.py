"""The small parts of a decoder layer on a GPU, each in one pass over its rows.

    start_decoding   last tokens -> their embeddings; the slot table learns where this step's keys go
    rms_norm         x -> normed
    add_rms_norm     residual + x -> the new residual, and its norm
    rotate_and_store q in place; k and v, rotated and normed as the model wants, into their slots of the pool
    silu_times       silu(gate) * up
    take_tokens      the sampled tokens are each seat's last, and join its text

All arithmetic is float32. Results are rounded to the tensors' type wherever transformers' modules round (a sum, a norm
before its weight, each product of the rotation), so that the policy which samples is the one that is trained, to the
bit but for the order of sums.

Shapes: T rows, H hidden size, Hq query heads, Hkv key/value heads, G = Hq / Hkv, D head size, C positions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def _start_decoding(  # type: ignore[no-untyped-def]
    row_seats,
    row_positions,
    row_slots,
    last_token,
    embedding,
    slot_table,
    hidden,
    seats_out,
    positions_out,
    slots_stride,
    embedding_stride,
    hidden_size,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    seat = tl.load(row_seats + row)
    position = tl.load(row_positions + row)
    tl.store(slot_table + seat * slots_stride + position, tl.load(row_slots + row).to(tl.int32))
    tl.store(seats_out + row, seat.to(tl.int32))
    tl.store(positions_out + row, position.to(tl.int32))
    token = tl.load(last_token + seat)
    for begin in range(0, hidden_size, BLOCK):
        h = begin + tl.arange(0, BLOCK)
        inside = h < hidden_size
        x = tl.load(embedding + token * embedding_stride + h, mask=inside, other=0.0)
        tl.store(hidden + row * hidden_size + h, x, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _add_rms_norm(  # type: ignore[no-untyped-def]
    x,
    residual,
    weight,
    residual_out,
    normed,
    x_stride,
    residual_stride,
    eps,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK)
    inside = h < HIDDEN
    kind = normed.dtype.element_ty
    value = tl.load(x + row * x_stride + h, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        value += tl.load(residual + row * residual_stride + h, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(kind)
        tl.store(residual_out + row * HIDDEN + h, rounded, mask=inside)
        value = rounded.to(tl.float32)
    scale = 1.0 / tl.sqrt_rn(tl.sum(value * value, 0) / HIDDEN + eps)
    unit = (value * scale).to(kind).to(tl.float32)
    gain = tl.load(weight + h, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + row * HIDDEN + h, (unit * gain).to(kind), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _normed(first, second, weight, d, inside, eps, kind, HEAD_DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    """RMSNorm of heads [N, D], given as their first and second halves [N, BLOCK_HALF]."""
    half: tl.constexpr = HEAD_DIM // 2
    total = tl.sum(first * first, 1) + tl.sum(second * second, 1)
    scale = (1.0 / tl.sqrt_rn(total / HEAD_DIM + eps))[:, None]
    gain_first = tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)[None]
    gain_second = tl.load(weight + half + d, mask=inside, other=0.0).to(tl.float32)[None]
    first = (first * scale).to(kind).to(tl.float32) * gain_first
    second = (second * scale).to(kind).to(tl.float32) * gain_second
    return first.to(kind).to(tl.float32), second.to(kind).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _rotate_and_store(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    keys,
    values,
    row_slots,
    row_positions,
    cosines,
    sines,
    query_weight,
    key_weight,
    q_stride,
    k_stride,
    v_stride,
    kv_stride,
    query_eps,
    key_eps,
    GROUP: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    """One program a (row, key/value head): this head's key and value, and the query heads that share it."""
    half: tl.constexpr = HEAD_DIM // 2
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    slot = tl.load(row_slots + row).to(tl.int64)
    position = tl.load(row_positions + row).to(tl.int64)
    kind = keys.dtype.element_ty
    d = tl.arange(0, BLOCK_HALF)
    inside = d < half
    table = position * HEAD_DIM + d
    cos_first = tl.load(cosines + table, mask=inside, other=0.0).to(tl.float32)[None]
    cos_second = tl.load(cosines + table + half, mask=inside, other=0.0).to(tl.float32)[None]
    sin_first = tl.load(sines + table, mask=inside, other=0.0).to(tl.float32)[None]
    sin_second = tl.load(sines + table + half, mask=inside, other=0.0).to(tl.float32)[None]

    g = tl.arange(0, BLOCK_GROUP)
    q_mask = (g < GROUP)[:, None] & inside[None]
    q_offset = row * q_stride + ((head * GROUP + g) * HEAD_DIM)[:, None] + d[None]
    first = tl.load(query + q_offset, mask=q_mask, other=0.0).to(tl.float32)
    second = tl.load(query + q_offset + half, mask=q_mask, other=0.0).to(tl.float32)
    if HAS_NORM:
        first, second = _normed(first, second, query_weight, d, inside, query_eps, kind, HEAD_DIM)
    turned_first = (first * cos_first).to(kind).to(tl.float32) - (second * sin_first).to(kind).to(tl.float32)
    turned_second = (second * cos_second).to(kind).to(tl.float32) + (first * sin_second).to(kind).to(tl.float32)
    tl.store(query + q_offset, turned_first.to(kind), mask=q_mask)
    tl.store(query + q_offset + half, turned_second.to(kind), mask=q_mask)

    one = tl.arange(0, 1)
    k_mask = (one < 1)[:, None] & inside[None]
    k_offset = row * k_stride + head * HEAD_DIM + one[:, None] + d[None]
    first = tl.load(key + k_offset, mask=k_mask, other=0.0).to(tl.float32)
    second = tl.load(key + k_offset + half, mask=k_mask, other=0.0).to(tl.float32)
    if HAS_NORM:
        first, second = _normed(first, second, key_weight, d, inside, key_eps, kind, HEAD_DIM)
    turned_first = (first * cos_first).to(kind).to(tl.float32) - (second * sin_first).to(kind).to(tl.float32)
    turned_second = (second * cos_second).to(kind).to(tl.float32) + (first * sin_second).to(kind).to(tl.float32)
    target = slot * kv_stride + head * HEAD_DIM + one[:, None] + d[None]
    tl.store(keys + target, turned_first.to(kind), mask=k_mask)
    tl.store(keys + target + half, turned_second.to(kind), mask=k_mask)
    v_offset = row * v_stride + head * HEAD_DIM + one[:, None] + d[None]
    tl.store(values + target, tl.load(value + v_offset, mask=k_mask, other=0.0), mask=k_mask)
    tl.store(values + target + half, tl.load(value + v_offset + half, mask=k_mask, other=0.0), mask=k_mask)


@triton.jit  # type: ignore[untyped-decorator]
def _silu_times(gate, up, out, gate_stride, up_stride, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    kind = out.dtype.element_ty
    x = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    silu = (x / (1.0 + tl.exp(-x))).to(kind).to(tl.float32)
    tl.store(out + row * width + column, (silu * y).to(kind), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _take_tokens(  # type: ignore[no-untyped-def]
    tokens, row_seats, row_positions, last_token, seat_tokens, tokens_stride, num_rows, BLOCK: tl.constexpr
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < num_rows
    token = tl.load(tokens + row, mask=inside, other=0)
    seat = tl.load(row_seats + row, mask=inside, other=0).to(tl.int64)
    position = tl.load(row_positions + row, mask=inside, other=0).to(tl.int64)
    tl.store(last_token + seat, token, mask=inside)
    tl.store(seat_tokens + seat * tokens_stride + position + 1, token.to(tl.int32), mask=inside)


def start_decoding(
    row_seats: torch.Tensor,
    row_positions: torch.Tensor,
    row_slots: torch.Tensor,
    *,
    last_token: torch.Tensor,
    embedding: torch.Tensor,
    slot_table: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The beginning of a decode step: embeddings [T, H] of each row's last token, seats and positions as int32 [T].

    row_seats, row_positions, row_slots [T] int64; last_token [S] int64; embedding [V, H]. Writes each row's slot into
    slot_table [S, C] int32.
    """
    num_rows, hidden_size = len(row_seats), embedding.shape[1]
    assert embedding.stride(1) == 1 and slot_table.stride(1) == 1
    hidden = torch.empty(num_rows, hidden_size, dtype=embedding.dtype, device=embedding.device)
    seats = torch.empty(num_rows, dtype=torch.int32, device=embedding.device)
    positions = torch.empty_like(seats)
    _start_decoding[(num_rows,)](
        row_seats,
        row_positions,
        row_slots,
        last_token,
        embedding,
        slot_table,
        hidden,
        seats,
        positions,
        slot_table.stride(0),
        embedding.stride(0),
        hidden_size,
        BLOCK=min(_power_of_two(hidden_size), 2048),
        num_warps=4,
    )
    return hidden, seats, positions


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [T, H] -> weight * x / rms(x), contiguous."""
    return _norm(x, None, weight, eps)[0]


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x and residual [T, H] -> the norm of their sum, and the sum."""
    return _norm(x, residual, weight, eps)


def _norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    num_rows, hidden_size = x.shape
    assert x.stride(1) == 1 and weight.is_contiguous()
    assert residual is None or (residual.stride(1) == 1 and residual.shape == x.shape)
    normed = torch.empty(num_rows, hidden_size, dtype=x.dtype, device=x.device)
    total = normed if residual is None else torch.empty_like(normed)
    before = x if residual is None else residual
    block = _power_of_two(hidden_size)
    _add_rms_norm[(num_rows,)](
        x,
        before,
        weight,
        total,
        normed,
        x.stride(0),
        before.stride(0),
        eps,
        HIDDEN=hidden_size,
        BLOCK=block,
        HAS_RESIDUAL=residual is not None,
        num_warps=min(max(block // 512, 1), 8),
    )
    return normed, total


def rotate_and_store(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    keys: torch.Tensor,
    values: torch.Tensor,
    row_slots: torch.Tensor,
    row_positions: torch.Tensor,
    cosines: torch.Tensor,
    sines: torch.Tensor,
    norms: tuple[torch.Tensor, float, torch.Tensor, float] | None,
) -> None:
    """Rotate query [T, Hq, D] in place; rotated key and value [T, Hkv, D] go to keys, values [slots, Hkv, D].

    Rows may be strided, heads may not. row_slots, row_positions [T]; cosines, sines [C, D]: of each position. `norms`:
    weight [D] and epsilon of the query's RMSNorm, then of the key's, each over one head, before the rotation.
    """
    num_rows, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[1]
    for x in (query, key, value):
        assert x.stride(2) == 1 and x.stride(1) == head_dim, x.stride()
    assert keys.stride(1) == head_dim and keys.stride() == values.stride(), (keys.stride(), values.stride())
    assert cosines.is_contiguous() and sines.is_contiguous() and cosines.shape[1] == head_dim
    assert query.dtype == key.dtype == value.dtype == keys.dtype
    query_weight, query_eps, key_weight, key_eps = norms or (query, 0.0, key, 0.0)
    group = num_heads // num_kv_heads
    _rotate_and_store[(num_rows, num_kv_heads)](
        query,
        key,
        value,
        keys,
        values,
        row_slots,
        row_positions,
        cosines,
        sines,
        query_weight,
        key_weight,
        query.stride(0),
        key.stride(0),
        value.stride(0),
        keys.stride(0),
        query_eps,
        key_eps,
        GROUP=group,
        BLOCK_GROUP=_power_of_two(group),
        HEAD_DIM=head_dim,
        BLOCK_HALF=_power_of_two(head_dim // 2),
        HAS_NORM=norms is not None,
        num_warps=1 if group * head_dim <= 512 else 4,
    )


def silu_times(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, both [T, I], perhaps halves of one product -> contiguous."""
    num_rows, width = gate.shape
    assert gate.stride(1) == up.stride(1) == 1 and gate.shape == up.shape
    out = torch.empty(num_rows, width, dtype=gate.dtype, device=gate.device)
    block = min(_power_of_two(width), 1024)
    grid = (num_rows, triton.cdiv(width, block))
    _silu_times[grid](gate, up, out, gate.stride(0), up.stride(0), width, BLOCK=block, num_warps=4)
    return out


def take_tokens(
    tokens: torch.Tensor,
    *,
    row_seats: torch.Tensor,
    row_positions: torch.Tensor,
    last_token: torch.Tensor,
    seat_tokens: torch.Tensor,
) -> None:
    """tokens [n] int64 follow the positions [n] of the seats [n]; into last_token [S] and seat_tokens [S, C] int32."""
    block = 256
    _take_tokens[(triton.cdiv(len(tokens), block),)](
        tokens,
        row_seats,
        row_positions,
        last_token,
        seat_tokens,
        seat_tokens.stride(0),
        len(tokens),
        BLOCK=block,
        num_warps=4,
    )


def _power_of_two(value: int) -> int:
    return 1 << max(value - 1, 0).bit_length()
