"""One run of the main job in a process of its own, and what its metrics say afterwards."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from skyrl_train.observability.metrics import Row, read_metrics

ROOT = Path(__file__).parents[2]


class JobFailed(Exception):
    """The main job ended with another exit code than 0; the message has the end of what it printed."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """`rows` of metrics.jsonl, without duplicates; `wall_s` of the whole process, start included."""

    rows: list[Row]
    wall_s: float

    def series(self, key: str) -> list[tuple[int, float]]:
        """(step, value) wherever the metric was logged."""
        return [(row["step"], float(row[key])) for row in self.rows if isinstance(row.get(key), (int, float))]

    def last(self, key: str) -> float:
        return self.series(key)[-1][1]


def mean_around(series: Sequence[tuple[float, float]], step: int, *, half_width: int = 2) -> float:
    """The mean of the values logged within `half_width` of `step`: one step's reward is noisy."""
    near = [value for at, value in series if abs(at - step) <= half_width]
    return sum(near) / len(near)


def run_job(
    overrides: Sequence[str],
    run_dir: Path,
    *,
    threads: int | None = None,
    timeout_s: float | None = None,
    on_line: Callable[[str], None] | None = None,
) -> Outcome:
    """Runs it anew in `run_dir`, which is emptied first; what it prints is in `job.out` there. Raises JobFailed."""
    shutil.rmtree(run_dir, ignore_errors=True)
    command = [
        sys.executable,
        "-m",
        "skyrl_train.entrypoints.main_base",
        f"trainer.run_path={run_dir.resolve()}",
        "trainer.logger=[jsonl]",
        "trainer.resume_mode=none",
        "trainer.ckpt_interval=-1",
        *overrides,
    ]
    environment: Mapping[str, str] = {**os.environ, "PYTHONPATH": path_with(ROOT)}
    if threads is not None:
        environment = {**environment, "OMP_NUM_THREADS": str(threads)}
    if on_line is not None:
        on_line(" ".join(["$", "python", *command[1:]]))
    start = time.perf_counter()
    run_dir.mkdir(parents=True)
    printed = run_dir / "job.out"
    try:
        # To a file: whoever is killed while it waits leaves what there was, and a server that outlives the job holds
        # no pipe that somebody reads to its end.
        with printed.open("w") as out:
            done = subprocess.run(
                command, cwd=ROOT, env=dict(environment), stdout=out, stderr=out, timeout=timeout_s, check=False
            )
    except subprocess.TimeoutExpired as exc:
        last = printed.read_text().strip().splitlines()[-1:]
        raise JobFailed(f"not done after {timeout_s:.0f} s; it printed last: {' '.join(last)}") from exc
    wall_s = time.perf_counter() - start
    if done.returncode != 0:
        raise JobFailed(f"exit code {done.returncode}: {printed.read_text()[-2000:]}")
    return Outcome(rows=read_metrics(run_dir / "metrics.jsonl"), wall_s=wall_s)


def path_with(folder: Path) -> str:
    """PYTHONPATH with a folder in front, so that modules of this repository are found by dotted path."""
    rest = os.environ.get("PYTHONPATH")
    return f"{folder}{os.pathsep}{rest}" if rest else str(folder)
