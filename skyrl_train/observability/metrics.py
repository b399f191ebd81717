"""Metric names, and the file that holds them.

A metric is a number under a name of the form `group/name`, with its unit as a suffix (`_s`, `_bytes`,
`_frac`, `_per_s`):

    reward/mean  eval/accuracy  policy/loss  rollout/num_tokens                          the run's own
    timing/rollout_s  throughput/rollout_tokens_per_s  memory/peak_rss_bytes             the machine's
    engine/running  engine/kv_used_frac  engine/restarts                                 what engines met

The groups `timing/`, `throughput/`, `memory/` and `engine/` depend on the machine and its load; everything
else is a function of the seed, so two runs are compared on it (`deterministic_metrics`).

`metrics.jsonl` holds one JSON object a step: `step` first, then the metrics. A value that is not finite
is null there, and the object's `nonfinite` says what it was: {"step": 3, "policy/loss": null,
"nonfinite": {"policy/loss": "nan"}}.
"""

from __future__ import annotations

import json
import math
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from skyrl_train.errors import DataError

WALL_CLOCK_GROUPS = ("timing/", "throughput/", "memory/", "engine/")
STEP_SECONDS = "timing/step_s"
NONFINITE = "nonfinite"

Row = dict[str, Any]
"""One line of metrics.jsonl: `step` int, metric values float, int or None, `nonfinite` name -> text."""


def is_wall_clock(key: str) -> bool:
    """True for metrics that depend on the machine and its load, not on the seed."""
    return key.startswith(WALL_CLOCK_GROUPS)


def deterministic_metrics(path: Path | str) -> list[Row]:
    """The rows of a metrics.jsonl without wall-clock values: equal for two runs of one seed and configuration."""
    return [{key: value for key, value in row.items() if not is_wall_clock(key)} for row in read_metrics(path)]


def read_metrics(path: Path | str) -> list[Row]:
    """The rows of a metrics.jsonl in order; a last line that was cut short by a kill is left out.

    Raises DataError, naming file and line, for any other line that is not an object with an integer `step`.
    """
    lines = Path(path).read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        row = parse_row(line)
        if row is not None:
            rows.append(row)
        elif line.strip() and number < len(lines):
            raise DataError(f"{path}, line {number}: expected a JSON object with an integer step, found {line[:80]!r}")
    return rows


def parse_row(line: bytes) -> Row | None:
    """The row on this line, or None when the line does not hold a whole one."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if isinstance(row, dict) and isinstance(row.get("step"), int):
        return row
    return None


def plain_numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The same metrics as Python numbers: ints stay ints, one-element tensors and arrays become floats.

    Raises TypeError, naming the metric, for anything that is not a number.
    """
    return {key: _plain_number(key, value) for key, value in metrics.items()}


def nonfinite_names(metrics: Mapping[str, float]) -> dict[str, str]:
    """name -> "nan", "inf" or "-inf" for each value that is not finite."""
    return {key: str(value) for key, value in metrics.items() if not math.isfinite(value)}


def memory_metrics() -> dict[str, float]:
    """Peak memory so far: of this process, and on the GPU where one is in use."""
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    metrics: dict[str, float] = {"memory/peak_rss_bytes": peak}
    # Not imported above: reading a metrics file should not cost the import of torch.
    import torch

    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        metrics["memory/peak_gpu_bytes"] = torch.cuda.max_memory_allocated()
    return metrics


def _plain_number(key: str, value: Any) -> float:
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, int):
        return value
    if isinstance(value, str):
        raise TypeError(f"metric {key}: expected a number, found the text {value!r}")
    try:
        return float(value)
    except (TypeError, ValueError) as exc:
        raise TypeError(f"metric {key}: expected a number, found {value!r}") from exc
