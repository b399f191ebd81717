"""Everything for one large GPU in one run of under 8 minutes, the table last.

    python -m benchmarks.h200

First the ceilings, then the jobs below, in order while time is left; one that would start too late is a row that
says so. The Qwen2.5-0.5B shape, random weights, bfloat16. A job's own table and log are beside this one's.
"""

from __future__ import annotations

import argparse
import gc
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import grpo_step, machine, rollouts
from benchmarks.contest import speedup
from benchmarks.limits import measure_ceilings
from benchmarks.models import SHAPES
from benchmarks.report import RESULTS, Report

BUDGET_S = 440.0


@dataclass(frozen=True, kw_only=True)
class Job:
    """`max_s`: the job starts only while this much is left. A peer that takes minutes is left out of large jobs."""

    name: str
    max_s: float
    run: Callable[[list[str]], list[list[str]]]
    argv: str


def rollout_rows(argv: list[str]) -> list[list[str]]:
    contestants = rollouts.main(["--modes", "sampled", "--repetitions", "2", *argv])
    return [
        [c.name, c.error or c.setting, c.headline.get("sampled", ""), speedup(contestants, c, "sampled")]
        for c in contestants
    ]


def step_rows(argv: list[str]) -> list[list[str]]:
    contestants = grpo_step.main(["--rounds", "1", "--steps", "2", *argv])
    return [
        [c.name, c.error or c.setting, c.headline.get(grpo_step.STEP, ""), speedup(contestants, c, grpo_step.STEP)]
        for c in contestants
    ]


JOBS = (
    Job(
        name="256 requests, 128/256",
        max_s=200,
        run=rollout_rows,
        argv="--requests 256 --prompt 128 --new 256 --generate-batches 256 --generate-caches dynamic --concurrent 256",
    ),
    Job(
        name="GRPO step, 32 prompts x 8 samples, 128/256",
        max_s=100,
        run=step_rows,
        argv="--prompts 32 --samples 8 --prompt 128 --new 256 --micro-batch-tokens 16384 "
        "--trl-generation dynamic --trl-micro-batches 32",
    ),
    Job(
        name="64 requests of mixed length",
        max_s=70,
        run=rollout_rows,
        argv="--requests 64 --engines generate,skyrl_train --generate-batches 64 --generate-caches dynamic",
    ),
    Job(
        name="1 request, 128/256",
        max_s=60,
        run=rollout_rows,
        argv="--requests 1 --prompt 128 --new 256 --engines generate,skyrl_train --generate-caches dynamic",
    ),
    Job(
        name="1024 requests, 128/256",
        max_s=60,
        run=rollout_rows,
        argv="--requests 1024 --prompt 128 --new 256 --engines skyrl_train",
    ),
    Job(
        name="256 requests, 128/256, static cache, compiled by transformers",
        max_s=150,
        run=rollout_rows,
        argv="--requests 256 --prompt 128 --new 256 --engines generate --generate-batches 256 --generate-caches static "
        "--name rollouts-256-static",
    ),
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.h200", description=__doc__.splitlines()[0])
    parser.add_argument("--budget-s", type=float, default=BUDGET_S)
    parser.add_argument("--jobs", type=_ints, default=tuple(range(len(JOBS))), help="numbers, from 0; default: all")
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    start = time.perf_counter()
    name = machine.slug(args.device)
    report = Report(f"Qwen2 of shape {args.shape}, {args.dtype}, on {name}", f"h200-{args.shape}-{name}", args.out)
    ceilings = measure_ceilings(SHAPES[args.shape], args.device, getattr(torch, args.dtype))
    report.log(str(ceilings))
    common = ["--shape", args.shape, "--device", args.device, "--dtype", args.dtype, "--out", str(args.out)]
    rows = []
    for job in (JOBS[i] for i in args.jobs):
        left = args.budget_s - (time.perf_counter() - start)
        if left < job.max_s:
            report.log(f"{job.name}: not run, {left:.0f} s are left and it may take {job.max_s:.0f} s")
            rows.append([job.name, "not run: the time was over", "", "", ""])
            continue
        report.log(job.name)
        try:
            rows += [[job.name, *row] for row in job.run([*common, *job.argv.split()])]
        except Exception as exc:  # one job that fails is a row; the others still run
            report.log(traceback.format_exc())
            rows.append([job.name, f"{type(exc).__name__}: {(str(exc).splitlines() or [''])[0][:200]}", "", "", ""])
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()
    report.facts({**machine.describe(args.device), "measured ceilings": str(ceilings)})
    report.table(("workload", "engine", "setting", "median", "over the best peer"), rows)
    report.save()


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    main()
