"""Rates of matrix products with few rows on this CPU: torch's, oneDNN's and our own on packed weights, one thread.

    python -m benchmarks.products

The best of many short runs each, in turns: on a machine that others use too, these are its undisturbed moments.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks import machine
from benchmarks.report import RESULTS, Report
from skyrl_train.engines.embedded.native.build import load_native
from skyrl_train.engines.embedded.packed_linear import Packing

MATRICES = ((256, 256), (1024, 256), (256, 1024), (4096, 256), (4864, 896))
"""(outputs, inputs): of the tiny shape, the last of Qwen2.5-0.5B's."""
ROWS = (1, 2, 4, 8, 16, 33, 64, 512)
ROUNDS, SECONDS = 40, 0.002


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.products", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    report = Report("Matrix products with few rows", f"products-{machine.slug('cpu')}", args.out)
    report.facts(machine.describe("cpu"))
    for dtype in (torch.float32, torch.bfloat16):
        report.text(f"## {str(dtype).removeprefix('torch.')}: GFLOP/s, one thread")
        report.table(("outputs x inputs", "", *(f"{n} rows" for n in ROWS)), rows_of(dtype, report))
    report.save()


@torch.inference_mode()
def rows_of(dtype: torch.dtype, report: Report) -> list[list[str]]:
    table = []
    for n, k in MATRICES:
        rates: dict[str, list[float]] = {"torch": [], "oneDNN, packed": [], "ours, packed": []}
        for rows in ROWS:
            x, linear = torch.randn(rows, k).to(dtype), torch.nn.Linear(k, n, bias=False, dtype=dtype)
            matrix = Packing(load_native()).matrix(linear)
            packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight, rows)
            actions: dict[str, Callable[[], object]] = {
                "torch": lambda x=x, w=linear.weight: torch.nn.functional.linear(x, w),
                "oneDNN, packed": lambda x=x, w=packed: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], ""),
                "ours, packed": lambda x=x, matrix=matrix: matrix(x),
            }
            for name, seconds in best_of_turns(actions).items():
                rates[name].append(2e-9 * rows * n * k / seconds)
        for name, found in rates.items():
            report.log(f"{n} x {k}, {name}: {', '.join(f'{rate:.0f}' for rate in found)}")
            table.append([f"{n} x {k}", name, *(f"{rate:.0f}" for rate in found)])
    return table


def best_of_turns(actions: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds of one call each."""
    calls, best = {}, {}
    for name, action in actions.items():
        action()
        start = time.perf_counter()
        action()
        calls[name] = max(int(SECONDS / (time.perf_counter() - start)), 1)
    for _ in range(ROUNDS):
        for name, action in actions.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                action()
            seconds = (time.perf_counter() - start) / calls[name]
            best[name] = min(best.get(name, seconds), seconds)
    return best


if __name__ == "__main__":
    main()
