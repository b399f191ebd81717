"""N-gram speculation on and off over batch sizes, on text that drafts foresee and on text that they can't.

    python -m benchmarks.engines.speculation --engine sglang --batches 1,4,16

Two servers with the same weights. "foreseen": the model loops through 16 tokens, and so does each prompt; greedy, so
both servers must make the same tokens. "noise": a random model, sampled, on random prompts: what verifying drafts costs
when none hits. Real text lies between the two.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence

from benchmarks.engines.asking import GREEDY, SAMPLED, Run, ask, median_run, num_equal
from benchmarks.engines.folders import LOOP, looping_model, next_in_loop, spread_model
from benchmarks.engines.harness import (
    SERVERS,
    Failed,
    Fleet,
    Ship,
    cell,
    facts,
    ints,
    parser_of,
    run_alone,
)
from benchmarks.engines.weights import give
from benchmarks.report import Report
from benchmarks.workload import FIRST_WORD_ID, Request, draw_tokens

NAME, TITLE = "speculation-{engine}", "N-gram speculation over batch sizes, {engine}"
SIZE_S = 60.0
VARIANTS = ("plain", "ngram")
KINDS = {"foreseen": (looping_model, GREEDY), "noise": (spread_model, SAMPLED)}
"""The model and the temperature."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engine", choices=SERVERS, default="sglang")
    parser.add_argument("--batches", type=ints, default=(1, 4, 16, 64, 128))
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=3)


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("python -m benchmarks.engines.speculation", __doc__)
    add_arguments(parser)
    run_alone(NAME, TITLE, measure, parser.parse_args(argv))


async def measure(fleet: Fleet, report: Report, args: argparse.Namespace) -> None:
    await fleet.muster(args.engine, *VARIANTS)
    runs: dict[tuple[str, str, int], Run | Failed] = {}
    ships = []
    for variant in VARIANTS:
        ship = await cell(fleet, f"start, {variant}", lambda v=variant: fleet.get(args.engine, v), limit_s=600)
        if isinstance(ship, Failed):
            for kind in KINDS:
                runs |= {(variant, kind, batch): ship for batch in args.batches}
            continue
        ships.append(ship)
        for kind, (make, _) in KINDS.items():
            given = await cell(fleet, f"weights, {variant}, {kind}", lambda s=ship, m=make: give(fleet, s, m))
            failed = given if isinstance(given, Failed) else None
            for batch in args.batches:
                run = failed or await cell(
                    fleet,
                    f"{variant}, {kind}, {batch} requests",
                    lambda s=ship, k=kind, b=batch: one_size(fleet, s, k, b, args),
                    limit_s=SIZE_S,
                )
                runs[variant, kind, batch] = run
                if isinstance(run, Failed):
                    failed = run  # a server that ends on this kind of text ends on the next batch too
    report.facts(facts(fleet, ships, f"prompts of {args.prompt} tokens, {args.new} new ones; drafts of 8 tokens"))
    head = ["text", "requests", "off, tokens/s", "on, tokens/s", "on over off", "accept length", "same greedy tokens"]
    report.table(head, [row(runs, kind, batch) for kind in KINDS for batch in args.batches])
    report.text(
        f"Median of {args.repetitions}. The looping model is the best case of n-gram drafts and noise the worst: a "
        "policy's text lies between them, and where, its accept length says."
    )


async def one_size(fleet: Fleet, ship: Ship, kind: str, batch: int, args: argparse.Namespace) -> Run:
    """Each repetition has prompts of its own: SGLang's drafts come from earlier answers too."""
    runs = []
    for repetition in range(args.repetitions + 1):
        seed = args.seed + 1000 * repetition + batch
        requests = draw(kind, batch, args.prompt, args.new, fleet.setup.shape.vocab_size, seed=seed)
        run = await ask(ship.engine, requests, temperature=KINDS[kind][1])
        if repetition:  # the first one warms up
            fleet.report.log(
                f"{ship.name}, {kind}, {batch} requests: {run.wall_s:.3f} s, {run.tokens_per_s:,.0f} tokens/s, "
                f"accept length {run.accept_len}"
            )
            runs.append(run)
    return median_run(runs) if kind != "foreseen" else runs[0] if len(runs) == 1 else _median_with_first_ids(runs)


def _median_with_first_ids(runs: Sequence[Run]) -> Run:
    """The median's seconds with the tokens of the first: both servers are compared on the same prompts."""
    middle = median_run(runs)
    return Run(completions=runs[0].completions, wall_s=middle.wall_s, cpu_s=middle.cpu_s, accept_len=middle.accept_len)


def draw(kind: str, batch: int, prompt: int, new: int, vocab_size: int, *, seed: int) -> list[Request]:
    rng = random.Random(seed)
    if kind != "foreseen":
        return [
            Request(prompt_token_ids=draw_tokens(rng, prompt, vocab_size), max_new_tokens=new) for _ in range(batch)
        ]
    requests = []
    for _ in range(batch):
        ids = [rng.randrange(LOOP * (1 + FIRST_WORD_ID // LOOP), vocab_size - LOOP)]
        while len(ids) < prompt:
            ids.append(next_in_loop(ids[-1]))
        requests.append(Request(prompt_token_ids=tuple(ids), max_new_tokens=new))
    return requests


def row(runs: dict[tuple[str, str, int], Run | Failed], kind: str, batch: int) -> list[str]:
    off, on = runs["plain", kind, batch], runs["ngram", kind, batch]
    cells = [kind, str(batch)]
    cells += [run if isinstance(run, Failed) else f"{run.tokens_per_s:,.0f}" for run in (off, on)]
    if isinstance(off, Failed) or isinstance(on, Failed):
        return [*cells, "", "" if isinstance(on, Failed) else _accepted(on), ""]
    same = f"{num_equal(off.token_ids, on.token_ids)} of {batch}" if kind == "foreseen" else "sampled"
    return [*cells, f"{on.tokens_per_s / off.tokens_per_s:.2f}", _accepted(on), same]


def _accepted(run: Run) -> str:
    return "not told" if run.accept_len is None else f"{run.accept_len:.2f}"


if __name__ == "__main__":
    main()
