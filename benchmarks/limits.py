"""The physical limit of a workload: bytes that must be read and operations that must be done, over the machine's rates.

An ideal scheduler runs all requests at once. Step t has the a(t) requests that want more than t tokens; it reads the
step's weights once and each request's keys and values once, and does two operations per weight and token:

    seconds(t) = max(bytes(t) / copy rate, operations(t) / matmul rate)

The prompts' prefill is bound by its operations. Nothing is counted for sampling, so the limit can't be reached.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.grpo.work import StepWork
from benchmarks.machine import copy_bytes_per_s, matmul_flops_per_s
from benchmarks.models import ModelShape
from benchmarks.workload import Request, num_new_tokens

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """Measured on this machine: `copy` counts bytes read and written, over a buffer of `copy_bytes`."""

    copy_bytes: int
    copy_bytes_per_s: float
    matmul_size: int
    matmul_flops_per_s: float
    dtype: torch.dtype

    def __str__(self) -> str:
        return (
            f"copy of {self.copy_bytes / MIB:.0f} MiB {self.copy_bytes_per_s / 1e9:.1f} GB/s, "
            f"{self.matmul_size} x {self.matmul_size} matrix product in {str(self.dtype).removeprefix('torch.')} "
            f"{self.matmul_flops_per_s / 1e12:.3g} TFLOP/s"
        )


@dataclass(frozen=True, kw_only=True)
class RolloutLimit:
    """`bytes_per_s`-bound and `flops`-bound seconds of the decode steps, and the seconds of the whole."""

    step_weight_bytes: int
    kv_bytes: int
    flops: float
    seconds: float
    tokens_per_s: float


def measure_ceilings(
    shape: ModelShape, device: str, dtype: torch.dtype, *, threads: Sequence[int] | None = None
) -> Ceilings:
    """The best over the thread counts `threads` (default: as torch is set).

    The copy has the size of the weights, so that a model which fits a processor's cache gets the cache's rate.
    """
    weights = shape.num_step_weights * dtype.itemsize
    copy_bytes = min(max(weights, 16 * MIB), 2048 * MIB)
    matmul_size = 8192 if device == "cuda" else 512
    return Ceilings(
        copy_bytes=copy_bytes,
        copy_bytes_per_s=_best(lambda: copy_bytes_per_s(device, copy_bytes), threads),
        matmul_size=matmul_size,
        matmul_flops_per_s=_best(lambda: matmul_flops_per_s(device, dtype, matmul_size), threads),
        dtype=dtype,
    )


def _best(measure: Callable[[], float], threads: Sequence[int] | None) -> float:
    before = torch.get_num_threads()
    rates = []
    for n in threads or (before,):
        torch.set_num_threads(n)
        rates.append(measure())
    torch.set_num_threads(before)
    return max(rates)


def rollout_limit(shape: ModelShape, requests: Sequence[Request], ceilings: Ceilings) -> RolloutLimit:
    weight_bytes = shape.num_step_weights * ceilings.dtype.itemsize
    kv_bytes_per_token = shape.kv_bytes_per_token(ceilings.dtype)
    flops = seconds = 0.0
    kv_bytes = 0
    for request in requests:
        n = len(request.prompt_token_ids)
        prefill = 2.0 * shape.num_layer_weights * n + shape.attention_flops(1) * n * (n + 1) / 2
        flops += prefill
        seconds += prefill / ceilings.matmul_flops_per_s
    for t in range(max(request.max_new_tokens for request in requests)):
        contexts = [len(r.prompt_token_ids) + t for r in requests if r.max_new_tokens > t]
        step_flops = 2.0 * shape.num_step_weights * len(contexts) + shape.attention_flops(1) * sum(contexts)
        step_kv = kv_bytes_per_token * sum(contexts)
        kv_bytes += step_kv
        flops += step_flops
        seconds += max((weight_bytes + step_kv) / ceilings.copy_bytes_per_s, step_flops / ceilings.matmul_flops_per_s)
    return RolloutLimit(
        step_weight_bytes=weight_bytes,
        kv_bytes=kv_bytes,
        flops=flops,
        seconds=seconds,
        tokens_per_s=num_new_tokens(requests) / seconds,
    )


def training_flops(shape: ModelShape, work: StepWork) -> float:
    """Forward and backward of one step, each prompt once for its samples: 6 operations a weight and token.

    The head is counted where a completion's token is predicted. Optimizer and recomputation are not counted.
    """
    num_rows = sum(work.prompt_lens) + work.num_completion_tokens
    attention = 0.0
    for n, lens in zip(work.prompt_lens, work.completion_lens, strict=True):
        pairs = n * (n + 1) / 2 + sum(n * m + m * (m + 1) / 2 for m in lens)
        attention += shape.attention_flops(1) * pairs
    products = shape.num_layer_weights * num_rows + shape.num_head_weights * work.num_completion_tokens
    return 6.0 * products + 3 * attention
