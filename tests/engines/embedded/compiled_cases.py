"""Compiles the GPU's kernels for a Hopper card on a machine that has none, and prints a line for each.

What runs under the interpreter need not compile: types of a loop's variables, shapes, constants. Nothing is launched.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class NoDriver:
    """What Triton asks of a driver before it launches."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


_run = JITFunction.run


def _compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
    kernel = _run(self, *args, grid=grid, warmup=True, **options)
    data = kernel.metadata
    print(f"{self.__name__}: {len(kernel.asm['cubin'])} bytes, {data.shared} of shared memory, {data.num_warps} warps")
    assert data.shared <= 227 * 1024, f"{self.__name__} wants more shared memory than a block can have"
    return kernel


def compile_all(dtype: torch.dtype) -> None:
    from skyrl_train.engines.embedded import triton_elementwise as kernels
    from skyrl_train.engines.embedded.triton_attention import ragged_paged_attention, rows_per_block
    from skyrl_train.engines.embedded.triton_rules import NUM_RULES, RowRules, apply_rules
    from skyrl_train.engines.embedded.triton_sampler import sample_and_summarise
    from skyrl_train.engines.embedded.triton_shared_prefix import PrefixTiles, shared_prefix_attention, tile_rows

    rows, context, words = 32, 512, 151_936
    integers = torch.zeros(rows, dtype=torch.int64)
    shorts = torch.zeros(rows, dtype=torch.int32)
    table = torch.zeros(rows + 1, context, dtype=torch.int32)
    for size in (896, 3584):
        x, weight = torch.zeros(rows, size, dtype=dtype), torch.zeros(size, dtype=dtype)
        kernels.rms_norm(x, weight, 1e-6)
        kernels.add_rms_norm(x, x.clone(), weight, 1e-6)
    last = torch.zeros(rows + 1, dtype=torch.int64)
    kernels.start_decoding(
        integers, integers, integers, last_token=last, embedding=torch.zeros(99, 896, dtype=dtype), slot_table=table
    )
    kernels.take_tokens(integers, row_seats=shorts, row_positions=shorts, last_token=last, seat_tokens=table)
    kernels.take_tokens(integers, row_seats=integers, row_positions=integers, last_token=last, seat_tokens=table)
    both = torch.zeros(rows, 2 * 4864, dtype=dtype)
    kernels.silu_times(both[:, :4864], both[:, 4864:])
    for heads, kv_heads, head_dim in ((14, 2, 64), (28, 4, 128)):
        sizes = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
        parts = torch.split(torch.zeros(rows, sum(sizes), dtype=dtype), sizes, dim=1)
        query, key, value = (x.view(rows, -1, head_dim) for x in parts)
        keys = torch.zeros(1000, kv_heads, head_dim, dtype=dtype)
        turns, gain = torch.zeros(context, head_dim, dtype=dtype), torch.zeros(head_dim, dtype=dtype)
        for norms in (None, (gain, 1e-6, gain, 1e-6)):
            kernels.rotate_and_store(
                query,
                key,
                value,
                keys=keys,
                values=keys.clone(),
                row_slots=integers,
                row_positions=shorts,
                cosines=turns,
                sines=turns.clone(),
                norms=norms,
            )
        group = heads // kv_heads
        tiles = PrefixTiles(
            lengths=torch.zeros(8, dtype=torch.int32),
            rows=torch.zeros(8, tile_rows(group), dtype=torch.int32),
            row_starts=shorts,
            num_splits=4,
        )
        common = (query, keys, keys.clone(), table, shorts, shorts)
        for window in (None, 100):
            options: dict[str, Any] = {"scaling": 0.1, "sliding_window": window}
            for num_splits in (1, 4):
                shared_prefix_attention(*common, tiles=tiles, num_splits=num_splits, **options)
                ragged_paged_attention(*common, blocks=None, num_splits=num_splits, **options)
            assert rows_per_block(group) >= 1
            ragged_paged_attention(*common, blocks=(shorts, shorts), num_splits=1, **options)
    logits = torch.zeros(rows, words, dtype=dtype)
    uniform, heat = torch.zeros(rows, dtype=torch.float64), torch.zeros(rows)
    tokens, logprobs, block_max, block_sum = sample_and_summarise(logits, heat, uniform)
    for seats in (shorts, integers):
        apply_rules(
            logits,
            heat,
            uniform,
            RowRules.unpacked(torch.zeros(NUM_RULES, rows, dtype=torch.int64)),
            row_seats=seats,
            row_positions=seats,
            seat_tokens=table,
            end_ids=torch.zeros(rows + 1, 64, dtype=torch.int32),
            marks=torch.zeros(rows, words, dtype=torch.int32),
            block_max=block_max,
            block_sum=block_sum,
            tokens=tokens,
            logprobs=logprobs,
        )


if __name__ == "__main__":
    driver.set_active(NoDriver())
    JITFunction.run = _compile_only
    compile_all(torch.bfloat16)
    print("all compiled")
