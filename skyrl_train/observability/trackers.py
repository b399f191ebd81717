"""Where metrics go: the console, `metrics.jsonl`, TensorBoard.

All trackers take the same call, once a step, steps rising. A run that resumes after step n keeps what was
logged up to n and forgets the rest, so that the steps which are done again are not there twice.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from skyrl_train.errors import ConfigError
from skyrl_train.observability.files import replace_file
from skyrl_train.observability.metrics import NONFINITE, nonfinite_names, parse_row, plain_numbers
from skyrl_train.observability.text import step_line

logger = logging.getLogger(__name__)

TRACKER_NAMES = ("console", "jsonl", "tensorboard", "wandb", "mlflow")
_NEEDS_PACKAGE = ("tensorboard", "wandb", "mlflow")


class Tracker(Protocol):
    """Takes one step's metrics at a time; `step` rises from call to call."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def open_trackers(
    names: Sequence[str],
    run_dir: Path | str,
    *,
    project_name: str = "skyrl_train",
    run_name: str | None = None,
    resume_step: int | None = None,
    total_steps: int | None = None,
) -> Trackers:
    """All trackers of a run behind one.

    `names` are from TRACKER_NAMES: `jsonl` writes run_dir/metrics.jsonl, `tensorboard` run_dir/tensorboard/,
    `console` one line a step to standard output (leave it out where `Progress` shows the steps), `wandb` and
    `mlflow` a run named `run_name` (None: the folder's name) in `project_name`.
    `resume_step` is the last step to keep of an earlier run in this folder; None starts anew.
    Raises ConfigError for a name that is unknown or whose package is not installed.
    """
    check_tracker_names(names)
    run_dir = Path(run_dir)
    name = run_name or run_dir.resolve().name
    # A service keeps what it was sent: the steps that a resume does again go to a run of their own.
    hosted_name = name if resume_step is None else f"{name}-from-step-{resume_step}"
    makers: dict[str, Callable[[], Tracker]] = {
        "console": lambda: ConsoleTracker(total_steps=total_steps),
        "jsonl": lambda: JsonlTracker(run_dir / "metrics.jsonl", resume_step=resume_step),
        "tensorboard": lambda: TensorBoardTracker(run_dir / "tensorboard", resume_step=resume_step),
        "wandb": lambda: WandbTracker(run_dir, project_name=project_name, run_name=hosted_name, group=name),
        "mlflow": lambda: MlflowTracker(project_name=project_name, run_name=hosted_name),
    }
    opened: list[Tracker] = []
    try:
        for tracker_name in dict.fromkeys(names):
            opened.append(makers[tracker_name]())
    except BaseException:
        Trackers(opened).close()
        raise
    return Trackers(opened)


def check_tracker_names(names: Sequence[str]) -> None:
    """Raises ConfigError, saying what to change, unless each name can be opened here."""
    for name in names:
        if name not in TRACKER_NAMES:
            raise ConfigError(f"trainer.logger: unknown tracker {name!r}; choose from {', '.join(TRACKER_NAMES)}")
        if name in _NEEDS_PACKAGE and importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"trainer.logger: {name} is not installed in this environment; `pip install {name}`, or take it out"
            )


class Trackers:
    """Hands each step to several trackers, in order. Counts values that are not finite, and warns of each."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self.trackers = tuple(trackers)
        self.num_nonfinite = 0
        self._last_step: int | None = None

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Raises ValueError for a step that is not after the last, TypeError for a metric that is no number."""
        if self._last_step is not None and step <= self._last_step:
            raise ValueError(f"step {step} was logged after step {self._last_step}: one call a step, steps rising")
        self._last_step = step
        numbers = plain_numbers(metrics)
        bad = nonfinite_names(numbers)
        if bad:
            self.num_nonfinite += len(bad)
            logger.warning("step %d: metrics that are not finite: %s", step, bad)
        for tracker in self.trackers:
            tracker.log(step, numbers)

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.close()

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class ConsoleTracker:
    """One line a step."""

    def __init__(self, write: Callable[[str], None] | None = None, *, total_steps: int | None = None) -> None:
        self._write = write or _print_line
        self._total_steps = total_steps

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._write(step_line(step, metrics, total_steps=self._total_steps))

    def close(self) -> None:
        pass


class JsonlTracker:
    """One JSON object a line and step, on disk when `log` returns: a killed run loses nothing it logged.

    Lines after `resume_step` are removed when opened (all of them when it is None).
    """

    def __init__(self, path: Path | str, *, resume_step: int | None = None) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        dropped = truncate_after(self.path, resume_step)
        if dropped:
            logger.info("%s: %d lines after step %s removed", self.path, dropped, resume_step)
        self._file = self.path.open("a", encoding="utf-8", buffering=1)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        bad = nonfinite_names(metrics)
        row: dict[str, Any] = {"step": step}
        row |= {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        if bad:
            row[NONFINITE] = bad
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def truncate_after(path: Path | str, step: int | None) -> int:
    """Keep the lines of a metrics.jsonl up to and including `step` (None: none); returns how many were removed.

    A line that is not a whole row, as a kill leaves it, counts as one of the removed. The new file replaces
    the old one at once: a kill in the middle leaves one of the two.
    """
    path = Path(path)
    if not path.exists():
        return 0
    lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
    kept = []
    for line in lines:
        row = parse_row(line)
        if row is not None and step is not None and row["step"] <= step:
            kept.append(line + b"\n")
    replace_file(path, b"".join(kept))
    return len(lines) - len(kept)


class TensorBoardTracker:
    """Scalars under the metrics' own names, flushed each step. Steps after `resume_step` are purged from the view."""

    def __init__(self, log_dir: Path | str, *, resume_step: int | None = None) -> None:
        # TensorBoard takes a second to import: only who asks for it pays.
        from torch.utils.tensorboard import SummaryWriter

        first_step = 0 if resume_step is None else resume_step + 1
        self._writer: Any = SummaryWriter(log_dir=os.fspath(log_dir), purge_step=first_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbTracker:
    """A Weights & Biases run. Needs the package, and an account or WANDB_MODE=offline."""

    def __init__(self, run_dir: Path, *, project_name: str, run_name: str, group: str) -> None:
        wandb: Any = importlib.import_module("wandb")
        run_dir.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(project=project_name, name=run_name, group=group, dir=os.fspath(run_dir))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class MlflowTracker:
    """An MLflow run, on the server that MLFLOW_TRACKING_URI names; values that are not finite are left out there."""

    def __init__(self, *, project_name: str, run_name: str) -> None:
        mlflow: Any = importlib.import_module("mlflow")
        client = mlflow.MlflowClient()
        experiment = client.get_experiment_by_name(project_name)
        experiment_id = experiment.experiment_id if experiment else client.create_experiment(project_name)
        self._client = client
        self._run_id: str = client.create_run(experiment_id, run_name=run_name).info.run_id

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            if math.isfinite(value):
                self._client.log_metric(self._run_id, key, value, step=step)

    def close(self) -> None:
        self._client.set_terminated(self._run_id)


def _print_line(line: str) -> None:
    print(line, flush=True)
