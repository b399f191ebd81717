"""From a run's folder to the data of its page: plain dicts and lists, small enough to sit in one file.

config.yaml     -> config      every key, with the default where it differs
metrics.jsonl   -> series      name -> steps and values; more than MAX_POINTS become means with their range
                   phases      seconds a step of each phase, aligned, 0 where a phase did not run
                   summary     what the tiles say, from all steps, not from the thinned ones
rollouts/       -> rollouts    steps spread over the run, within MAX_ROLLOUT_BYTES
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from skyrl_train.config.compose import flatten
from skyrl_train.config.load import load_config, plain
from skyrl_train.errors import DataError, SkyRLError
from skyrl_train.observability.live_view import phase_seconds
from skyrl_train.observability.metrics import NONFINITE, STEP_SECONDS, Row, read_metrics
from skyrl_train.observability.rollouts import rollout_files
from skyrl_train.observability.text import ACCURACY, REWARD

MAX_POINTS = 600
MAX_ROLLOUT_FILES = 60
MAX_ROLLOUT_BYTES = 6_000_000
MAX_TEXT = 20_000
_MAX_NONFINITE_NAMED = 20
_SECONDS_DIGITS = 5

PageData = dict[str, Any]


def collect(run_dir: Path) -> PageData:
    """Everything that the page shows. Raises DataError when `run_dir` holds neither a configuration nor metrics."""
    config_path, metrics_path = run_dir / "config.yaml", run_dir / "metrics.jsonl"
    if not config_path.is_file() and not metrics_path.is_file():
        raise DataError(f"{run_dir} is not the folder of a run: neither config.yaml nor metrics.jsonl is in it")
    problems: list[str] = []
    rows = read_metrics(metrics_path) if metrics_path.is_file() else []
    tree = _config_tree(config_path, problems)
    return {
        "run": run_dir.resolve().name,
        "facts": _facts(tree),
        "summary": _summary(rows),
        "series": _series(rows),
        "phases": _phases(rows),
        "nonfinite": _nonfinite(rows),
        "rollouts": _rollouts(run_dir / "rollouts", problems),
        "config": _config(tree, problems),
        "problems": problems,
    }


def thin(steps: Sequence[int], values: Sequence[float], limit: int = MAX_POINTS) -> dict[str, list[float]]:
    """A series for the page: `s` steps, `v` values; above `limit` points, means of equal stretches with lo and hi.

    Steps 1..4 with values 1, 3, 5, 9 at limit 2: s [2, 4], v [2, 7], lo [1, 5], hi [3, 9]. The last step stays last.
    """
    if len(steps) <= limit:
        return {"s": list(steps), "v": [_short(v) for v in values]}
    edges = [i * len(steps) // limit for i in range(limit + 1)]
    parts = [values[a:b] for a, b in pairwise(edges)]
    return {
        "s": [steps[b - 1] for b in edges[1:]],
        "v": [_short(sum(part) / len(part)) for part in parts],
        "lo": [_short(min(part)) for part in parts],
        "hi": [_short(max(part)) for part in parts],
    }


def _series(rows: Sequence[Row]) -> dict[str, dict[str, list[float]]]:
    points: dict[str, tuple[list[int], list[float]]] = {}
    for row in rows:
        for key, value in row.items():
            if key != "step" and isinstance(value, (int, float)):
                steps, values = points.setdefault(key, ([], []))
                steps.append(row["step"])
                values.append(value)
    return {key: thin(*points[key]) for key in sorted(points)}


def _phases(rows: Sequence[Row]) -> dict[str, Any]:
    timed = [(row["step"], phase_seconds(_numbers(row)), row.get(STEP_SECONDS)) for row in rows]
    timed = [(step, phases, total) for step, phases, total in timed if phases]
    steps = [step for step, _, _ in timed]
    names = list(dict.fromkeys(name for _, phases, _ in timed for name in phases))
    columns = {name: [phases.get(name, 0.0) for _, phases, _ in timed] for name in names}
    # What a step took beyond its phases.
    rest = [max((total or 0.0) - sum(phases.values()), 0.0) for _, phases, total in timed]
    if timed and sum(rest) > 0.01 * sum(sum(column) for column in columns.values()):
        columns["other"] = rest
    thinned = {name: thin(steps, column) for name, column in columns.items()}
    return {
        "steps": next(iter(thinned.values()))["s"] if thinned else [],
        "names": list(thinned),
        "seconds": [series["v"] for series in thinned.values()],
        "totals": [round(sum(column), _SECONDS_DIGITS) for column in columns.values()],
    }


def _summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Of all steps; a figure that the metrics do not hold is left out."""
    summary: dict[str, Any] = {"num_steps": max((row["step"] for row in rows), default=0)}
    for name, key in (("accuracy", ACCURACY), ("reward", REWARD)):
        values = [row[key] for row in rows if isinstance(row.get(key), (int, float))]
        if values:
            summary[name] = {"first": values[0], "last": values[-1], "best": max(values)}
    seconds = [row[STEP_SECONDS] for row in rows if isinstance(row.get(STEP_SECONDS), (int, float))]
    if seconds:
        summary["seconds"] = sum(seconds)
    tokens = [row for row in rows if isinstance(row.get("rollout/num_tokens"), (int, float))]
    if tokens:
        summary["tokens"] = sum(row["rollout/num_tokens"] for row in tokens)
        rollout_s = sum(row.get("timing/rollout_s") or 0.0 for row in tokens)
        if rollout_s > 0:
            summary["tokens_per_s"] = summary["tokens"] / rollout_s
    peaks = [row[key] for row in rows for key in row if key == "memory/peak_rss_bytes" and row[key]]
    if peaks:
        summary["peak_bytes"] = max(peaks)
    return summary


def _nonfinite(rows: Sequence[Row]) -> dict[str, Any]:
    named = [
        f"{key} was {value} at step {row['step']}" for row in rows for key, value in row.get(NONFINITE, {}).items()
    ]
    return {"count": len(named), "named": named[:_MAX_NONFINITE_NAMED]}


def _rollouts(folder: Path, problems: list[str]) -> dict[str, Any]:
    files = rollout_files(folder)
    chosen: list[dict[str, Any]] = []
    for kind in ("train", "eval"):
        of_kind = [(step, path) for found, step, path in files if found == kind]
        budget = MAX_ROLLOUT_BYTES * (3 if kind == "train" else 1) // 4
        for step, path in _spread(of_kind, budget):
            chosen.append({"kind": kind, "step": step, "records": _records(path, problems)})
    return {"files": chosen, "num_recorded": len(files)}


def _spread(files: Sequence[tuple[int, Path]], budget: int) -> list[tuple[int, Path]]:
    """Evenly spread files, first and last included, as many as fit: MAX_ROLLOUT_FILES and `budget` bytes."""
    count = min(len(files), MAX_ROLLOUT_FILES)
    while count > 1:
        picked = [files[i * (len(files) - 1) // (count - 1)] for i in range(count)]
        if sum(path.stat().st_size for _, path in picked) <= budget:
            return picked
        count = count * 3 // 4
    return list(files[-1:])


def _records(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as exc:
            problems.append(f"{path.name}, line {number} is not JSON and is not shown: {exc}")
            continue
        records.append(_shortened(record))
    return records


def _shortened(value: Any) -> Any:
    """Texts of a length that a page can bear; what was cut says so."""
    if isinstance(value, str) and len(value) > MAX_TEXT:
        return value[:MAX_TEXT] + f" … ({len(value) - MAX_TEXT:,} more characters in the rollouts file)"
    if isinstance(value, dict):
        return {key: _shortened(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_shortened(item) for item in value]
    return value


def _config_tree(path: Path, problems: list[str]) -> dict[str, Any]:
    if not path.is_file():
        problems.append("config.yaml is not in the run's folder")
        return {}
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as exc:
        problems.append(f"config.yaml can't be read: {exc}")
        return {}
    return tree if isinstance(tree, dict) else {}


def _facts(tree: Mapping[str, Any]) -> dict[str, str]:
    """What the head of the page says of the run."""
    flat = dict(flatten(dict(tree)))
    wanted = {
        "model": "trainer.policy.model.path",
        "engine": "generator.backend",
        "algorithm": "trainer.algorithm.advantage_estimator",
        "environment": "environment.env_class",
        "seed": "trainer.seed",
    }
    return {name: str(flat[key]) for name, key in wanted.items() if flat.get(key) is not None}


def _config(tree: Mapping[str, Any], problems: list[str]) -> list[dict[str, Any]]:
    """key, value and, where it differs, default; changed keys keep their place in the file's order."""
    if not tree:
        return []
    try:
        defaults: Mapping[str, Any] = dict(flatten(plain(load_config(()).config)))
    except SkyRLError as exc:
        problems.append(f"the defaults can't be told, so no key is marked as changed: {exc}")
        defaults = {}
    entries = []
    for key, value in flatten(dict(tree)):
        entry: dict[str, Any] = {"key": key, "value": _yaml_value(value)}
        if key in defaults and defaults[key] != value:
            entry["default"] = _yaml_value(defaults[key])
        entries.append(entry)
    return entries


def _yaml_value(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def _numbers(row: Row) -> dict[str, float]:
    return {key: value for key, value in row.items() if isinstance(value, (int, float))}


def _short(value: float) -> float:
    """Six digits are more than a picture can show."""
    return value if isinstance(value, int) or not math.isfinite(value) else float(f"{value:.6g}")
