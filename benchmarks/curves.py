"""Each estimator and each policy loss trained on the built-in task for the same steps: a table with its curves.

    python -m benchmarks.curves                     # all rows, writes docs/CURVES.md; goes on where it was stopped
    python -m benchmarks.curves --rows grpo,gae     # these rows; the page has what is known so far

Every row is the main job with a few keys of its own, once for each seed, in a process of one thread; as many run at
once as there are cores. What a run showed is kept in results/curves/<row>-<seed>.json and not run again unless its
settings change. Accuracy is that of greedy answers to problems that are never trained on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import machine
from benchmarks.learning.chart import Panel, small_multiples
from benchmarks.learning.job import ROOT, JobFailed, mean_around, run_job
from benchmarks.learning.rows import CurveRow, curve_rows
from benchmarks.report import RESULTS, Report
from skyrl_train.observability.curves import sparkline
from skyrl_train.observability.files import replace_file
from skyrl_train.observability.text import ACCURACY, REWARD

STEPS = 60
SEEDS = (42, 43, 44)
COMMON = (
    # A quarter of a batch: three of four updates are off policy, which is where the losses differ.
    "trainer.policy_mini_batch_size=32",
    # Half of the quickstart's, which takes half as many updates.
    "trainer.policy.optimizer_config.lr=1e-3",
    "trainer.eval_interval=10",
)
PAGE = ROOT / "docs" / "CURVES.md"
SPARKLINE = 24
KEPT = (REWARD, ACCURACY, "policy/entropy", "policy/grad_norm", "policy/approx_kl", "policy/clip_frac")


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What is kept of a run: its settings, and metric -> [step, value]. `error` says why there is nothing."""

    settings: list[str]
    wall_s: float = 0.0
    series: dict[str, list[list[float]]]
    error: str = ""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.curves", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=_ints, default=SEEDS, help="of weights, data order and sampling")
    parser.add_argument("--rows", type=lambda text: text.split(","), default=None, help="names; default: all")
    parser.add_argument("--parallel", type=int, default=machine.num_cores(), help="runs at once, of one thread each")
    parser.add_argument("--timeout-s", type=float, default=900.0, help="of one run")
    parser.add_argument("--again", action="store_true", help="also run what is known")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "curves", help="where the main job's folders go")
    parser.add_argument("--out", type=Path, default=RESULTS / "curves", help="where what they showed is kept")
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args(argv)
    known = {row.name for row in curve_rows()}
    if unknown := set(args.rows or ()) - known:
        parser.error(f"--rows: unknown {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, list[Curve]]:
    args = parse_args(argv)
    report = Report("Curves", "curves", args.out.parent)
    rows = curve_rows()
    chosen = [(row, seed) for seed in args.seeds for row in rows if args.rows is None or row.name in args.rows]
    missing = [run for run in chosen if args.again or known_curve(*run, args) is None]
    report.log(f"{len(chosen)} runs, {len(missing)} to do, {args.parallel} at once")

    def run(row: CurveRow, seed: int) -> None:
        curve = run_row(row, seed, args)
        replace_file(curve_file(row, seed, args), json.dumps(asdict(curve)).encode() + b"\n")
        report.log(f"{row.name}, seed {seed}: {curve.error or summary(curve)}")

    with ThreadPoolExecutor(args.parallel) as pool:
        list(pool.map(lambda one: run(*one), missing))
    known = {row.name: curves for row in rows if (curves := known_curves(row, args))}
    write_page(rows, known, args)
    report.log(f"{args.page} has {len(known)} of {len(rows)} rows")
    return known


def settings_of(row: CurveRow, seed: int, args: argparse.Namespace) -> list[str]:
    """All that a run's result depends on, beside the code."""
    return [f"trainer.max_steps={args.steps}", f"trainer.seed={seed}", *COMMON, *row.settings]


def curve_file(row: CurveRow, seed: int, args: argparse.Namespace) -> Path:
    path: Path = args.out / f"{row.name}-{seed}.json"
    return path


def known_curve(row: CurveRow, seed: int, args: argparse.Namespace) -> Curve | None:
    """Of an earlier run with these very settings; a run that failed is tried again."""
    file = curve_file(row, seed, args)
    if not file.is_file():
        return None
    curve = Curve(**json.loads(file.read_text()))
    return curve if curve.settings == settings_of(row, seed, args) and not curve.error else None


def known_curves(row: CurveRow, args: argparse.Namespace) -> list[Curve]:
    """One for each seed that has been run."""
    return [curve for seed in args.seeds if (curve := known_curve(row, seed, args)) is not None]


def run_row(row: CurveRow, seed: int, args: argparse.Namespace) -> Curve:
    settings = settings_of(row, seed, args)
    try:
        outcome = run_job(settings, args.runs / f"{row.name}-{seed}", threads=1, timeout_s=args.timeout_s)
    except JobFailed as exc:
        return Curve(settings=settings, series={}, error=str(exc).strip())
    found = {key: outcome.series(key) for key in KEPT}
    series = {key: [[step, round(value, 5)] for step, value in points] for key, points in found.items() if points}
    return Curve(settings=settings, wall_s=round(outcome.wall_s, 1), series=series)


def summary(curve: Curve) -> str:
    accuracy, reward = curve.series[ACCURACY], curve.series[REWARD]
    return (
        f"held-out accuracy {accuracy[0][1]:.1%} to {accuracy[-1][1]:.1%}, reward {reward[0][1]:.3f} to "
        f"{reward[-1][1]:.3f}, {curve.wall_s:.0f} s"
    )


def mean_series(curves: Sequence[Curve], key: str) -> list[tuple[float, float]]:
    """(step, mean over the seeds); all runs log at the same steps."""
    together = zip(*(curve.series[key] for curve in curves), strict=True)
    return [(same[0][0], statistics.mean(value for _, value in same)) for same in together]


def write_page(rows: Sequence[CurveRow], known: Mapping[str, Sequence[Curve]], args: argparse.Namespace) -> None:
    """The page, and beside it images/curves.svg."""
    panels = [
        Panel(title=title(row), reward=mean_series(curves, REWARD), accuracy=mean_series(curves, ACCURACY))
        for row in rows
        if (curves := known.get(row.name))
    ]
    image = args.page.parent / "images" / "curves.svg"
    image.parent.mkdir(parents=True, exist_ok=True)
    reference = panels[0].accuracy if panels else ()
    image.write_text(small_multiples(panels, num_steps=args.steps, reference=reference))
    args.page.write_text(page(rows, known, args))


def page(rows: Sequence[CurveRow], known: Mapping[str, Sequence[Curve]], args: argparse.Namespace) -> str:
    quarters = [max(args.steps * i // 4, 1) for i in (1, 2, 3, 4)]
    head = ["estimator", "loss", "also set", "accuracy at the start", "at the end", "least and greatest"]
    head += [f"reward at {step}" for step in quarters] + ["held-out accuracy", "mean reward", "seconds"]
    intro = (
        "Every advantage estimator and every policy loss on the built-in task (sums of two numbers): "
        f"{args.steps} steps of 128 prompts with 8 samples, four optimizer steps each. Mean of the seeds "
        f"{', '.join(map(str, args.seeds))}; a seed fixes the warm-started model, the order of the data and the "
        "sampling. Accuracy is that of greedy answers to 512 problems that are never trained on; a reward is the mean "
        "over five steps.",
        "`python -m benchmarks.curves` makes this page. Each row is the main job with the keys shown and "
        f"`{' '.join(COMMON)}`; what its runs logged is in `benchmarks/results/curves/`. It is one small task: the "
        "table says that each of them learns and what it costs, not which is best. The learning rate was tuned for "
        "grpo and is the same for all. " + EARLIER_SHAPE,
    )
    lines = ["# Learning curves"]
    for paragraph in intro:
        lines += ["", *textwrap.wrap(paragraph, 120, break_long_words=False, break_on_hyphens=False)]
    lines += [
        "",
        "![held-out accuracy and reward of each row over the steps](images/curves.svg)",
        "",
        "| " + " | ".join(head) + " |",
        "|" + " --- |" * len(head),
    ]
    for row in rows:
        also = " ".join(f"`{setting}`" for setting in row.overrides)
        curves = known.get(row.name)
        cells = measured(curves, quarters) if curves else ["not run", *[""] * (len(head) - 4)]
        lines.append("| " + " | ".join([row.estimator, row.loss, also, *cells]) + " |")
    seconds = (
        f"Seconds are those of one whole process on one thread of {machine.cpu_model()}, {args.parallel} at once: "
        "start, evaluations and export included."
    )
    return "\n".join([*lines, "", *textwrap.wrap(seconds, 120)]) + "\n"


EARLIER_SHAPE = "The runs below were made when the built-in model had 8 heads of 16 numbers; it has 4 of 32 since."
"""True of benchmarks/results/curves as committed: goes when they are run again."""


def measured(curves: Sequence[Curve], quarters: Sequence[int]) -> list[str]:
    accuracy = [value for _, value in mean_series(curves, ACCURACY)]
    ends = [curve.series[ACCURACY][-1][1] for curve in curves]
    reward = mean_series(curves, REWARD)
    return [
        f"{accuracy[0]:.1%}",
        f"{accuracy[-1]:.1%}",
        f"{min(ends):.1%}, {max(ends):.1%}",
        *(f"{mean_around(reward, step):.3f}" for step in quarters),
        sparkline(accuracy, SPARKLINE, low=0.0, high=1.0),
        sparkline([value for _, value in reward], SPARKLINE, low=0.0, high=1.0),
        f"{statistics.mean(curve.wall_s for curve in curves):.0f}",
    ]


def title(row: CurveRow) -> str:
    return row.name if row.name == "dr_grpo" else f"{row.estimator}, {row.loss}"


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    main()
