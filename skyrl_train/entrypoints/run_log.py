"""Where a step's results go: trackers, rollouts on disk, the terminal. Implements the loop's `RunLog`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from skyrl_train.config.schema import Config
from skyrl_train.loop import Advantages
from skyrl_train.observability.live_view import Sample
from skyrl_train.observability.metrics import memory_metrics
from skyrl_train.observability.phases import PhaseTimer
from skyrl_train.observability.progress import Progress
from skyrl_train.observability.rollouts import RolloutLog, shown_samples
from skyrl_train.observability.trackers import Tracker, Trackers, open_trackers
from skyrl_train.rollout.groups import Rollouts

Decode = Callable[[Sequence[int]], str]


class RunFiles:
    """Opened after resuming: what an earlier process wrote past `resume_step` is dropped."""

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        progress: Progress,
        phases: PhaseTimer,
        *,
        decode: Decode,
        show: Decode,
        resume_step: int | None,
        total_steps: int,
        also: Sequence[Tracker] = (),
    ) -> None:
        """`decode` keeps special tokens, for the files; `show` leaves them out, for the terminal.

        `also` are trackers that get each row too.
        """
        self._progress, self._phases, self._show = progress, phases, show
        self._samples: tuple[Sample, ...] = ()
        keys = config.trainer
        # The terminal's own view stands in for the console tracker.
        names = [name for name in keys.logger if name != "console"]
        opened = open_trackers(
            names,
            run_dir,
            project_name=keys.project_name,
            run_name=keys.run_name,
            resume_step=resume_step,
            total_steps=total_steps,
        )
        self._trackers = Trackers([*opened.trackers, *also])
        self._rollouts = RolloutLog(
            run_dir / "rollouts",
            decode,
            resume_step=resume_step,
            total_steps=total_steps,
            every_steps=keys.rollout_log_interval,
        )

    def __enter__(self) -> RunFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._trackers.close()

    def step(self, step: int, rollouts: Rollouts, advantages: Advantages) -> None:
        """A training step's rollouts."""
        groups = (*rollouts.groups, *rollouts.failed)
        self._rollouts.write(step, groups, advantages=advantages)
        self._samples = shown_samples(groups, self._show)

    def evaluation(self, step: int, rollouts: Rollouts) -> None:
        """An evaluation's rollouts."""
        self._rollouts.write(step, (*rollouts.groups, *rollouts.failed), kind="eval")

    def flush(self, step: int, metrics: dict[str, float]) -> None:
        """The step's row: its metrics, the phases' seconds since the last row, memory."""
        row = {**metrics, **self._phases.take(), **memory_metrics()}
        self._trackers.log(step, row)
        self._progress.step(step, row, self._samples)
