"""The three engines on the very same requests: speed, log-probabilities against transformers, and whether they agree.

    python -m benchmarks.engines.side_by_side --engines embedded,sglang,vllm
    python -m benchmarks.engines.side_by_side --engines embedded,sglang && \\
        python -m benchmarks.engines.side_by_side --engines vllm          # where one server is there at a time

Same folder, same prompts, one engine after the other on an idle machine. Rows go into a JSON file beside the table; a
later run with other engines adds to it, and the table is made of all rows that were measured on this machine's kind of
card with this workload.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks import machine
from benchmarks.engines.asking import GREEDY, SAMPLED, Run, ask, common_prefix, median_run
from benchmarks.engines.harness import BACKENDS, Failed, Fleet, Ship, cell, facts, ints, names, parser_of, run_alone
from benchmarks.engines.reference import load_reference, logprob_difference
from benchmarks.engines.weights import free
from benchmarks.report import Report
from benchmarks.workload import LengthRange, draw_requests
from skyrl_train.config.machine import engine_release

NAME, TITLE = "side-by-side", "Three engines on the same requests"
MODES = {"greedy": GREEDY, "sampled": SAMPLED}
NUM_CHECKED = 4
"""Answers of each run that go through transformers, and whose tokens are kept to compare engines."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One engine, one mode, one number of requests. `tokens` are greedy answers of the first few requests."""

    engine: str
    release: str
    mode: str
    requests: int
    tokens_per_s: float | None
    difference: str
    tokens: list[list[int]]
    error: str = ""
    when: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engines", type=names(BACKENDS), default=BACKENDS)
    parser.add_argument("--sizes", type=ints, default=(1, 64, 256))
    parser.add_argument("--modes", type=names(tuple(MODES)), default=tuple(MODES))
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--repetitions", type=int, default=3)


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("python -m benchmarks.engines.side_by_side", __doc__)
    add_arguments(parser)
    run_alone(NAME, TITLE, measure, parser.parse_args(argv))


async def measure(fleet: Fleet, report: Report, args: argparse.Namespace) -> None:
    store = Store.open(
        args.out / f"engines-{NAME}-{args.shape}-{machine.slug(args.device)}.json", key=work(fleet, args)
    )
    ships = []
    for backend in args.engines:
        ship = await cell(fleet, f"start, {backend}", lambda b=backend: fleet.get(b), limit_s=600)
        if isinstance(ship, Failed):
            store.put([failed_entry(backend, mode, size, ship) for mode in args.modes for size in args.sizes])
            continue
        ships.append(ship)
        for mode in args.modes:
            for size in args.sizes:
                what = f"{backend}, {mode}, {size} requests"
                entry = await cell(fleet, what, lambda s=ship, m=mode, n=size: one_entry(fleet, s, m, n, args))
                store.put([failed_entry(backend, mode, size, entry) if isinstance(entry, Failed) else entry])
    report.facts(facts(fleet, ships, work(fleet, args)["workload"]))
    for mode in MODES:
        rows = table_rows(store.entries, mode)
        if rows:
            report.text(f"## {mode.capitalize()}")
            head = ["requests", "engine", "tokens/s", "over the fastest", "log-probabilities beside transformers'"]
            report.table([*head, "greedy tokens as embedded's" if mode == "greedy" else "", "measured"], rows)
    report.text(
        "Prefix caches were emptied before each run. Log-probabilities and tokens are of the first "
        f"{NUM_CHECKED} requests; where two engines' best tokens are nearly tied, bfloat16 may decide either way, and "
        "what follows differs."
    )


def work(fleet: Fleet, args: argparse.Namespace) -> dict[str, str]:
    """What rows must share to stand in one table."""
    return {
        "machine": machine.slug(fleet.setup.device),
        "model": fleet.setup.describe(),
        "workload": f"prompts of {args.prompt} tokens, {args.new} new ones, seed {args.seed}",
    }


async def one_entry(fleet: Fleet, ship: Ship, mode: str, size: int, args: argparse.Namespace) -> Entry:
    setup = fleet.setup
    length = LengthRange(low=args.prompt, high=args.prompt)
    new = LengthRange(low=args.new, high=args.new)
    requests = draw_requests(size, prompt=length, new=new, vocab_size=setup.shape.vocab_size, seed=args.seed)
    runs: list[Run] = []
    for repetition in range(args.repetitions + 1):
        await ship.engine.flush_cache()
        run = await ask(ship.engine, requests, temperature=MODES[mode])
        if repetition:
            fleet.report.log(f"{ship.name}, {mode}, {size}: {run.wall_s:.3f} s, {run.tokens_per_s:,.0f} tokens/s")
            runs.append(run)
    reference = load_reference(setup.folder, device=setup.device, dtype=setup.dtype)
    checked = [r.prompt_token_ids for r in requests[:NUM_CHECKED]]
    difference = logprob_difference(reference, checked, runs[0].completions[:NUM_CHECKED])
    del reference
    free(setup.device)
    fleet.report.log(f"{ship.name}, {mode}, {size}: log-probabilities {difference}, gap {difference.greedy_gap:.1e}")
    return Entry(
        engine=ship.backend,
        release=engine_release(ship.config) or "",
        mode=mode,
        requests=size,
        tokens_per_s=median_run(runs).tokens_per_s,
        difference=str(difference),
        tokens=[list(ids) for ids in runs[0].token_ids[:NUM_CHECKED]] if mode == "greedy" else [],
    )


def failed_entry(backend: str, mode: str, size: int, failure: Failed) -> Entry:
    return Entry(
        engine=backend,
        release="",
        mode=mode,
        requests=size,
        tokens_per_s=None,
        difference="",
        tokens=[],
        error=str(failure),
    )


def table_rows(entries: Sequence[Entry], mode: str) -> list[list[str]]:
    """By number of requests, then by engine in the order of BACKENDS."""
    rows = []
    chosen = [entry for entry in entries if entry.mode == mode]
    for size in sorted({entry.requests for entry in chosen}):
        group = sorted((e for e in chosen if e.requests == size), key=lambda e: BACKENDS.index(e.engine))
        fastest = max((e.tokens_per_s for e in group if e.tokens_per_s), default=0.0)
        ours = next((e.tokens for e in group if e.engine == "embedded"), [])
        for entry in group:
            name = f"{entry.engine} {entry.release}".strip()
            if entry.tokens_per_s is None:
                rows.append([str(size), name, entry.error, "", "", "", entry.when])
                continue
            part = f"{entry.tokens_per_s / fastest:.2f}"
            figures = [f"{entry.tokens_per_s:,.0f}", part, entry.difference, alike(entry.tokens, ours)]
            rows.append([str(size), name, *figures, entry.when])
    return rows


def alike(tokens: Sequence[Sequence[int]], ours: Sequence[Sequence[int]]) -> str:
    if not tokens or not ours:
        return ""
    shared = sum(common_prefix(a, b) for a, b in zip(tokens, ours, strict=True))
    whole = sum(list(a) == list(b) for a, b in zip(tokens, ours, strict=True))
    return f"{whole} of {len(tokens)} answers; {shared} of {sum(map(len, tokens))} before a difference"


@dataclass(kw_only=True)
class Store:
    """Entries in a JSON file; those of another workload or machine are replaced."""

    path: Path
    key: dict[str, str]
    entries: list[Entry]

    @classmethod
    def open(cls, path: Path, *, key: dict[str, str]) -> Store:
        entries: list[Entry] = []
        if path.exists():
            found = json.loads(path.read_text())
            if found["key"] == key:
                entries = [Entry(**entry) for entry in found["entries"]]
        return cls(path=path, key=key, entries=entries)

    def put(self, entries: Sequence[Entry]) -> None:
        """A new entry takes the place of an older one of the same engine, mode and size, and is on disk at once."""
        for entry in entries:
            same = (entry.engine, entry.mode, entry.requests)
            self.entries = [e for e in self.entries if (e.engine, e.mode, e.requests) != same] + [entry]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps({"key": self.key, "entries": [asdict(entry) for entry in self.entries]}))


if __name__ == "__main__":
    main()
