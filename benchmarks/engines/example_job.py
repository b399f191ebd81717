"""A shipped configuration through the main job, at a shape that fits: two steps on a random model and made-up problems.

    python -m benchmarks.engines.example_job --config examples/sglang/sglang_full_config_example --shape 0.5b

The file is taken as it is; the command line gives it a model, data in the form of GSM8K, small batches, and an entropy
bonus, without which a random model that earns nothing would not be changed by a step. What counts: the exit code, and
that the engine's log-probabilities agree with the trainer's in the second step, under weights that an update brought.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import machine
from benchmarks.engines.folders import model_folder
from benchmarks.engines.harness import BACKENDS, first_line, interpreters, parser_of
from benchmarks.learning.job import ROOT, JobFailed, Outcome, run_job
from benchmarks.models import SHAPES
from benchmarks.report import Report

NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eve", "Finn")
THINGS = ("apples", "books", "coins", "eggs", "stamps")
INSTRUCTION = 'Let\'s think step by step and output the final answer after "####".'
SHOWN = ("timing/", "policy/", "loss/", "engine/", "reward/", "rollout/", "mismatch/")
"""Of these groups every number of a step is in the log; the table has those that `KEYS` names."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("python -m benchmarks.engines.example_job", __doc__)
    parser.add_argument("--config", type=Path, required=True, help="folder and name, without .yaml")
    parser.add_argument("--backend", choices=BACKENDS, default=None, help="in place of the file's")
    parser.add_argument("--prompts", type=int, default=16, help="of a step")
    parser.add_argument("--samples", type=int, default=8, help="of a prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens of an answer at most")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--refused", default="", help="words of the message that it must be refused with here")
    parser.add_argument("--name", default=None, help="of the table; default: the file's")
    args = parser.parse_args(argv)
    name = args.name or args.config.name.replace("_", "-")
    title = f"{args.config} through the main job, {args.shape}"
    report = Report(title, f"engines-job-{name}-{args.shape}-{machine.slug(args.device)}", args.out)
    run_dir = args.work.resolve() / "runs" / f"job-{name}"
    error = ""
    outcome: Outcome | None = None
    try:
        outcome = run_job(overrides(args), run_dir, timeout_s=args.budget_s, on_line=report.log)
    except JobFailed as exc:
        report.log(str(exc))
        error = str(exc) if args.refused else first_line(exc)
    if args.refused:
        as_it_must = "exit code 2" in error and args.refused in error
        error = "" if as_it_must else f"not refused with {args.refused!r}: {error or 'exit code 0'}"
    else:
        error = error or far_apart(outcome, args)
    write(report, args, outcome, error)
    for log in run_dir.rglob("engines/*.log"):
        (args.out / "servers").mkdir(parents=True, exist_ok=True)
        (args.out / "servers" / f"job-{name}-{log.name}").write_bytes(log.read_bytes())
    if error:
        sys.exit(error)


def far_apart(outcome: Outcome | None, args: argparse.Namespace) -> str:
    """What is wrong between engine and trainer in the last step, under weights that updates brought; empty: nothing."""
    assert outcome is not None
    found = outcome.last("policy/rollout_logprob_abs_diff_mean")
    limit = 1e-3 if dtype_of(args) == "float32" else 0.05
    return "" if found <= limit else f"engine and trainer differ by {found:.3g} in log-probability, more than {limit}"


def dtype_of(args: argparse.Namespace) -> str:
    return str(args.dtype or ("bfloat16" if args.device == "cuda" else "float32"))


def overrides(args: argparse.Namespace) -> list[str]:
    work, on_gpu = args.work.resolve(), args.device == "cuda"
    dtype = dtype_of(args)
    shape = SHAPES[args.shape]
    folder = model_folder(
        shape, work / "models" / "tied", device=args.device, dtype=getattr(torch, dtype), seed=args.seed
    )
    data = work / "gsm8k-like"
    write_data(data, num_train=args.prompts * args.steps, seed=args.seed)
    keys = {
        "trainer.policy.model.path": str(folder),
        "trainer.policy.model.dtype": dtype,
        "trainer.policy.optimizer_config.lr": "1e-4",
        "trainer.policy.optimizer_config.num_warmup_steps": "0",
        "trainer.algorithm.entropy": "0.01",
        "trainer.placement.policy_num_gpus_per_node": str(int(on_gpu)),
        "trainer.train_batch_size": str(args.prompts),
        "trainer.policy_mini_batch_size": str(args.prompts),
        "trainer.max_tokens_per_micro_batch": "8192",
        "trainer.max_steps": str(args.steps),
        "trainer.epochs": "1",
        "trainer.eval_interval": "-1",
        "generator.n_samples_per_prompt": str(args.samples),
        "generator.sampling_params.max_generate_length": str(args.new),
        "generator.eval_sampling_params.max_generate_length": str(args.new),
        "generator.model_dtype": dtype,
        "data.train_data": f"[{data / 'train.jsonl'}]",
        "data.val_data": f"[{data / 'test.jsonl'}]",
    }
    pythons = interpreters()
    if args.backend is not None:
        keys["generator.backend"] = args.backend
    if (backend := args.backend or "sglang") in pythons:
        keys["generator.engine_python"] = pythons[backend]
    return [
        f"--config-path={ROOT / args.config.parent}",
        f"--config-name={args.config.name}",
        *(f"{key}={value}" for key, value in keys.items()),
        *args.set,
    ]


def write_data(folder: Path, *, num_train: int, seed: int) -> None:
    """Files in the form that examples/gsm8k/prepare.py writes."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", num_train), ("test", 8)):
        rows = [problem(rng, split, index) for index in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def problem(rng: random.Random, split: str, index: int) -> dict[str, object]:
    first, more, lost = rng.randint(10, 60), rng.randint(2, 40), rng.randint(1, 10)
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    question = f"{name} has {first} {thing}, gets {more} more and gives {lost} away. How many {thing} are left?"
    return {
        "prompt": [{"role": "user", "content": f"{question} {INSTRUCTION}"}],
        "env_class": "gsm8k",
        "reward_spec": {"method": "rule", "ground_truth": str(first + more - lost)},
        "extra_info": {"split": split, "index": index, "question": question},
    }


def write(report: Report, args: argparse.Namespace, outcome: Outcome | None, error: str) -> None:
    work = f"{args.steps} steps of {args.prompts} prompts x {args.samples} samples, up to {args.new} new tokens"
    report.facts(
        {
            **machine.describe(args.device),
            "workload": work,
            "end": error or (f"refused: … {args.refused} …" if args.refused else "exit code 0"),
        }
    )
    if outcome is not None:
        report.text(f"{outcome.wall_s:.1f} s in all, start and end included.")
        steps = [row for row in outcome.rows if row["step"] >= 1]
        keys = sorted({key for row in steps for key in row if isinstance(row[key], (int, float))} - {"step"})
        for row in steps:
            report.log(json.dumps({key: row[key] for key in keys if key in row}))
        chosen = [key for key in keys if key.startswith(SHOWN)]
        cells = [[key, *(_number(row.get(key)) for row in steps)] for key in chosen]
        report.table(["metric", *(f"step {row['step']}" for row in steps)], cells)
    report.save()


def _number(value: object) -> str:
    return f"{value:.5g}" if isinstance(value, (int, float)) else ""


if __name__ == "__main__":
    main()
