"""Seconds of one whole GRPO step, beside TRL's GRPOTrainer on the same model, batch, lengths, reward and loss.

    python -m benchmarks.grpo_step                        # 8 prompts x 8 samples of mixed length on this CPU
    python -m benchmarks.grpo_step --prompt 64 --new 128  # all of one length

Each side is first tuned (one step per setting; the fastest stays). Both then make a gradient from the same
completions, which must be the same gradient, and take turns: one step to warm up, a few that count, and again.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from benchmarks import machine
from benchmarks.check import WrongOutput
from benchmarks.grpo.base import GrpoSide, Rollout, StepTiming
from benchmarks.grpo.skyrl_side import SkyrlSide
from benchmarks.grpo.work import StepWork
from benchmarks.limits import Ceilings, measure_ceilings, rollout_limit, training_flops
from benchmarks.models import SHAPES, build_model, build_tokenizer, twin_on_same_weights
from benchmarks.report import RESULTS, Report
from benchmarks.tune import fastest_setting, threads_to_try
from benchmarks.workload import LengthRange, draw_tokens
from skyrl_train.attention import ATTENTION_NAME

OURS, TRL = "skyrl_train", "TRL"
GRADIENT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


@dataclass
class Result:
    """Of one side: its best setting, or why it has none."""

    side: str
    ready: GrpoSide | None = None
    error: str = ""
    timings: list[StepTiming] = field(default_factory=list)

    @property
    def ready_side(self) -> GrpoSide:
        assert self.ready is not None, f"{self.side}: {self.error}"
        return self.ready


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.grpo_step", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8, help="completions a prompt")
    parser.add_argument("--prompt", type=LengthRange.parse, default=LengthRange(low=16, high=64), metavar="LOW:HIGH")
    parser.add_argument("--new", type=LengthRange.parse, default=LengthRange(low=16, high=128), metavar="LOW:HIGH")
    parser.add_argument("--seed", type=int, default=0, help="of weights and workload")
    parser.add_argument("--rounds", type=int, default=2, help="how often the sides take turns")
    parser.add_argument("--steps", type=int, default=2, help="steps that count, a side and round; one more warms up")
    parser.add_argument("--threads", type=_ints, default=(), help="thread counts to tune over; default: 1 and all")
    parser.add_argument("--trl-generation", type=_words, default=("dynamic", "static", "continuous"))
    parser.add_argument("--trl-micro-batches", type=_ints, default=None, help="samples; default: all, and a quarter")
    parser.add_argument("--micro-batch-tokens", type=_ints, default=(2048, 8192), help="ours, to tune over")
    parser.add_argument("--sides", type=_words, default=(TRL, OURS))
    parser.add_argument("--name", default=None, help="stem of the result files")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    args.dtype = getattr(torch, args.dtype)
    args.threads = threads_to_try(args.threads, args.device)
    rows = args.prompts * args.samples
    args.trl_micro_batches = args.trl_micro_batches or ((rows, rows // 4) if rows % 4 == 0 else (rows,))
    args.name = args.name or f"grpo-step-{args.shape}-{args.prompts}x{args.samples}"
    return args


def main(argv: Sequence[str] | None = None) -> list[Result]:
    args = parse_args(argv)
    transformers_logging.set_verbosity_error()
    shape = SHAPES[args.shape]
    work = StepWork.draw(
        args.prompts, args.samples, prompt=args.prompt, new=args.new, vocab_size=shape.vocab_size, seed=args.seed
    )
    title = f"One GRPO step: {args.prompts} prompts x {args.samples} samples, {args.shape}"
    report = Report(title, f"{args.name}-{machine.slug(args.device)}", args.out)
    report.log(str(work))
    ceilings = measure_ceilings(shape, args.device, args.dtype)
    report.log(str(ceilings))
    model = build_model(shape, attn_implementation="sdpa", device=args.device, dtype=args.dtype, seed=args.seed)

    results = []
    for name in args.sides:
        result = Result(side=name)
        try:
            result.ready = (tuned_ours if name == OURS else tuned_trl)(model, work, args, report)
        except Exception as exc:  # a side that can't run here is a row of the table, not the end of the run
            report.log(traceback.format_exc())
            result.error = f"{type(exc).__name__}: {(str(exc).splitlines() or [''])[0][:200]}"
        results.append(result)
    running = [result for result in results if result.ready is not None]
    gradients = compare_gradients(running, work, args, report)
    for i in range(args.rounds):
        for result in running:
            torch.set_num_threads(result.ready_side.num_threads)
            timings = result.ready_side.run(1 + args.steps)
            for timing in timings:
                report.log(f"{result.side}, round {i}: {timing}")
            result.timings += timings[1:]
    for result in running:
        result.ready_side.close()
    write(report, results, args, work, ceilings, gradients)
    return results


def tuned_trl(model: PreTrainedModel, work: StepWork, args: argparse.Namespace, report: Report) -> GrpoSide:
    from benchmarks.grpo.trl_side import TrlSide  # TRL may be absent

    make = partial(TrlSide, model, build_tokenizer(work.vocab_size), work, device=args.device)
    axes = {"num_threads": args.threads, "generation": args.trl_generation, "micro_batch": args.trl_micro_batches}
    return fastest_setting(make, axes, partial(second_step_s, report))()


def tuned_ours(model: PreTrainedModel, work: StepWork, args: argparse.Namespace, report: Report) -> GrpoSide:
    def make(num_threads: int, max_tokens_per_micro_batch: int) -> GrpoSide:
        return SkyrlSide(
            copy.deepcopy(twin_on_same_weights(model, attn_implementation=ATTENTION_NAME)),
            work,
            device=args.device,
            max_tokens_per_micro_batch=max_tokens_per_micro_batch,
            num_threads=num_threads,
        )

    axes = {"num_threads": args.threads, "max_tokens_per_micro_batch": args.micro_batch_tokens}
    return fastest_setting(make, axes, partial(second_step_s, report))()


def second_step_s(report: Report, side: GrpoSide) -> float:
    """The first step warms up."""
    torch.set_num_threads(side.num_threads)
    try:
        timing = side.run(2)[1]
    finally:
        side.close()
    report.log(f"tuning, {side.name}: {timing}")
    return timing.wall_s


def compare_gradients(running: Sequence[Result], work: StepWork, args: argparse.Namespace, report: Report) -> str:
    """Both sides train on the same completions; raises WrongOutput unless loss and gradient norm agree."""
    rng = random.Random(work.seed)
    rollout = Rollout(
        prompts=work.prompts(0),
        completions=[draw_tokens(rng, length, work.vocab_size) for length in work.flat_lens],
    )
    gradients = {}
    for result in running:
        gradients[result.side] = gradient = result.ready_side.gradient(rollout)
        report.log(f"gradient of given completions, {result.side}: {gradient}")
    text = "; ".join(f"{side} {g.loss:.6f}, {g.grad_norm:.6f}" for side, g in gradients.items())
    if len(gradients) == 2:
        ours, trl = gradients[OURS], gradients[TRL]
        tolerance = GRADIENT_TOLERANCE[args.dtype]
        if abs(ours.grad_norm - trl.grad_norm) > tolerance * trl.grad_norm or abs(ours.loss - trl.loss) > tolerance:
            raise WrongOutput(f"the sides' loss and gradient norm on the same completions differ: {text}")
    return text


def write(
    report: Report,
    results: Sequence[Result],
    args: argparse.Namespace,
    work: StepWork,
    ceilings: Ceilings,
    gradients: str,
) -> None:
    shape = SHAPES[args.shape]
    limit = rollout_limit(shape, work.requests(0), ceilings)
    training_s = training_flops(shape, work) / ceilings.matmul_flops_per_s
    report.facts(
        {
            **machine.describe(args.device),
            "model": f"Qwen2 of shape {args.shape}, {shape.num_step_weights / 1e6:.1f} million weights, "
            f"{str(args.dtype).removeprefix('torch.')}, random with seed {args.seed}",
            "workload": f"{work}; seed {args.seed}",
            "measured ceilings": str(ceilings),
            "limit": f"{limit.seconds + training_s:.3f} s: generation {limit.seconds:.3f} s without sharing prompts, "
            f"training {training_s:.3f} s with prompts shared ({training_flops(shape, work) / 1e12:.3g} TFLOP)",
            "loss and gradient norm on the same completions": gradients,
        }
    )
    timed = [result for result in results if result.timings]
    phases = list(dict.fromkeys(name for result in timed for name in result.timings[0].phases))
    medians = {result.side: statistics.median(t.wall_s for t in result.timings) for result in timed}
    rows = []
    for result in results:
        if result not in timed:
            rows.append([result.side, result.error, *[""] * (6 + len(phases))])
            continue
        walls = [timing.wall_s for timing in result.timings]
        others = max((t.others_frac for t in result.timings if t.others_frac is not None), default=None)
        rows.append(
            [
                result.side,
                result.ready_side.name,
                f"{medians[result.side]:.3f}",
                f"{min(walls):.3f}",
                f"{max(walls):.3f}",
                f"{medians[TRL] / medians[result.side]:.2f}" if TRL in medians else "",
                *(_median_phase(result.timings, name) for name in phases),
                f"{statistics.median(t.cpu_s for t in result.timings):.2f}",
                "" if others is None else f"{others:.0%}",
            ]
        )
    report.text(f"## Seconds a step, median of {args.rounds * args.steps}")
    head = ["side", "setting (the fastest tried)", "median", "min", "max", "times as fast as TRL", *phases]
    report.table([*head, "processor s", "processors used by others, up to"], rows)
    report.save()


def _median_phase(timings: Sequence[StepTiming], name: str) -> str:
    seconds = [timing.phases[name] for timing in timings if name in timing.phases]
    return f"{statistics.median(seconds):.3f}" if seconds else ""


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


if __name__ == "__main__":
    main()
