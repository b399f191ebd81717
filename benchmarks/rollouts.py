"""Tokens per second of rollouts: our embedded engine beside transformers' two and vLLM, on the same weights in one run.

    python -m benchmarks.rollouts                                  # 64 requests of mixed length on this CPU
    python -m benchmarks.rollouts --engines generate,vllm,skyrl_train --threads 1   # and vLLM's server
    python -m benchmarks.rollouts --device cuda --dtype bfloat16 --shape 0.5b --requests 256 --prompt 128 --new 256

Each engine is first tuned (one run per setting and thread count; the fastest stays), then checked against the plain
model, then timed in turn with the others. README.md says what is counted.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from benchmarks import machine
from benchmarks.check import Agreement, WrongOutput, check_outputs
from benchmarks.contest import OURS, Contestant, speedup
from benchmarks.limits import Ceilings, RolloutLimit, measure_ceilings, rollout_limit
from benchmarks.measure import profile_once, summarize, time_once
from benchmarks.models import SHAPES, build_model, twin_on_same_weights
from benchmarks.report import RESULTS, Report, rate
from benchmarks.samplers.base import Sampler
from benchmarks.samplers.embedded import EmbeddedSampler
from benchmarks.samplers.generate import GenerateSampler
from benchmarks.samplers.generate_batch import GenerateBatchSampler
from benchmarks.samplers.server import ServerSampler
from benchmarks.tune import fastest_setting, threads_to_try
from benchmarks.workload import LengthRange, Output, Request, describe, draw_requests, num_new_tokens
from skyrl_train.attention import ATTENTION_NAME

ENGINES = ("generate", "generate_batch", "vllm", OURS)
DEFAULT_ENGINES = ("generate", "generate_batch", OURS)
CACHES = ("dynamic", "static", "compiled")
MODES = {"sampled": False, "greedy": True}
NUM_CHECKED = 8
OTHERS = "processors used by others, up to"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rollouts", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt", type=LengthRange.parse, default=LengthRange(low=16, high=128), metavar="LOW:HIGH")
    parser.add_argument("--new", type=LengthRange.parse, default=LengthRange(low=16, high=256), metavar="LOW:HIGH")
    parser.add_argument("--seed", type=int, default=0, help="of weights and workload")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--engines", type=_names(ENGINES), default=DEFAULT_ENGINES, help="default: all but vllm")
    parser.add_argument("--modes", type=_names(tuple(MODES)), default=tuple(MODES), help="sampled,greedy")
    parser.add_argument("--threads", type=_ints, default=(), help="thread counts to tune over; default: 1 and all")
    parser.add_argument("--generate-batches", type=_ints, default=(16, 32, 64), help="batch sizes to tune over")
    parser.add_argument("--generate-caches", type=_names(CACHES), default=("dynamic", "static"))
    parser.add_argument("--concurrent", type=_ints, default=(32, 64), help="generate_batch: running requests")
    parser.add_argument("--profile", action="store_true", help="one more run of each, by operator, in the log")
    parser.add_argument("--name", default=None, help="stem of the result files; default: rollouts-SHAPE-REQUESTS")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    args.dtype = getattr(torch, args.dtype)
    args.threads = threads_to_try(args.threads, args.device)
    args.name = args.name or f"rollouts-{args.shape}-{args.requests}"
    return args


def main(argv: Sequence[str] | None = None) -> list[Contestant[Sampler]]:
    args = parse_args(argv)
    transformers_logging.set_verbosity_error()
    shape = SHAPES[args.shape]
    report = Report(
        f"Rollouts: {args.requests} requests, {args.shape}", f"{args.name}-{machine.slug(args.device)}", args.out
    )
    requests = draw_requests(
        args.requests, prompt=args.prompt, new=args.new, vocab_size=shape.vocab_size, seed=args.seed
    )
    report.log(describe(requests))
    ceilings = measure_ceilings(shape, args.device, args.dtype, threads=args.threads)
    limit = rollout_limit(shape, requests, ceilings)
    report.log(f"{ceilings}; limit {limit.tokens_per_s:,.0f} tokens/s")
    model = build_model(
        shape, attn_implementation="sdpa", device=args.device, dtype=args.dtype, seed=args.seed
    ).requires_grad_(False)

    contestants = [Contestant[Sampler](name=name) for name in args.engines]
    for contestant in contestants:
        with contestant.may_fail(report):
            contestant.enter(tuned(contestant.name, model, requests, args, report))
    agreements: dict[str, dict[str, Agreement]] = {mode: {} for mode in args.modes}
    for mode in args.modes:
        for contestant in running(contestants):
            with contestant.may_fail(report):
                agreement = check(contestant.runner, model, requests, mode)
                report.log(f"check, {contestant.setting}, {mode}: {agreement}")
                agreements[mode][contestant.name] = agreement
        for i in range(args.repetitions):
            for contestant in running(contestants):
                contestant.runner.prepare(greedy=MODES[mode])
                timing = time_once(
                    partial(run, contestant.runner, requests, mode),
                    args.device,
                    child_seconds=child_seconds(contestant.runner),
                )
                report.log(f"{contestant.name}, {mode}, repetition {i}: {timing}")
                contestant.timings.setdefault(mode, []).append(timing)
        for contestant in running(contestants):
            seconds = summarize(contestant.timings[mode]).median_s
            speed = rate(num_new_tokens(requests), seconds)
            contestant.headline[mode] = f"{speed} tokens/s, {limit.seconds / seconds:.1%} of the limit"
    for contestant in running(contestants) if args.profile else ():
        contestant.runner.prepare(greedy=MODES[args.modes[-1]])
        text = profile_once(partial(run, contestant.runner, requests, args.modes[-1]), args.device)
        report.log(f"{contestant.name}, {args.modes[-1]}, by operator:\n{text}")
    for contestant in contestants:
        contestant.leave()
    write(report, contestants, args, requests, ceilings, limit, agreements)
    return contestants


def tuned(
    engine: str, model: PreTrainedModel, requests: Sequence[Request], args: argparse.Namespace, report: Report
) -> Sampler:
    """The engine in its fastest setting, sampled; each setting runs once over everything after a warm-up."""
    axes: dict[str, Sequence[Any]] = {"num_threads": args.threads}
    make: Callable[..., Sampler]
    if engine == OURS:
        make = partial(EmbeddedSampler, twin_on_same_weights(model, attn_implementation=ATTENTION_NAME), requests)
    elif engine == "generate":
        make = partial(GenerateSampler, model)
        batches = sorted({min(n, args.requests) for n in (*args.generate_batches, args.requests)}, reverse=True)
        axes |= {"cache": args.generate_caches, "batch_size": batches}
    elif engine == "vllm":
        make = partial(ServerSampler, model, requests, shape=args.shape, backend=engine)
    else:
        # A module of its own: an open manager switches its module's attention.
        twin = twin_on_same_weights(model, attn_implementation="sdpa")
        make = partial(GenerateBatchSampler, twin, requests, page_size=16 if args.device == "cpu" else 256)
        axes |= {"max_requests": sorted({min(n, args.requests) for n in args.concurrent}, reverse=True)}

    def seconds(sampler: Sampler) -> float:
        try:
            warm_up(sampler, requests, "sampled")
            sampler.prepare(greedy=False)
            timing = time_once(
                partial(run, sampler, requests, "sampled"), args.device, child_seconds=child_seconds(sampler)
            )
        finally:
            sampler.close()
        report.log(f"tuning, {sampler.name}: {timing}, {rate(num_new_tokens(requests), timing.wall_s)} tokens/s")
        return timing.wall_s

    return fastest_setting(make, axes, seconds)()


def child_seconds(sampler: Sampler) -> Callable[[], float] | None:
    return getattr(sampler, "child_seconds", None)


def warm_up(sampler: Sampler, requests: Sequence[Request], mode: str) -> None:
    """What is compiled or captured depends on the shapes, so then everything runs once; else a taste is enough."""
    if torch.cuda.is_available() or "compiled" in sampler.name:
        run(sampler, requests, mode)
        return
    short = [Request(prompt_token_ids=r.prompt_token_ids[:8], max_new_tokens=4) for r in requests[:4]]
    run(sampler, short, mode)


def run(sampler: Sampler, requests: Sequence[Request], mode: str) -> list[Output]:
    torch.set_num_threads(sampler.num_threads)
    return sampler.run(requests, greedy=MODES[mode])


def check(sampler: Sampler, model: PreTrainedModel, requests: Sequence[Request], mode: str) -> Agreement:
    """Runs the whole workload, which warms the engine up as well; compares the first few completions."""
    sampler.prepare(greedy=MODES[mode])
    outputs = run(sampler, requests, mode)
    wrong = [i for i, r in enumerate(requests) if len(outputs[i].token_ids) != r.max_new_tokens]
    if wrong:
        raise WrongOutput(f"requests {wrong} have another length than was asked for")
    return check_outputs(model, requests[:NUM_CHECKED], outputs[:NUM_CHECKED], greedy=MODES[mode])


def running(contestants: Sequence[Contestant[Sampler]]) -> list[Contestant[Sampler]]:
    return [contestant for contestant in contestants if contestant.runs]


def write(
    report: Report,
    contestants: Sequence[Contestant[Sampler]],
    args: argparse.Namespace,
    requests: Sequence[Request],
    ceilings: Ceilings,
    limit: RolloutLimit,
    agreements: Mapping[str, Mapping[str, Agreement]],
) -> None:
    dtype = str(args.dtype).removeprefix("torch.")
    report.facts(
        {
            **machine.describe(args.device),
            "model": f"Qwen2 of shape {args.shape}, {SHAPES[args.shape].num_step_weights / 1e6:.1f} million weights a "
            f"step, {dtype}, random with seed {args.seed}",
            "workload": f"{describe(requests)}; seed {args.seed}",
            "measured ceilings": str(ceilings),
            "limit": f"{limit.tokens_per_s:,.0f} tokens/s: {limit.step_weight_bytes / 1e6:.1f} MB of weights a step, "
            f"{limit.kv_bytes / 1e9:.2f} GB of keys and values and {limit.flops / 1e12:.3g} TFLOP in all",
        }
    )
    for mode in args.modes:
        report.text(f"## {mode.capitalize()}: new tokens per second")
        head = ["engine", "setting (the fastest tried)", f"median of {args.repetitions}", "min", "max"]
        report.table(
            [*head, "over the best peer", "of the limit", "processor s", "over the best peer, by these", OTHERS],
            [_row(contestants, contestant, mode, num_new_tokens(requests), limit) for contestant in contestants],
        )
        checked = [f"{name}: {agreement}" for name, agreement in agreements[mode].items()]
        report.text(f"Checked on {min(NUM_CHECKED, len(requests))} requests, {mode}. " + ". ".join(checked) + ".")
    report.save()


def _row(
    contestants: Sequence[Contestant[Sampler]],
    contestant: Contestant[Sampler],
    mode: str,
    tokens: int,
    limit: RolloutLimit,
) -> list[str]:
    figures = contestant.figures(mode)
    if figures is None:
        return [contestant.name, contestant.error, *[""] * 8]
    return [
        contestant.name,
        contestant.setting,
        rate(tokens, figures.median_s),
        rate(tokens, figures.max_s),
        rate(tokens, figures.min_s),
        speedup(contestants, contestant, mode),
        f"{limit.seconds / figures.median_s:.1%}",
        f"{figures.cpu_s:.1f}",
        speedup(contestants, contestant, mode, by="cpu_s"),
        figures.others,
    ]


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _names(allowed: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    def names(text: str) -> tuple[str, ...]:
        chosen = tuple(text.split(","))
        unknown = [name for name in chosen if name not in allowed]
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is none of {', '.join(allowed)}")
        return chosen

    return names


if __name__ == "__main__":
    main()
