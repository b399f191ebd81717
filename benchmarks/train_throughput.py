"""Tokens/s of one policy update on completions of ragged length: this library's, a padded loop's, TRL's.

    python -m benchmarks.train_throughput                                     # two cases on this CPU, a few minutes
    python -m benchmarks.train_throughput --device cuda --dtype bfloat16 --shape 0.5b \\
        --prompts 16 --prompt 64:512 --median 256 --longest 2048 --micro-batch-tokens 16384

Completion lengths are lognormal: most are short, a few are long, as a policy writes them. Two cases: the samples of a
group share their prompt, and every sample has a prompt of its own. All sides train on the same tokens with the same
advantages from the same weights. Their gradients' norms must agree before anybody is timed; then all take
turns, and a ratio is that of two updates of the same round.
"""

from __future__ import annotations

import argparse
import gc
import math
import random
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from benchmarks import machine
from benchmarks.grpo.work import StepWork
from benchmarks.limits import Ceilings, measure_ceilings, training_flops
from benchmarks.measure import Timing, summarize, time_once
from benchmarks.models import SHAPES, ModelShape, build_model, build_tokenizer
from benchmarks.report import RESULTS, Report, rate
from benchmarks.train_step import (
    TOLERANCE,
    TOY,
    Update,
    draw_samples,
    packed_update,
    padded_parts,
    padded_update,
)
from benchmarks.workload import LengthRange
from skyrl_train.attention import ATTENTION_NAME
from skyrl_train.data.pack import pack
from skyrl_train.types import TrainingSample

ALL_SHAPES = {TOY.name: TOY, **SHAPES}
SHARED, PACKED, PADDED, SORTED, TRL = (
    "skyrl_train, prompts shared",
    "skyrl_train, nothing shared",
    "padded loop",
    "padded loop, sorted by length",
    "TRL",
)
SIDES = {"shared": SHARED, "packed": PACKED, "padded": PADDED, "sorted": SORTED, "trl": TRL}
COLUMNS = (
    *("side", "rows", "seconds", "min", "max", "tokens/s", "of the limit", "first is faster by"),
    *("processor s", "by processor time", "norm", "others"),
)
MAX_LOGITS_BYTES = {"cpu": 2 << 30, "cuda": 4 << 30}
"""Of one micro-batch of the padded loop in float32; several copies of them are alive at once."""


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    work: StepWork


@dataclass(kw_only=True)
class Side:
    """`update` runs once and says its gradient's norm; `timed` is one update by the clock."""

    name: str
    num_rows: int = 0
    first_norm: Callable[[], float] | None = None
    timed: Callable[[], Timing] | None = None
    norm: float = math.nan
    error: str = ""
    timings: list[Timing] = field(default_factory=list)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_throughput", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=ALL_SHAPES, default="tiny")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--samples", type=int, default=8, help="completions a prompt")
    parser.add_argument("--prompt", type=LengthRange.parse, default=LengthRange(low=32, high=96), metavar="LOW:HIGH")
    parser.add_argument("--median", type=int, default=64, help="of the completions' lengths")
    parser.add_argument("--sigma", type=float, default=0.8, help="deviation of the lengths' logarithm")
    parser.add_argument("--longest", type=int, default=384, help="longer completions are cut here, as a limit does")
    parser.add_argument("--micro-batch-tokens", type=int, default=8192, help="rows of a micro-batch, on every side")
    parser.add_argument("--sides", type=lambda text: tuple(text.split(",")), default=tuple(SIDES))
    parser.add_argument("--rounds", type=int, default=3, help="how often the sides take turns")
    parser.add_argument("--budget-s", type=float, default=math.inf, help="no further round after this, shared by cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default=None, help="stem of the result files")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    if unknown := set(args.sides) - set(SIDES):
        parser.error(f"--sides: unknown {', '.join(sorted(unknown))}; there are {', '.join(SIDES)}")
    args.dtype = getattr(torch, args.dtype)
    args.name = args.name or f"train-throughput-{args.shape}-{args.prompts}x{args.samples}"
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, list[Side]]:
    args = parse_args(argv)
    transformers_logging.set_verbosity_error()
    shape = ALL_SHAPES[args.shape]
    report = Report(
        f"One policy update on ragged lengths: {args.prompts * args.samples} samples, {args.shape}",
        f"{args.name}-{machine.slug(args.device)}",
        args.out,
    )
    ceilings = measure_ceilings(shape, args.device, args.dtype)
    report.log(str(ceilings))
    results: dict[str, list[Side]] = {}
    cases = cases_of(args, shape)
    start = time.perf_counter()
    for i, case in enumerate(cases, start=1):
        report.log(f"{case.name}: {case.work}")
        results[case.name] = run_case(case, args, report, end=start + args.budget_s * i / len(cases))
    write(report, args, cases, results, ceilings)
    return results


def cases_of(args: argparse.Namespace, shape: ModelShape) -> list[Case]:
    """The same completions in both; in the second, each prompt is drawn anew for each of them."""
    rng = random.Random(args.seed)
    lens = tuple(
        tuple(lognormal_length(rng, args.median, args.sigma, args.longest) for _ in range(args.samples))
        for _ in range(args.prompts)
    )
    prompt_lens = tuple(rng.randint(args.prompt.low, args.prompt.high) for _ in range(args.prompts))
    shared = StepWork(prompt_lens=prompt_lens, completion_lens=lens, vocab_size=shape.vocab_size, seed=args.seed)
    alone = StepWork(
        prompt_lens=tuple(length for length in prompt_lens for _ in range(args.samples)),
        completion_lens=tuple((length,) for length in shared.flat_lens),
        vocab_size=shape.vocab_size,
        seed=args.seed,
    )
    return [
        Case(name=f"groups of {args.samples} on shared prompts", work=shared),
        Case(name="no shared prompts", work=alone),
    ]


def lognormal_length(rng: random.Random, median: int, sigma: float, longest: int) -> int:
    """In [1, longest]."""
    return min(max(round(median * math.exp(sigma * rng.gauss(0, 1))), 1), longest)


def run_case(case: Case, args: argparse.Namespace, report: Report, *, end: float) -> list[Side]:
    """At least one round, and no further one after `end`, by the performance counter."""
    samples = draw_samples(case.work)
    sides = []
    for key in args.sides:
        if key == "shared" and case.work.num_samples == 1:
            continue  # nothing to share
        side = Side(name=SIDES[key])
        sides.append(side)
        with_errors(report, side, lambda key=key, side=side: set_up(key, side, samples, args))
        if side.first_norm is not None:
            with_errors(report, side, lambda side=side: setattr(side, "norm", side.first_norm()))
    check_norms(sides, TOLERANCE[args.dtype], report)
    running = [side for side in sides if not side.error]
    for i in range(args.rounds):
        if i > 0 and time.perf_counter() > end:
            report.log(f"no round {i}: the time is over")
            break
        for side in running:
            assert side.timed is not None
            side.timings.append(side.timed())
            report.log(f"{side.name}, round {i}: {side.timings[-1]}")
    for side in sides:
        side.first_norm = side.timed = None  # its model and optimizer go
    gc.collect()
    if args.device == "cuda":
        torch.cuda.empty_cache()
    return sides


def with_errors(report: Report, side: Side, action: Callable[[], object]) -> None:
    """A side that can't run here is a row of the table that says why."""
    if side.error:
        return
    try:
        action()
    except Exception as exc:
        report.log(f"{side.name} is out:\n{traceback.format_exc()}")
        side.error = f"{type(exc).__name__}: {(str(exc).splitlines() or [''])[0][:200]}"


def set_up(key: str, side: Side, samples: list[TrainingSample], args: argparse.Namespace) -> None:
    shape = ALL_SHAPES[args.shape]

    def model(attention: str) -> PreTrainedModel:
        return build_model(shape, attn_implementation=attention, device=args.device, dtype=args.dtype, seed=args.seed)

    budget = args.micro_batch_tokens
    if key == "trl":
        from benchmarks.grpo.trl_update import TrlUpdate  # TRL may be absent

        longest = max(s.num_prompt_tokens for s in samples) + max(
            len(s.token_ids) - s.num_prompt_tokens for s in samples
        )
        trl = TrlUpdate(
            model("sdpa"),
            build_tokenizer(shape.vocab_size),
            samples,
            device=args.device,
            micro_batch=largest_divisor(len(samples), max(budget // longest, 1)),
        )
        side.num_rows, side.first_norm = trl.num_rows, trl.gradient_norm
        side.timed = lambda: trl.run(2)[-1]  # the first of a fresh trainer warms up
        return
    update: Update
    if key in ("shared", "packed"):
        batch = pack(samples, max_tokens_per_micro_batch=budget, share_prefix=key == "shared")
        side.num_rows = sum(len(micro_batch.token_ids) for micro_batch in batch.micro_batches[0])
        update = packed_update(model(ATTENTION_NAME), samples, budget, share_prefix=key == "shared")
    else:
        max_rows = min(budget, MAX_LOGITS_BYTES[args.device] // (4 * shape.vocab_size))
        parts = padded_parts(samples, max_rows, by_length=key == "sorted")
        side.num_rows = sum(len(part) * length for part, length in parts)
        update = padded_update(model("sdpa"), samples, max_rows, by_length=key == "sorted")
    side.first_norm, side.timed = update, lambda: time_once(update, args.device)


def largest_divisor(number: int, at_most: int) -> int:
    return next(d for d in range(min(number, at_most), 0, -1) if number % d == 0)


def check_norms(sides: Sequence[Side], tolerance: float, report: Report) -> None:
    """A side whose gradient isn't the padded loop's (or the first side's) is out: no speed without right answers."""
    known = [side for side in sides if not side.error]
    if not known:
        return
    reference = next((side for side in known if side.name == PADDED), known[0])
    for side in known:
        report.log(f"{side.name}: gradient norm {side.norm:.6f}")
        if not abs(side.norm - reference.norm) <= tolerance * abs(reference.norm):
            side.error = f"gradient norm {side.norm:.6g}, {reference.name} has {reference.norm:.6g}"


def write(
    report: Report, args: argparse.Namespace, cases: Sequence[Case], results: dict[str, list[Side]], ceilings: Ceilings
) -> None:
    shape = ALL_SHAPES[args.shape]
    report.facts(
        {
            **machine.describe(args.device),
            "threads": str(torch.get_num_threads()),
            "model": f"Qwen2 of shape {args.shape}, {shape.num_step_weights / 1e6:.1f} million weights, "
            f"{str(args.dtype).removeprefix('torch.')}, random with seed {args.seed}",
            "lengths": f"completions lognormal, median {args.median}, sigma {args.sigma}, cut at {args.longest}; "
            f"prompts uniform in {args.prompt}; seed {args.seed}",
            "micro-batches": f"up to {args.micro_batch_tokens} rows, padding included",
            "measured ceilings": str(ceilings),
        }
    )
    report.text(
        "Tokens count each sample whole, prompt and completion, on every side; rows are what the model computed. "
        f"Median of up to {args.rounds} updates. The limit is the matrix products of the rows that must be computed, "
        "each prompt once for its samples, at the measured rate of a large product. A ratio is the median over the "
        "rounds of this side's seconds over the first's, in brackets its least and its greatest; by processor time, "
        "which a busy machine hardly moves, it is that of the medians."
    )
    for case in cases:
        limit_s = training_flops(shape, case.work) / ceilings.matmul_flops_per_s
        num_tokens = sum(case.work.prompt_lens) * case.work.num_samples + case.work.num_completion_tokens
        report.text(f"## {case.name.capitalize()}")
        report.text(f"{case.work}. Limit: {limit_s:.3f} s, {rate(num_tokens, limit_s)} tokens/s.")
        report.table(
            COLUMNS,
            [side_row(side, results[case.name], num_tokens, limit_s) for side in results[case.name]],
        )
    report.text('"others": how much of the processors somebody else used meanwhile, up to.')
    report.save()


def side_row(side: Side, sides: Sequence[Side], num_tokens: int, limit_s: float) -> list[str]:
    if side.error or not side.timings:
        return [side.name, side.error or "not run", *[""] * (len(COLUMNS) - 2)]
    figures = summarize(side.timings)
    first = next(s for s in sides if s.timings)
    ratios = [own.wall_s / other.wall_s for own, other in zip(side.timings, first.timings, strict=True)]
    return [
        side.name,
        f"{side.num_rows:,}",
        *(f"{seconds:.3f}" for seconds in (figures.median_s, figures.min_s, figures.max_s)),
        rate(num_tokens, figures.median_s),
        f"{limit_s / figures.median_s:.0%}",
        "" if side is first else f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        f"{figures.cpu_s:.2f}",
        "" if side is first else f"{figures.cpu_s / summarize(first.timings).cpu_s:.2f}",
        f"{side.norm:.5g}",
        figures.others,
    ]


if __name__ == "__main__":
    main()
