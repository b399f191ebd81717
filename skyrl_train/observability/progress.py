"""The run in the terminal: a live view where there is one, a line a step everywhere else."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TextIO

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from skyrl_train.observability.live_view import RunView, Sample, WarmStart, one_line, render
from skyrl_train.observability.text import ACCURACY, duration, number, step_line

logger = logging.getLogger(__name__)

_RATE_STEPS = 20
"""The time left is reckoned from the pace of this many steps."""

ProgressMode = Literal["auto", "live", "plain", "off"]


class Progress:
    """Shows a run while it goes on, and leaves a last view and one line of summary.

        with Progress("quickstart", 120, model="tiny-qwen2", engine="embedded") as progress:
            progress.warm_start(10, 300, {"loss": 2.1, "accuracy": 0.2})
            progress.phase("rollout")
            progress.step(1, metrics, samples)

    `mode` auto is live on a terminal that can (not with NO_COLOR, CI or TERM=dumb set), else plain; off is silent.
    `total_steps` 0 is not known yet: `set_total` says it. `first_step` is the step that a resumed run starts after.
    In live mode what others print or log appears above the view; the terminal is restored however the block ends.
    """

    def __init__(
        self,
        run_name: str,
        total_steps: int = 0,
        *,
        model: str = "",
        engine: str = "",
        first_step: int = 0,
        mode: ProgressMode = "auto",
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.view = RunView(run_name=run_name, total_steps=total_steps, model=model, engine=engine, step=first_step)
        self.console = console or Console()
        self.mode: ProgressMode = _resolve_mode(self.console) if mode == "auto" else mode
        self._first_step = first_step
        self._clock = clock
        self._started = clock()
        self._step_ends: deque[float] = deque(maxlen=_RATE_STEPS + 1)
        self._lock = threading.RLock()
        self._live: Live | None = None
        self._handlers: list[tuple[logging.StreamHandler[TextIO], TextIO]] = []
        self._warm_tenth = -1
        self._render_failed = False

    def __enter__(self) -> Progress:
        self._started = self._clock()
        if self.mode == "live":
            self._live = Live(
                get_renderable=self._render, console=self.console, refresh_per_second=2, vertical_overflow="crop"
            )
            self._live.start(refresh=True)
            self._move_log_handlers()
        else:
            view = self.view
            facts = {"run": view.run_name, "model": view.model, "engine": view.engine, "steps": view.total_steps}
            self._line("  ".join(f"{name} {value}" for name, value in facts.items() if value))
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: object) -> None:
        stopped = "done" if exc_type is None else "interrupted" if exc_type is KeyboardInterrupt else "failed"
        with self._lock:
            self.view.stopped = stopped
        if self._live is not None:
            try:
                self._live.stop()
            finally:
                self._restore_log_handlers()
                self._live = None
        self._line(self.summary())

    def set_total(self, total_steps: int, *, first_step: int = 0) -> None:
        """Known once the data is read and a checkpoint is found: the last step, and the one that is done already."""
        with self._lock:
            self.view.total_steps, self.view.step, self._first_step = total_steps, first_step, first_step
        if self._live is None:
            self._line(f"steps {total_steps}" + (f"  done {first_step}" if first_step else ""))

    def restore(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Curves of the steps that were done before a resume: rows as `read_metrics` gives them."""
        with self._lock:
            for row in rows:
                numbers = {key: value for key, value in row.items() if isinstance(value, (int, float))}
                self.view.record(row["step"], numbers, ())

    def phase(self, name: str) -> None:
        """What the run does now; the same call serves as PhaseTimer's `on_start`."""
        with self._lock:
            self.view.phase = name
            if not self._step_ends:
                self._step_ends.append(self._clock())

    def warm_start(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        """Progress of the supervised phase; `metrics` such as loss and accuracy. Plain mode prints each tenth."""
        with self._lock:
            self.view.phase = "warm start"
            self.view.warm_start = WarmStart(step=step, total=total, metrics=dict(metrics))
        tenth = 10 * step // max(total, 1)
        if self._live is None and tenth > self._warm_tenth:
            facts = "".join(f"  {key.rpartition('/')[2]} {number(key, value)}" for key, value in metrics.items())
            self._line(f"warm start {step}/{total}{facts}")
        self._warm_tenth = max(self._warm_tenth, tenth)

    def step(self, step: int, metrics: Mapping[str, float], samples: Sequence[Sample] = ()) -> None:
        """A step is done. Metrics by the names of metrics.py; `samples` are shown until newer ones come."""
        with self._lock:
            self.view.record(step, metrics, samples)
            if step > self._first_step:
                self._step_ends.append(self._clock())
        if self._live is None:
            self._line(step_line(step, metrics, total_steps=self.view.total_steps or None))

    def message(self, text: str) -> None:
        """A line that stays: above the view in live mode, on its own in plain mode."""
        self._line(text)

    def summary(self) -> str:
        """One line: steps, time, and held-out accuracy from first to last."""
        view = self.view
        elapsed = duration(self._clock() - self._started)
        of = f"/{view.total_steps}" if view.total_steps else ""
        line = f"{view.run_name}: {view.stopped or 'running'} at step {view.step}{of} after {elapsed}"
        accuracy = view.history.get(ACCURACY)
        if accuracy:
            first, last = accuracy[0][1], accuracy[-1][1]
            line += f", held-out accuracy {number(ACCURACY, first)} → {number(ACCURACY, last)}"
        return line

    def _line(self, text: str) -> None:
        if self.mode == "off":
            return
        for line in text.splitlines():
            if self._live is not None:
                self.console.print(Text(one_line(line)), highlight=False)
            else:
                # Not through rich: it would fold long lines at 80 columns in a log file.
                encoding = getattr(self.console.file, "encoding", None) or "utf-8"
                shown = one_line(line).encode(encoding, errors="replace").decode(encoding)
                print(shown, file=self.console.file, flush=True)

    def _render(self) -> RenderableType:
        with self._lock:
            now = self._clock()
            self.view.elapsed_s = now - self._started
            self.view.eta_s = self.seconds_left()
            width, height = self.console.size
            try:
                return render(self.view, width, height - 1)
            except Exception as exc:
                # The boundary: a fault in the picture must not end the training that it shows.
                if not self._render_failed:
                    self._render_failed = True
                    logger.exception("the live view could not be drawn")
                return Text(f"step {self.view.step}/{self.view.total_steps} (view failed: {exc})", no_wrap=True)

    def seconds_left(self) -> float | None:
        """By the pace of the latest steps; None before the first is done."""
        ends = self._step_ends
        if len(ends) < 2:
            return None
        step_s = (ends[-1] - ends[0]) / (len(ends) - 1)
        return max(step_s * (self.view.total_steps - self.view.step) - (self._clock() - ends[-1]), 0.0)

    def _move_log_handlers(self) -> None:
        """Log lines that go straight to the terminal would tear the view: send them through rich's redirection."""
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream in {sys.__stdout__, sys.__stderr__}:
                self._handlers.append((handler, handler.stream))
                handler.setStream(sys.stderr)

    def _restore_log_handlers(self) -> None:
        for handler, stream in self._handlers:
            handler.setStream(stream)
        self._handlers.clear()


def _resolve_mode(console: Console) -> ProgressMode:
    # Rich takes COLUMNS x LINES and its own hints as a terminal; the file itself decides here.
    unable = os.environ.get("NO_COLOR") or os.environ.get("CI") or os.environ.get("TERM", "dumb") in {"dumb", "unknown"}
    is_terminal = console.file.isatty()
    utf8 = (getattr(console.file, "encoding", None) or "").lower().replace("-", "") == "utf8"
    return "live" if is_terminal and utf8 and not unable else "plain"
