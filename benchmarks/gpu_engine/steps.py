"""One decode step: milliseconds on the device and in the engine, by kernels and batch, beside the limit; a profile.

    python -m benchmarks.gpu_engine.steps --out DIR
    python -m benchmarks.gpu_engine.steps --kernels compiled --cases 256x256 --out DIR

A case is BATCHxCONTEXT: requests with a context of so many tokens; half way of a rollout of (128, 256) it is 256.
"device": replays of the captured step, one after the other. "engine": steps of the engine, planning, upload, the
tokens' way to the host and their bookkeeping included. The limit is the weights and all requests' keys and values, read
once, over the rate of a copy of that size.
"""

from __future__ import annotations

import argparse
import gc
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from benchmarks import machine
from benchmarks.gpu_engine.variants import Clock, Rows, Work, add_all, core_for, dtype_of, model_for, parser_of
from benchmarks.machine import copy_bytes_per_s
from benchmarks.models import SHAPES
from benchmarks.report import Report
from skyrl_train.engines.embedded.core import EngineCore

CASES = "1x256,8x256,64x256,256x256,1024x256,256x1024"
NUM_TIMED, NUM_PROFILED, TOP = 50, 5, 25
CASE_S = 20.0


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("python -m benchmarks.gpu_engine.steps", __doc__)
    parser.add_argument("--kernels", type=lambda text: tuple(text.split(",")), default=("plain", "fused"))
    parser.add_argument("--cases", default=CASES)
    parser.add_argument("--profile", default="256x256,1x256", help="cases that are profiled")
    parser.add_argument("--timed", type=int, default=NUM_TIMED)
    args = parser.parse_args(argv)
    clock = Clock(args.budget_s)
    name = f"gpu-steps-{'-'.join(args.kernels)}-{args.shape}-{machine.slug(args.device)}"
    report = Report(f"Decode steps of shape {args.shape}", name, args.out)
    rows = Rows(args.out / f"{name}.json", args.device)
    shape, dtype = SHAPES[args.shape], dtype_of(args.device)
    weight_bytes = shape.num_step_weights * dtype.itemsize
    copy = copy_bytes_per_s(args.device, min(max(weight_bytes, 2**24), 2**31))
    report.log(f"a copy of {weight_bytes / 1e6:.0f} MB moves {copy / 1e12:.2f} TB/s, bytes read and written")
    model = model_for(args)
    table, profiles = [], []
    for case in args.cases.split(","):
        batch, context = (int(part) for part in case.split("x"))
        limit_ms = 1e3 * (weight_bytes + batch * context * shape.kv_bytes_per_token(dtype)) / copy
        for kernels in args.kernels:
            if clock.left_s < CASE_S and args.device == "cuda":
                report.log(f"{case}, {kernels}: not run, {clock.left_s:.0f} s are left")
                continue
            try:
                device_ms, engine_ms, text = measure(
                    model, batch, context, kernels, args, shown=case in args.profile.split(",")
                )
            except Exception as exc:  # one case that fails is a row
                report.log(traceback.format_exc())
                table.append([case, kernels, f"{type(exc).__name__}: {str(exc)[:150]}", "", "", "", ""])
                rows.add(case=case, kernels=kernels, error=f"{type(exc).__name__}: {exc}")
                continue
            finally:
                forget(args.device)
            report.log(f"{case}, {kernels}: device {device_ms} ms, engine {engine_ms:.3f} ms, limit {limit_ms:.3f} ms")
            rows.add(
                case=case, kernels=kernels, batch=batch, device_ms=device_ms, engine_ms=engine_ms, limit_ms=limit_ms
            )
            table.append(
                [
                    case,
                    kernels,
                    "" if device_ms is None else f"{device_ms:.3f}",
                    f"{engine_ms:.3f}",
                    f"{limit_ms:.3f}",
                    "" if device_ms is None else f"{limit_ms / device_ms:.0%}",
                    f"{1e3 * batch / engine_ms:,.0f}",
                ]
            )
            if text:
                profiles.append(f"## Kernels of one step, {case}, {kernels}\n\n```\n{text}\n```")
    report.facts({**machine.describe(args.device), "dtype": str(dtype), "copy": f"{copy / 1e12:.2f} TB/s"})
    head = ["requests x context", "kernels", "device, ms", "engine, ms", "limit, ms", "limit / device", "tokens/s"]
    report.table(head, table)
    for text in profiles:
        report.text(text)
    report.save()
    if any("Error" in cell for row in table for cell in row):
        raise SystemExit(1)


def forget(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def measure(
    model: PreTrainedModel, batch: int, context: int, kernels: str, args: argparse.Namespace, *, shown: bool
) -> tuple[float | None, float, str]:
    """Milliseconds on the device and of the engine, and the profile where it is `shown`."""
    on_gpu = args.device == "cuda"
    room = args.timed + 60
    work = Work(count=batch, prompt=context - 20, new=room)
    core = core_for(model, work, "plain" if kernels == "compiled" else kernels, enable_prefix_caching=False)
    if kernels == "compiled":
        from benchmarks.gpu_engine.compiled import compile_runner

        compile_runner(core._runner)  # type: ignore[arg-type]
    add_all(core, work.requests(SHAPES[args.shape].vocab_size), temperature=1.0)
    while core.scheduler.num_waiting or core.scheduler._prefilling:
        core.step()
    for _ in range(20 if on_gpu else 2):
        core.step()
    engine_ms = 1e3 * _seconds(core.step, args.timed, args.device)
    core.pause("keep")
    replay = _replay_of(core)
    if replay is None or not on_gpu:
        return None, engine_ms, ""
    for _ in range(3):
        replay()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(args.timed):
        replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / args.timed, engine_ms, _profile(replay) if shown else ""


def _seconds(action: Callable[[], Any], count: int, device: str) -> float:
    machine.synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        action()
    machine.synchronize(device)
    return (time.perf_counter() - start) / count


def _replay_of(core: EngineCore) -> Callable[[], Any] | None:
    """Runs the last decode step's graph again."""
    runner: Any = core._runner
    if hasattr(runner, "_steps"):
        steps = list(runner._steps.values())
        return steps[-1].run if steps else None
    graphs = list(getattr(runner, "_graphs", {}).values())
    return graphs[-1].replay if graphs else None


def _profile(replay: Callable[[], Any]) -> str:
    """The kernels with most time: their share, microseconds a step, how often, microseconds each."""
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        for _ in range(NUM_PROFILED):
            replay()
        torch.cuda.synchronize()
    kernels = [e for e in profiler.key_averages() if e.self_device_time_total > 0]
    kernels.sort(key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in kernels)
    count = sum(e.count for e in kernels)
    lines = [f"{count / NUM_PROFILED:.0f} kernels, {total / NUM_PROFILED:.0f} us in them"]
    for e in kernels[:TOP]:
        each = e.self_device_time_total / e.count
        step = e.self_device_time_total / NUM_PROFILED
        share = e.self_device_time_total / total
        lines.append(f"{share:6.1%} {step:8.1f} us {e.count / NUM_PROFILED:6.0f} x {each:7.2f}  {e.key[:90]}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
