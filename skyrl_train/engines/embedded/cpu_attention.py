"""Paged attention on the CPU by the C kernel in native/attention.c, float32 or bfloat16."""

from __future__ import annotations

import ctypes

import numpy as np
import torch

from skyrl_train.engines.embedded.attention import PagedBatch
from skyrl_train.engines.embedded.config import KVShape

LANES = 16
DTYPES = (torch.float32, torch.bfloat16)
MAX_QUERIES = 64
MAX_DIM = 256


class _Step(ctypes.Structure):
    """`Step` of attention.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("row_slots", "row_positions", "request_seats", "cu_rows", "slot_table")),
        *((name, ctypes.c_void_p) for name in ("task_request", "task_row")),
        ("table_stride", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("num_rows", "num_tasks", "block_rows", "num_threads")),
        *((name, ctypes.c_int32) for name in ("num_heads", "num_kv_heads", "head_dim", "is_bfloat16")),
    )


class _Layer(ctypes.Structure):
    """`Layer` of attention.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("keys", "values", "query", "key", "value", "out")),
        *((name, ctypes.c_int64) for name in ("query_row", "query_head", "key_row", "key_head")),
        *((name, ctypes.c_int64) for name in ("value_row", "value_head")),
        ("scaling", ctypes.c_float),
        ("window", ctypes.c_int32),
    )


class CpuAttention:
    """`native` is the library of native.build."""

    name = "cpu"

    def __init__(self, native: ctypes.CDLL) -> None:
        self._kernel = native.paged_attention
        self._kernel.restype = None
        self._kernel.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
        self._batch: PagedBatch | None = None
        self._step = _Step()
        self._layer = _Layer()
        self._kept: tuple[np.ndarray, ...] = ()

    @staticmethod
    def supports(shape: KVShape) -> bool:
        fits = shape.head_dim % LANES == 0 and shape.head_dim <= MAX_DIM
        return fits and shape.num_heads // shape.num_kv_heads <= MAX_QUERIES and shape.dtype in DTYPES

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
        num_rows, num_heads, head_dim = query.shape
        if batch is not self._batch or self._step.num_heads != num_heads:
            self._step.is_bfloat16 = query.dtype == torch.bfloat16
            self._begin(batch, num_rows, num_heads, key.shape[1], head_dim)
        out = torch.empty((num_rows, num_heads, head_dim), dtype=query.dtype)
        layer = self._layer
        layer.keys, layer.values = key_pool.data_ptr(), value_pool.data_ptr()
        layer.query, layer.key, layer.value = query.data_ptr(), key.data_ptr(), value.data_ptr()
        layer.out = out.data_ptr()
        layer.query_row, layer.query_head, _ = query.stride()
        layer.key_row, layer.key_head, _ = key.stride()
        layer.value_row, layer.value_head, _ = value.stride()
        layer.scaling, layer.window = scaling, window or 0
        self._kernel(ctypes.addressof(self._step), ctypes.addressof(layer))
        return out

    def step_address(self, batch: PagedBatch, num_rows: int, shape: KVShape) -> int:
        """Of the C structure `Step` for this batch; valid until the next one."""
        self._step.is_bfloat16 = shape.dtype == torch.bfloat16
        self._begin(batch, num_rows, shape.num_heads, shape.num_kv_heads, shape.head_dim)
        return ctypes.addressof(self._step)

    def _begin(self, batch: PagedBatch, num_rows: int, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        """What all layers of this step share."""
        block_rows = max(MAX_QUERIES // (num_heads // num_kv_heads), 1)
        cu_rows = np.asarray(batch.cu_rows, dtype=np.int32)
        request_seats = np.asarray(batch.request_seats, dtype=np.int32)
        rows_of_request = np.diff(cu_rows)
        blocks = -(-rows_of_request // block_rows)
        task_request = np.repeat(np.arange(len(blocks), dtype=np.int32), blocks)
        first_task = np.cumsum(blocks) - blocks
        block_in_request = np.arange(len(task_request)) - first_task[task_request]
        task_row = (cu_rows[task_request] + block_in_request * block_rows).astype(np.int32)
        # Long prompts' blocks are the slowest tasks: let them start first, and in the order of what they read.
        order = np.argsort(-rows_of_request[task_request], kind="stable")
        task_request, task_row = task_request[order], task_row[order]
        self._batch, self._kept = batch, (cu_rows, request_seats, task_request, task_row)
        step = self._step
        step.row_slots, step.row_positions = batch.row_slots.data_ptr(), batch.row_positions.data_ptr()
        step.slot_table, step.table_stride = batch.slot_table.data_ptr(), batch.slot_table.stride(0)
        step.cu_rows, step.request_seats = cu_rows.ctypes.data, request_seats.ctypes.data
        step.task_request, step.task_row = task_request.ctypes.data, task_row.ctypes.data
        step.num_rows, step.num_tasks, step.block_rows = num_rows, len(task_request), block_rows
        step.num_heads, step.num_kv_heads, step.head_dim = num_heads, num_kv_heads, head_dim
        step.num_threads = torch.get_num_threads()
