"""The asynchronous loop beside the synchronous one on the same work: samples per second, and what was learned.

    python -m benchmarks.async_vs_sync                           # both tasks on this CPU
    python -m benchmarks.async_vs_sync --device cuda --dtype bfloat16 --shape 0.5b \\
        --prompts 32 --mean 128 --longest 1024

Two tasks. "ragged": a random model of any shape whose answers have geometric lengths, so that some are many times as
long as most; the reward is one that it can learn. "arithmetic": the built-in task and its held-out accuracy.
Each mode is a run of the main job: `sync`, or a staleness (0, 1, 4), `4free` without trainer.fully_async.deterministic.

Samples per second are those of the steps after the warm-up and before the last ones, where nothing is generated ahead
any more; the seconds of evaluations and checkpoints are taken off for everybody.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks import machine
from benchmarks.learning.job import ROOT, JobFailed, Outcome, mean_around, run_job
from benchmarks.learning.ragged import stop_ids, write_work
from benchmarks.models import SHAPES
from benchmarks.report import RESULTS, Report
from skyrl_train.observability.metrics import STEP_SECONDS, Row
from skyrl_train.observability.text import ACCURACY, REWARD

TASKS = ("ragged", "arithmetic")
MODES = ("sync", "0", "1", "4")
ASIDE = ("timing/evaluate_s", "timing/checkpoint_s", "timing/export_s")
"""Not generation, not training: left out of a step's seconds."""
MIN_RUN_S = 10.0
"""With less time left no run is started."""
COLUMNS = ("mode", "threads", "samples/s", "over sync", "seconds a step", "rollout s", "train s", "landing s")
LEARNED = ("behind, mean (max)", "reward, first", "reward, last", "held-out accuracy", "wall s", "others")


@dataclass(kw_only=True)
class Mode:
    """`staleness` None is the synchronous loop."""

    name: str
    staleness: int | None
    free: bool
    threads: int | None
    outcomes: list[Outcome] = field(default_factory=list)
    others: list[float] = field(default_factory=list)
    error: str = ""

    @classmethod
    def parse(cls, text: str, threads: int | None) -> Mode:
        if text == "sync":
            return cls(name=text, staleness=None, free=False, threads=threads)
        match = re.fullmatch(r"(\d+)(free)?", text)
        if match is None:
            raise ValueError(f"a mode is sync, a staleness as 1, or 1free; found {text!r}")
        name = f"staleness {match[1]}" + (", landing at once" if match[2] else "")
        return cls(name=name, staleness=int(match[1]), free=bool(match[2]), threads=threads)

    @property
    def settings(self) -> list[str]:
        if self.staleness is None:
            return []
        return [
            "trainer.fully_async.enabled=true",
            f"trainer.fully_async.max_staleness_steps={self.staleness}",
            f"trainer.fully_async.deterministic={str(not self.free).lower()}",
        ]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.async_vs_sync", description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=_words, default=TASKS)
    parser.add_argument("--modes", type=_words, default=MODES)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=_ints, default=(None,), help="OpenMP threads; each mode runs with each")
    parser.add_argument("--rounds", type=int, default=1, help="how often the modes take turns")
    parser.add_argument("--steps", type=int, default=16, help="of ragged")
    parser.add_argument("--arithmetic-steps", type=int, default=60)
    parser.add_argument("--warmup", type=int, default=3, help="steps that are not counted")
    parser.add_argument("--timeout-s", type=float, default=600.0, help="of one run")
    parser.add_argument("--budget-s", type=float, default=math.inf, help="of all; what doesn't fit any more is not run")
    parser.add_argument("--seed", type=int, default=42)
    ragged = parser.add_argument_group("ragged")
    ragged.add_argument("--shape", choices=SHAPES, default="tiny")
    ragged.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    ragged.add_argument("--prompts", type=int, default=8, help="of a step")
    ragged.add_argument("--samples", type=int, default=8, help="of a prompt")
    ragged.add_argument("--prompt-chars", type=int, default=64, help="tokens of a prompt")
    ragged.add_argument("--mean", type=int, default=48, help="tokens of an answer on average")
    ragged.add_argument("--longest", type=int, default=384, help="tokens of an answer at most")
    ragged.add_argument("--lr", type=float, default=None, help="default: 1e-3 for a tiny shape, else 1e-5")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "async_vs_sync")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    if unknown := set(args.tasks) - set(TASKS):
        parser.error(f"--tasks: unknown {', '.join(sorted(unknown))}; there are {', '.join(TASKS)}")
    for text in args.modes:
        try:
            Mode.parse(text, None)
        except ValueError as exc:
            parser.error(f"--modes: {exc}")
    args.lr = args.lr or (1e-3 if args.shape == "tiny" else 1e-5)
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, list[Mode]]:
    args = parse_args(argv)
    end = time.perf_counter() + args.budget_s
    results = {}
    for task in args.tasks:
        name = f"async-vs-sync-{task}{f'-{args.shape}' if task == 'ragged' else ''}-{machine.slug(args.device)}"
        report = Report(f"Asynchronous and synchronous training: {task}", name, args.out)
        overrides, num_samples, num_steps = work_of(task, args)
        report.log(" ".join(overrides).replace(f"{ROOT}/", "")[:2000])
        modes = [Mode.parse(text, threads) for threads in args.threads for text in args.modes]
        for i in range(args.rounds):
            for mode in modes:
                run_mode(mode, task, overrides, i, args, report, end=end)
        write(report, task, modes, args, num_samples, num_steps)
        results[task] = modes
    return results


def work_of(task: str, args: argparse.Namespace) -> tuple[list[str], int, int]:
    """The main job's settings that all modes share, the samples of a step and the number of steps."""
    gpus = [f"trainer.placement.policy_num_gpus_per_node={int(args.device == 'cuda')}", f"trainer.seed={args.seed}"]
    if task == "arithmetic":
        steps = args.arithmetic_steps
        # Half of the quickstart's rate: what is learned from stale samples then still holds.
        rate = "trainer.policy.optimizer_config.lr=1e-3"
        return [*gpus, rate, f"trainer.max_steps={steps}", f"trainer.eval_interval={steps}"], 128 * 8, steps
    model, data = write_work(
        args.runs,
        SHAPES[args.shape],
        num_prompts=args.prompts * args.steps,
        prompt_chars=args.prompt_chars,
        device=args.device,
        dtype=getattr(torch, args.dtype),
        seed=args.seed,
    )
    stops = stop_ids(SHAPES[args.shape].vocab_size, args.mean)
    overrides = [
        *gpus,
        f"trainer.policy.model.path={model.resolve()}",
        f"trainer.policy.model.dtype={args.dtype}",
        f"data.train_data=[{data.resolve()}]",
        "environment.env_class=benchmarks.learning.ragged:LowWords",
        "trainer.epochs=1",
        f"trainer.max_steps={args.steps}",
        f"trainer.train_batch_size={args.prompts}",
        f"generator.n_samples_per_prompt={args.samples}",
        f"generator.max_input_length={2 * args.prompt_chars}",
        f"generator.sampling_params.max_generate_length={args.longest}",
        f"generator.sampling_params.stop_token_ids=[{','.join(map(str, stops))}]",
        "trainer.eval_interval=-1",
        f"trainer.policy.optimizer_config.lr={args.lr}",
        "trainer.policy.optimizer_config.num_warmup_steps=0",
        "trainer.policy.optimizer_config.scheduler=constant",
        "trainer.max_tokens_per_micro_batch=16384",
    ]
    return overrides, args.prompts * args.samples, args.steps


def run_mode(
    mode: Mode,
    task: str,
    overrides: Sequence[str],
    round_: int,
    args: argparse.Namespace,
    report: Report,
    *,
    end: float,
) -> None:
    """One run; what fails, or isn't done at `end` by the performance counter, is a row that says so."""
    left = end - time.perf_counter()
    if mode.error:
        return
    if left < MIN_RUN_S:
        mode.error = "" if mode.outcomes else "not run: the time was over"
        return
    folder = args.runs / f"{task}-{mode.name.replace(' ', '-').replace(',', '')}-{mode.threads or 'all'}"
    meter = machine.LoadMeter()
    try:
        outcome = run_job(
            [*overrides, *mode.settings], folder, threads=mode.threads, timeout_s=min(args.timeout_s, left)
        )
    except JobFailed as exc:
        mode.error = str(exc).strip().splitlines()[-1][:200]
        report.log(f"{mode.name} is out: {exc}")
        return
    mode.outcomes.append(outcome)
    mode.others.append(meter.others_frac() or 0.0)
    report.log(f"{mode.name}, threads {mode.threads or 'all'}, round {round_}: {outcome.wall_s:.1f} s")
    for row in outcome.rows:
        report.log(f"  {row_line(row)}")


def row_line(row: Row) -> str:
    keys = (STEP_SECONDS, "timing/rollout_s", "timing/train_s", "timing/landing_s", *ASIDE, REWARD, ACCURACY)
    keys += ("rollout/response_len_mean", "async/version_lag_mean", "async/version_lag_max")
    return f"step {row['step']}: " + ", ".join(f"{key} {row[key]:.4g}" for key in keys if row.get(key) is not None)


def counted_steps(num_steps: int, warmup: int, modes: Sequence[Mode]) -> range:
    """The same for all modes: after the warm-up, and while the stalest one still generates ahead. At least one."""
    ahead = max((mode.staleness or 0 for mode in modes), default=0)
    first = min(warmup + 1, num_steps)
    return range(first, max(num_steps - ahead, first) + 1)


def seconds_of(row: Row) -> float:
    return float(row[STEP_SECONDS]) - sum(float(row.get(key) or 0.0) for key in ASIDE)


def write(
    report: Report, task: str, modes: Sequence[Mode], args: argparse.Namespace, num_samples: int, num_steps: int
) -> None:
    counted = counted_steps(num_steps, args.warmup, modes)
    shape = SHAPES[args.shape]
    work = (
        f"Qwen2 of shape {args.shape}, {shape.num_step_weights / 1e6:.0f} million weights, {args.dtype}; "
        f"{args.prompts} prompts x {args.samples} samples a step, prompts of {args.prompt_chars} tokens, answers of "
        f"geometric length, mean {args.mean}, at most {args.longest}"
        if task == "ragged"
        else "the built-in arithmetic task, 128 prompts x 8 samples a step, two optimizer steps each"
    )
    report.facts(
        {
            **machine.describe(args.device),
            "work": f"{work}; {num_steps} steps, seed {args.seed}",
            "counted": f"steps {counted.start} to {counted.stop - 1}, evaluations and checkpoints taken off",
        }
    )
    baselines = {mode.threads: rate_of(mode, counted, num_samples) for mode in modes if mode.staleness is None}
    report.table(
        [*COLUMNS, *LEARNED],
        [mode_row(mode, counted, num_samples, num_steps, baselines.get(mode.threads)) for mode in modes],
    )
    report.text(
        "Rollout is the trainer's wait for its batch, landing its wait for the engine to rest before new weights go "
        "in; behind: policy versions between a token's sampling and the update's result, 1 is on policy. Rewards are "
        "means over up to five steps. Others: how much of the processors somebody else used meanwhile, up to."
    )
    report.save()


def rate_of(mode: Mode, counted: range, num_samples: int) -> float | None:
    """Samples per second, the median of the rounds."""
    rates = []
    for outcome in mode.outcomes:
        rows = [row for row in outcome.rows if row["step"] in counted]
        rates.append(num_samples * len(rows) / sum(map(seconds_of, rows)))
    return statistics.median(rates) if rates else None


def mode_row(mode: Mode, counted: range, num_samples: int, num_steps: int, baseline: float | None) -> list[str]:
    threads = str(mode.threads or "all")
    rate = rate_of(mode, counted, num_samples)
    if rate is None:
        return [mode.name, threads, mode.error or "not run", *[""] * (len(COLUMNS) + len(LEARNED) - 3)]
    rows = [row for outcome in mode.outcomes for row in outcome.rows if row["step"] in counted]
    last = mode.outcomes[-1]
    reward = [point for point in last.series(REWARD) if point[0] > 0]
    accuracy = last.series(ACCURACY)
    return [
        mode.name,
        threads,
        f"{rate:,.1f}",
        f"{rate / baseline:.2f}" if baseline else "",
        f"{statistics.mean(map(seconds_of, rows)):.3f}",
        *(mean_of(rows, f"timing/{phase}_s") for phase in ("rollout", "train", "landing")),
        f"{mean_of(rows, 'async/version_lag_mean', 2)} ({mean_of(rows, 'async/version_lag_max', 1)})"
        if mode.staleness is not None
        else "1",
        f"{mean_around(reward, 3):.3f}",
        f"{mean_around(reward, num_steps - 2):.3f}",
        f"{accuracy[0][1]:.1%} to {accuracy[-1][1]:.1%}" if accuracy else "",
        f"{statistics.median(outcome.wall_s for outcome in mode.outcomes):.1f}",
        f"{max(mode.others):.0%}",
    ]


def mean_of(rows: Sequence[Row], key: str, digits: int = 3) -> str:
    values = [float(row[key]) for row in rows if row.get(key) is not None]
    return f"{statistics.mean(values):.{digits}f}" if values else ""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    main()
