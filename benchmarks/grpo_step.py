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
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from benchmarks import machine
from benchmarks.check import WrongOutput
from benchmarks.contest import OURS, Contestant, speedup
from benchmarks.grpo.base import GrpoSide, Rollout
from benchmarks.grpo.skyrl_side import SkyrlSide
from benchmarks.grpo.work import StepWork
from benchmarks.limits import Ceilings, measure_ceilings, rollout_limit, training_flops
from benchmarks.measure import profile_once, summarize
from benchmarks.models import SHAPES, build_model, build_tokenizer, twin_on_same_weights
from benchmarks.report import RESULTS, Report
from benchmarks.tune import fastest_setting, threads_to_try
from benchmarks.workload import LengthRange, draw_tokens
from skyrl_train.attention import ATTENTION_NAME

TRL = "TRL"
STEP = "step"
GRADIENT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


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
    parser.add_argument("--profile", action="store_true", help="one more step of each, by operator, in the log")
    parser.add_argument("--name", default=None, help="stem of the result files")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    args.dtype = getattr(torch, args.dtype)
    args.threads = threads_to_try(args.threads, args.device)
    rows = args.prompts * args.samples
    args.trl_micro_batches = args.trl_micro_batches or ((rows, rows // 4) if rows % 4 == 0 else (rows,))
    args.name = args.name or f"grpo-step-{args.shape}-{args.prompts}x{args.samples}"
    return args


def main(argv: Sequence[str] | None = None) -> list[Contestant[GrpoSide]]:
    args = parse_args(argv)
    transformers_logging.set_verbosity_error()
    shape = SHAPES[args.shape]
    work = StepWork.draw(
        args.prompts, args.samples, prompt=args.prompt, new=args.new, vocab_size=shape.vocab_size, seed=args.seed
    )
    title = f"One GRPO step: {args.prompts} prompts x {args.samples} samples, {args.shape}"
    report = Report(title, f"{args.name}-{machine.slug(args.device)}", args.out)
    report.log(str(work))
    ceilings = measure_ceilings(shape, args.device, args.dtype, threads=args.threads)
    report.log(str(ceilings))
    model = build_model(shape, attn_implementation="sdpa", device=args.device, dtype=args.dtype, seed=args.seed)

    contestants = [Contestant[GrpoSide](name=name) for name in args.sides]
    for contestant in contestants:
        with contestant.may_fail(report):
            contestant.enter((tuned_ours if contestant.name == OURS else tuned_trl)(model, work, args, report))
    running = [contestant for contestant in contestants if contestant.runs]
    gradients = compare_gradients(running, work, args, report)
    for i in range(args.rounds):
        for contestant in running:
            torch.set_num_threads(contestant.runner.num_threads)
            timings = contestant.runner.run(1 + args.steps)
            for timing in timings:
                report.log(f"{contestant.name}, round {i}: {timing}")
            contestant.timings.setdefault(STEP, []).extend(timings[1:])
    for contestant in running if args.profile else ():
        text = profile_once(partial(contestant.runner.run, 1), args.device)
        report.log(f"{contestant.name}, by operator:\n{text}")
    for contestant in running:
        contestant.headline[STEP] = f"{summarize(contestant.timings[STEP]).median_s:.3f} s a step"
        contestant.leave()
    write(report, contestants, args, work, ceilings, gradients)
    return contestants


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


def compare_gradients(
    running: Sequence[Contestant[GrpoSide]], work: StepWork, args: argparse.Namespace, report: Report
) -> str:
    """Both sides train on the same completions; raises WrongOutput unless loss and gradient norm agree."""
    rng = random.Random(work.seed)
    rollout = Rollout(
        prompts=work.prompts(0),
        completions=[draw_tokens(rng, length, work.vocab_size) for length in work.flat_lens],
    )
    gradients = {}
    for contestant in running:
        gradients[contestant.name] = gradient = contestant.runner.gradient(rollout)
        report.log(f"gradient of given completions, {contestant.name}: {gradient}")
    text = "; ".join(f"{side} {g.loss:.6f}, {g.grad_norm:.6f}" for side, g in gradients.items())
    if len(gradients) == 2:
        ours, trl = gradients[OURS], gradients[TRL]
        tolerance = GRADIENT_TOLERANCE[args.dtype]
        if abs(ours.grad_norm - trl.grad_norm) > tolerance * trl.grad_norm or abs(ours.loss - trl.loss) > tolerance:
            raise WrongOutput(f"the sides' loss and gradient norm on the same completions differ: {text}")
    return text


def write(
    report: Report,
    contestants: Sequence[Contestant[GrpoSide]],
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
    figures = {contestant.name: contestant.figures(STEP) for contestant in contestants}
    phases = list(dict.fromkeys(name for f in figures.values() if f is not None for name in f.phases))
    report.text(f"## Seconds a step, median of {args.rounds * args.steps}")
    head = ["side", "setting (the fastest tried)", "median", "min", "max", "over TRL", *phases]
    report.table(
        [*head, "processor s", "processors used by others, up to"],
        [
            [contestant.name, contestant.error, *[""] * (6 + len(phases))]
            if (f := figures[contestant.name]) is None
            else [
                contestant.name,
                contestant.setting,
                *(f"{seconds:.3f}" for seconds in (f.median_s, f.min_s, f.max_s)),
                speedup(contestants, contestant, STEP),
                *(f"{f.phases[name]:.3f}" if name in f.phases else "" for name in phases),
                f"{f.cpu_s:.2f}",
                f.others,
            ]
            for contestant in contestants
        ],
    )
    report.save()


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


if __name__ == "__main__":
    main()
