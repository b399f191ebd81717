from __future__ import annotations

import numpy as np
import pytest
import torch

from skyrl_train.engines.embedded.attention import PagedBatch
from skyrl_train.engines.embedded.cpu_attention import CpuAttention
from skyrl_train.engines.embedded.native.build import load_native
from skyrl_train.engines.embedded.reference_attention import ReferenceAttention

SHAPES = [(4, 4, 16), (4, 2, 32), (8, 1, 64), (6, 2, 80), (2, 2, 128), (32, 2, 48)]


def make_batch(spans: list[tuple[int, int]], num_slots: int) -> PagedBatch:
    """Requests that compute positions [start, end) each, on seats in reverse order and slots at random."""
    seats = list(range(len(spans)))[::-1]
    longest = max(end for _, end in spans)
    slots = torch.randperm(num_slots)
    table = torch.full((len(spans), longest), -1, dtype=torch.int32)
    used = 0
    for seat, (_, end) in zip(seats, spans, strict=True):
        table[seat, :end] = slots[used : used + end]
        used += end
    positions = [torch.arange(start, end) for start, end in spans]
    return PagedBatch(
        row_slots=torch.cat([table[seat, at].long() for seat, at in zip(seats, positions, strict=True)]),
        row_positions=torch.cat(positions),
        row_seats=torch.cat([torch.full((len(at),), seat) for seat, at in zip(seats, positions, strict=True)]).int(),
        request_seats=seats,
        cu_rows=np.cumsum([0, *(end - start for start, end in spans)]).tolist(),
        slot_table=table,
    )


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "dim"), SHAPES)
@pytest.mark.parametrize("window", [None, 1, 7, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_c_kernel_agrees_with_the_reference(
    num_heads: int, num_kv_heads: int, dim: int, window: int | None, dtype: torch.dtype
) -> None:
    torch.manual_seed(dim)
    spans = [(0, 1), (70, 71), (0, 130), (5, 6), (64, 200), (63, 64), (199, 200), (3, 20)]
    batch = make_batch(spans, num_slots=1000)
    rows = int(batch.cu_rows[-1])
    pools = [torch.randn(1000, num_kv_heads, dim).to(dtype) for _ in range(2)]
    expected_pools = [pool.clone() for pool in pools]
    # Strides as a fused projection leaves them: heads far apart, rows close.
    query = (torch.randn(num_heads, rows, dim).transpose(0, 1) * 3).to(dtype)
    key, value = (torch.randn(rows, 3 * num_kv_heads, dim).to(dtype)[:, :num_kv_heads] for _ in range(2))
    expected = ReferenceAttention().attend(batch, *expected_pools, query, key, value, 0.3, window)
    found = CpuAttention(load_native()).attend(batch, *pools, query, key, value, 0.3, window)
    # In bfloat16 both compute in float32 and round once: at most one step of the last digit apart.
    rounding = 0.0 if dtype == torch.float32 else 1 / 128
    assert found.dtype == dtype
    assert torch.allclose(found.float(), expected.float(), atol=2e-5, rtol=1e-5 + rounding)
    assert torch.equal(pools[0], expected_pools[0]) and torch.equal(pools[1], expected_pools[1])


def test_uninitialised_slots_never_reach_a_result() -> None:
    batch = make_batch([(0, 3), (10, 11)], num_slots=32)
    pools = [torch.full((32, 2, 16), torch.nan) for _ in range(2)]
    known = batch.slot_table[0, :10].long()  # the second request's history
    for pool in pools:
        pool[known] = torch.randn(10, 2, 16)
    out = CpuAttention(load_native()).attend(
        batch, *pools, torch.randn(4, 4, 16), torch.randn(4, 2, 16), torch.randn(4, 2, 16), 0.25, None
    )
    assert torch.isfinite(out).all()
