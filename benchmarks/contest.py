"""Who is compared, in which setting, with what result."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from benchmarks.measure import Figures, Timing, summarize
from benchmarks.report import Report

OURS = "skyrl_train"


class Runner(Protocol):
    """An engine or a trainer, set up; `name` says in which setting."""

    name: str
    num_threads: int

    def close(self) -> None: ...


R = TypeVar("R", bound=Runner)


@dataclass
class Contestant(Generic[R]):
    """`timings` by discipline (sampled, greedy; step). One that can't run here has an error and no runner."""

    name: str
    setting: str = ""
    error: str = ""
    timings: dict[str, list[Timing]] = field(default_factory=dict)
    headline: dict[str, str] = field(default_factory=dict)
    """Of each discipline, the one figure to quote."""
    _runner: R | None = None

    @property
    def runs(self) -> bool:
        return self._runner is not None

    @property
    def runner(self) -> R:
        assert self._runner is not None, f"{self.name}: {self.error or 'not set up'}"
        return self._runner

    def enter(self, runner: R) -> None:
        self._runner = runner
        self.setting = runner.name

    def leave(self) -> None:
        if self._runner is not None:
            self._runner.close()
        self._runner = None

    @contextmanager
    def may_fail(self, report: Report) -> Iterator[None]:
        """A contestant that can't run here, or is wrong, is a row of the table and in the log, not the run's end."""
        try:
            yield
        except Exception as exc:
            report.log(f"{self.name} is out:\n{traceback.format_exc()}")
            self.error = f"{type(exc).__name__}: {(str(exc).splitlines() or [''])[0][:200]}"
            self.leave()

    def figures(self, discipline: str) -> Figures | None:
        timings = self.timings.get(discipline)
        return summarize(timings) if timings else None


def speedup(
    contestants: Sequence[Contestant[R]], contestant: Contestant[R], discipline: str, *, by: str = "median_s"
) -> str:
    """How many times as fast as the fastest peer; empty where there is nothing to compare. `by`: a field of Figures."""
    own = contestant.figures(discipline)
    peers = [figures for c in contestants if c.name != OURS and (figures := c.figures(discipline))]
    if own is None or not peers:
        return ""
    return f"{min(getattr(figures, by) for figures in peers) / getattr(own, by):.2f}"
