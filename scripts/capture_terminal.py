"""A picture of the live terminal view of a recorded run: `python scripts/capture_terminal.py runs/quickstart`.

The picture is the renderable that the live view shows, filled from the run's config.yaml, metrics.jsonl and
rollouts/ as it stood after --step (default: two thirds of the way), written as docs/images/terminal.svg.
"""

from __future__ import annotations

import argparse
import io
import json
import re
from pathlib import Path

import yaml
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console

from skyrl_train.observability.live_view import RunView, Sample, render
from skyrl_train.observability.metrics import STEP_SECONDS, Row, read_metrics
from skyrl_train.observability.rollouts import rollout_files

OUT = Path(__file__).parents[1] / "docs" / "images" / "terminal.svg"
NUM_SAMPLES = 4


def view_of(run_dir: Path, upto: int | None) -> RunView:
    """The live view's state after step `upto`: elapsed and left from the seconds of the steps."""
    config = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    rows = read_metrics(run_dir / "metrics.jsonl")
    last = rows[-1]["step"]
    upto = last * 2 // 3 if upto is None else upto
    view = RunView(
        run_name=config["trainer"]["run_name"],
        total_steps=last,
        model=str(config["trainer"]["policy"]["model"]["path"]),
        engine=config["generator"]["backend"],
        phase="rollout",
    )
    samples = samples_of(run_dir, upto)
    for row in rows:
        if row["step"] <= upto:
            view.record(row["step"], {k: v for k, v in row.items() if isinstance(v, (int, float))}, samples)
    view.elapsed_s = seconds_of(rows, 0, upto)
    view.eta_s = seconds_of(rows, upto + 1, last)
    return view


def seconds_of(rows: list[Row], first: int, last: int) -> float:
    return sum(row.get(STEP_SECONDS) or 0.0 for row in rows if first <= row["step"] <= last)


def samples_of(run_dir: Path, upto: int) -> list[Sample]:
    """One rollout of each of the first prompts of the latest recorded step."""
    files = [path for kind, step, path in rollout_files(run_dir / "rollouts") if kind == "train" and step <= upto]
    if not files:
        return []
    by_prompt: dict[str, Sample] = {}
    for line in files[-1].read_text(encoding="utf-8").split("\n"):
        record = json.loads(line) if line.strip() else None
        if record is None or record["prompt"] is None or record["reward"] is None:
            continue
        prompt = str(record["prompt"][-1]["content"])
        # As the live view shows it: without the end-of-turn token.
        response = re.sub(r"<\|[^|]*\|>", "", record["response"])
        by_prompt.setdefault(prompt, Sample(prompt=prompt, response=response, reward=record["reward"]))
    return list(by_prompt.values())[:NUM_SAMPLES]


def svg_of(view: RunView, width: int, height: int) -> str:
    console = Console(record=True, width=width, height=height, file=io.StringIO(), force_terminal=True)
    console.print(render(view, width, height))
    # A page that shows the picture fetches no fonts for it: the reader's monospace font does.
    template = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    template = template.replace("Fira Code", "ui-monospace, Menlo, Consolas, DejaVu Sans Mono")
    title = "python -m skyrl_train.entrypoints.main_base"
    return console.export_svg(title=title, code_format=template, unique_id="terminal")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--step", type=int, default=None, help="the step to show; default two thirds of the way")
    parser.add_argument("--width", type=int, default=100)
    parser.add_argument("--height", type=int, default=30)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(svg_of(view_of(args.run_dir, args.step), args.width, args.height), encoding="utf-8")
    print(f"{args.out} ({args.out.stat().st_size / 1024:.0f} KiB)")


if __name__ == "__main__":
    main()
