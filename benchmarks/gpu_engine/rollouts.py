"""Whole rollouts, prefill included: plain and fused kernels in turns on the same weights and requests.

    python -m benchmarks.gpu_engine.rollouts --out DIR

Works are COUNTxPROMPTxNEW; 32*8x128x256 are 32 prompts with 8 samples each. Sampled at temperature 1 with the
log-probability of each token; no token ends an answer. Before each run the prefix cache is emptied. The first run of
each engine, which captures graphs, is not counted. A few answers of each go through transformers' own attention: an
engine whose log-probabilities are off by more than bfloat16 explains is marked as wrong.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
import traceback
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks import machine
from benchmarks.check import WrongOutput, check_outputs
from benchmarks.gpu_engine.variants import (
    KERNELS,
    Clock,
    Rows,
    Work,
    add_all,
    core_for,
    dtype_of,
    model_for,
    parser_of,
    run_to_the_end,
    works,
)
from benchmarks.limits import Ceilings, measure_ceilings, rollout_limit
from benchmarks.models import SHAPES, twin_on_same_weights
from benchmarks.report import Report
from benchmarks.workload import Output, Request
from skyrl_train.engines.embedded.core import EngineCore

WORKS = "1x128x256,8x128x256,64x128x256,256x128x256,1024x128x256,256x512x1024,32*8x128x256,32*8x1024x256"
RULED = "256x128x128"
RULES = {"top_p": 0.9, "repetition_penalty": 1.1}
NUM_CHECKED = 3
SIDES = (*KERNELS, "fused, nothing shared")


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("python -m benchmarks.gpu_engine.rollouts", __doc__)
    parser.add_argument("--cases", type=works, default=works(WORKS))
    parser.add_argument("--ruled", default=RULED, help="the work that is sampled with top-p and a penalty too; or none")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--name", default="rollouts")
    args = parser.parse_args(argv)
    clock = Clock(args.budget_s)
    name = f"gpu-{args.name}-{args.shape}-{machine.slug(args.device)}"
    report = Report(f"Rollouts of shape {args.shape}, one GPU", name, args.out)
    rows = Rows(args.out / f"{name}.json", args.device)
    ceilings = measure_ceilings(SHAPES[args.shape], args.device, dtype_of(args.device))
    report.log(str(ceilings))
    model = model_for(args)
    reference = twin_on_same_weights(model, attn_implementation="sdpa")
    table: list[list[str]] = []
    cases: list[tuple[Work, dict[str, Any]]] = [(work, {}) for work in args.cases]
    if args.ruled != "none":
        cases.append((Work.parse(args.ruled), RULES))
    for work, rules in cases:
        text = f"{work}, {', '.join(f'{k} {v}' for k, v in rules.items())}" if rules else str(work)
        if clock.left_s < 25 and args.device == "cuda":
            report.log(f"{text}: not run, {clock.left_s:.0f} s are left")
            table.append([text, "not run: the time was over", *[""] * (len(HEAD) - 2)])
            continue
        table += one_work(model, reference, work, rules, text, args, report, rows, ceilings, clock)
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()
    report.facts({**machine.describe(args.device), "measured ceilings": str(ceilings)})
    report.table(HEAD, table)
    report.save()
    if any("Error" in cell or "WRONG" in cell for row in table for cell in row):
        raise SystemExit(1)


HEAD = [
    "work",
    "kernels",
    "tokens/s",
    "over plain",
    "of the limit",
    "seconds (min to max)",
    "prompts alone, s",
    "check",
]


def one_work(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    work: Work,
    rules: dict[str, Any],
    text: str,
    args: argparse.Namespace,
    report: Report,
    rows: Rows,
    ceilings: Ceilings,
    clock: Clock,
) -> list[list[str]]:
    requests = work.requests(SHAPES[args.shape].vocab_size, args.seed)
    limit = rollout_limit(SHAPES[args.shape], requests, ceilings)
    sides = SIDES if work.group > 1 else KERNELS
    cores: dict[str, EngineCore] = {}
    errors: dict[str, str] = {}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    prompts: dict[str, list[float]] = {side: [] for side in sides}
    checks: dict[str, str] = {}
    # Fused first: it lays the weights out, and a plain engine's graphs must not have been captured before that.
    for side in sorted(sides, key=lambda side: not side.startswith("fused")):
        try:
            cores[side] = core_for(model, work, side.split(",")[0])
            if side.endswith("nothing shared"):
                cores[side]._runner._prefix_groups = lambda chosen: []  # type: ignore[attr-defined]
            one_run(cores[side], requests, min(work.new, 8), rules, args.device)  # captures and compiles
        except Exception as exc:  # one side that fails is a row
            report.log(traceback.format_exc())
            errors[side] = f"{type(exc).__name__}: {str(exc)[:150]}"
    for repetition in range(args.repetitions):
        for side in sides:
            if side in errors or (repetition and clock.left_s < 15):
                continue
            try:
                prompts[side].append(one_run(cores[side], requests, 1, rules, args.device)[0])
                took, done = one_run(cores[side], requests, work.new, rules, args.device)
            except Exception as exc:
                report.log(traceback.format_exc())
                errors[side] = f"{type(exc).__name__}: {str(exc)[:150]}"
                continue
            seconds[side].append(took)
            report.log(f"{text}, {side}: {took:.3f} s, prompts alone {prompts[side][-1]:.3f} s")
            if side not in checks:
                checks[side] = checked(reference, requests, done)
    result = []
    tokens = work.count * work.new
    for side in sides:
        if side in errors or not seconds[side]:
            message = errors.get(side, "not run: the time was over")
            rows.add(work=text, kernels=side, error=message)
            result.append([text, side, message, *[""] * (len(HEAD) - 3)])
            continue
        median = statistics.median(seconds[side])
        plain = statistics.median(seconds["plain"]) if seconds["plain"] else None
        rows.add(
            work=text,
            kernels=side,
            tokens_per_s=tokens / median,
            seconds=seconds[side],
            prompt_seconds=prompts[side],
            limit_tokens_per_s=limit.tokens_per_s,
            check=checks[side],
        )
        result.append(
            [
                text,
                side,
                f"{tokens / median:,.0f}",
                "" if plain is None else f"{plain / median:.2f}",
                f"{tokens / median / limit.tokens_per_s:.0%}",
                f"{median:.3f} ({min(seconds[side]):.3f} to {max(seconds[side]):.3f})",
                f"{statistics.median(prompts[side]):.3f}",
                checks[side],
            ]
        )
    return result


def one_run(
    core: EngineCore, requests: Sequence[Request], new: int, rules: dict[str, Any], device: str
) -> tuple[float, dict[str, Any]]:
    """Seconds, and the completions. Prompts are computed anew; in a group, once for its samples."""
    core.flush_cache()
    machine.synchronize(device)
    start = time.perf_counter()
    add_all(core, requests, new=new, temperature=1.0, **rules)
    done = run_to_the_end(core)
    machine.synchronize(device)
    return time.perf_counter() - start, done


def checked(reference: PreTrainedModel, requests: Sequence[Request], done: dict[str, Any]) -> str:
    shown = range(min(NUM_CHECKED, len(requests)))
    outputs = [Output(token_ids=done[f"{i}"].token_ids, logprobs=done[f"{i}"].logprobs) for i in shown]
    try:
        return str(check_outputs(reference, [requests[i] for i in shown], outputs, greedy=False))
    except WrongOutput as exc:
        return f"WRONG: {exc}"


if __name__ == "__main__":
    main()
