"""Attention by native/invariant.c, over the engine's paged keys and over the trainer's packed rows.

Both give the kernel a table of where each position of a sequence lies, so a token's sums are the same ones:

    engine     sequence = request, slots of the pool              (the step's rows are written there first)
    trainer    sequence = segment with its ancestors, rows of the packed batch

Shapes: T rows, R sequences, Hq query heads, Hkv key/value heads, D head size.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from skyrl_train.attention import AttentionContext
from skyrl_train.data.pack import MicroBatch
from skyrl_train.engines.embedded.attention import PagedBatch
from skyrl_train.engines.embedded.config import KVShape
from skyrl_train.engines.embedded.invariant.kernels import invariant_kernels
from skyrl_train.errors import ConfigError

LANES = 16
MAX_QUERIES = 64
MAX_DIM = 256

Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]


class _Attention(ctypes.Structure):
    """`Attention` of invariant.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "keys", "values", "out", "positions", "table_start")),
        *((name, ctypes.c_void_p) for name in ("cu_rows", "table", "task_sequence", "task_row")),
        *((name, ctypes.c_int64) for name in ("query_row", "query_head", "key_slot", "key_head")),
        *((name, ctypes.c_int64) for name in ("value_slot", "value_head")),
        *((name, ctypes.c_int32) for name in ("num_tasks", "block_rows", "num_threads")),
        *((name, ctypes.c_int32) for name in ("num_heads", "num_kv_heads", "head_dim")),
        ("scaling", ctypes.c_float),
        ("window", ctypes.c_int32),
    )


class SequenceTable:
    """Which rows belong to which sequence, and where its keys lie. Rows of a sequence follow one another."""

    def __init__(self, *, positions: Int64s, cu_rows: Int32s, table: Int32s, table_start: Int64s) -> None:
        """positions [T], cu_rows [R + 1], table: slots of all sequences, from table_start [R] on."""
        self._kept = [positions, cu_rows, table, table_start]
        self._rows_of = np.diff(cu_rows)
        self._cu_rows = cu_rows
        self._call = _Attention()
        self._call.positions, self._call.table_start = positions.ctypes.data, table_start.ctypes.data
        self._call.cu_rows, self._call.table = cu_rows.ctypes.data, table.ctypes.data
        self._group = 0

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        *,
        scaling: float,
        window: int | None,
    ) -> torch.Tensor:
        """query [T, Hq, D], keys and values [slots, Hkv, D], strides arbitrary except the last -> [T, Hq, D]."""
        num_rows, num_heads, head_dim = query.shape
        call = self._call
        self._cut(num_heads // keys.shape[1])
        out = torch.empty((num_rows, num_heads, head_dim), dtype=torch.float32)
        call.query, call.keys, call.values = query.data_ptr(), keys.data_ptr(), values.data_ptr()
        call.out = out.data_ptr()
        call.query_row, call.query_head, _ = query.stride()
        call.key_slot, call.key_head, _ = keys.stride()
        call.value_slot, call.value_head, _ = values.stride()
        call.num_heads, call.num_kv_heads, call.head_dim = num_heads, keys.shape[1], head_dim
        call.scaling, call.window, call.num_threads = scaling, window or 0, torch.get_num_threads()
        invariant_kernels().attention(ctypes.addressof(call))
        return out

    def _cut(self, group: int) -> None:
        """Tasks of some rows of a sequence each, for query heads in groups of this size."""
        if group == self._group:
            return
        block_rows = max(MAX_QUERIES // group, 1)
        blocks = -(-self._rows_of // block_rows)
        sequence = np.repeat(np.arange(len(blocks), dtype=np.int32), blocks)
        block_in_sequence = np.arange(len(sequence)) - (np.cumsum(blocks) - blocks)[sequence]
        # Long sequences' blocks are the slowest tasks: let them start first.
        order = np.argsort(-self._rows_of[sequence], kind="stable")
        row = (self._cu_rows[sequence] + block_in_sequence * block_rows).astype(np.int32)[order]
        sequence = sequence[order]
        self._group, self._tasks = group, (sequence, row)
        self._call.task_sequence, self._call.task_row = sequence.ctypes.data, row.ctypes.data
        self._call.num_tasks, self._call.block_rows = len(row), block_rows


def check_shape(layer: int, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    """Raises ConfigError where the kernel can't serve a layer."""
    if head_dim % LANES or head_dim > MAX_DIM or num_heads // num_kv_heads > MAX_QUERIES:
        raise ConfigError(
            f"deterministic inference wants a head size that {LANES} divides, up to {MAX_DIM}; layer {layer} has "
            f"head size {head_dim}, {num_heads} heads on {num_kv_heads}; leave generator.deterministic_inference out"
        )


class InvariantAttention:
    """The engine's AttentionBackend."""

    name = "invariant"

    def __init__(self, layers: dict[int, KVShape]) -> None:
        for index, shape in layers.items():
            check_shape(index, shape.num_heads, shape.num_kv_heads, shape.head_dim)
        self._batch: PagedBatch | None = None
        self._table: SequenceTable | None = None

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
        if batch is not self._batch or self._table is None:
            slots = batch.slot_table.numpy()
            seats = np.asarray(batch.request_seats, dtype=np.int64)
            self._batch = batch
            self._table = SequenceTable(
                positions=batch.row_positions.numpy(),
                cu_rows=np.asarray(batch.cu_rows, dtype=np.int32),
                table=slots,
                table_start=seats * (slots.strides[0] // slots.itemsize),
            )
        key_pool[batch.row_slots] = key
        value_pool[batch.row_slots] = value
        return self._table.attend(query, key_pool, value_pool, scaling=scaling, window=window)


class PackedInvariantAttention:
    """The trainer's AttentionContext over a micro-batch's segments.

    Forward is the kernel; the gradient is that of `plain`, the trainer's usual attention, computed for it again.
    """

    def __init__(self, micro_batch: MicroBatch, plain: AttentionContext) -> None:
        k_bounds = micro_batch.cu_seqlens_k.numpy()
        self._plain = plain
        self._table = SequenceTable(
            positions=np.ascontiguousarray(micro_batch.position_ids.numpy()),
            cu_rows=micro_batch.cu_seqlens_q.numpy().astype(np.int32),
            table=micro_batch.kv_rows.numpy().astype(np.int32),
            table_start=k_bounds[:-1].astype(np.int64),
        )

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
        check_shape(layer_idx, query.shape[1], key.shape[1], query.shape[2])
        options = {"scaling": scaling, "sliding_window": sliding_window}
        if not torch.is_grad_enabled():
            return self._table.attend(query, key, value, scaling=scaling, window=sliding_window)
        out: torch.Tensor = _Packed.apply(query, key, value, self._table, self._plain, layer_idx, options)  # type: ignore[no-untyped-call]
        return out


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        table: SequenceTable,
        plain: AttentionContext,
        layer_idx: int,
        options: dict[str, Any],
    ) -> torch.Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.plain, ctx.layer_idx, ctx.options = plain, layer_idx, options
        return table.attend(query, key, value, scaling=options["scaling"], window=options["sliding_window"])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[torch.Tensor | None, ...]:
        inputs = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        with torch.enable_grad():
            out = ctx.plain.attend(ctx.layer_idx, *inputs, **ctx.options)
        needed: Sequence[torch.Tensor | None] = torch.autograd.grad(out, inputs, grads[0])
        return (*needed, None, None, None, None)
