"""Timing: contestants take turns (A B A B), so that what drifts on the machine drifts for all of them."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch.profiler import ProfilerActivity, profile

from benchmarks.machine import LoadMeter, synchronize


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One run: by the clock, and in processor seconds of this process and its engine. `others_frac`: see LoadMeter.

    `phases` are seconds side by side that sum to `wall_s`, where the run was taken apart.
    """

    wall_s: float
    cpu_s: float
    others_frac: float | None
    phases: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        phases = "".join(f", {name} {seconds:.3f}" for name, seconds in self.phases.items())
        others = "" if self.others_frac is None else f"; others used {self.others_frac:.0%} of the processors"
        return f"{self.wall_s:.3f} s{phases} ({self.cpu_s:.2f} processor s{others})"


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Of several runs: medians, and the extremes by the clock. `others_frac` is the largest."""

    median_s: float
    min_s: float
    max_s: float
    cpu_s: float
    others_frac: float | None
    phases: dict[str, float]

    @property
    def others(self) -> str:
        return "" if self.others_frac is None else f"{self.others_frac:.0%}"


def summarize(timings: Sequence[Timing]) -> Figures:
    walls = [timing.wall_s for timing in timings]
    return Figures(
        median_s=statistics.median(walls),
        min_s=min(walls),
        max_s=max(walls),
        cpu_s=statistics.median(timing.cpu_s for timing in timings),
        others_frac=max((t.others_frac for t in timings if t.others_frac is not None), default=None),
        phases={name: statistics.median(timing.phases[name] for timing in timings) for name in timings[0].phases},
    )


class PhaseClock:
    """Times a step and its parts; on a GPU a part ends when its kernels have ended.

    `child_seconds` are the processor seconds so far of processes that work for this one.
    """

    def __init__(self, device: str, child_seconds: Callable[[], float] | None = None) -> None:
        self._device = device
        self._child_seconds = child_seconds or (lambda: 0.0)
        self._phases: dict[str, float] = {}
        self._restart()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        synchronize(self._device)
        start = time.perf_counter()
        yield
        synchronize(self._device)
        self._phases[name] = self._phases.get(name, 0.0) + time.perf_counter() - start

    def seconds(self, name: str) -> float:
        return self._phases.get(name, 0.0)

    def end_step(self, phases: Callable[[PhaseClock], dict[str, float]] | None = None) -> Timing:
        """The step since the last call or the clock's making; `phases` recombines what was collected."""
        synchronize(self._device)
        wall_s = time.perf_counter() - self._wall
        parts = dict(self._phases) if phases is None else phases(self)
        children_s = self._child_seconds() - self._children_s
        timing = Timing(
            wall_s=wall_s,
            cpu_s=time.process_time() - self._cpu + children_s,
            others_frac=self._meter.others_frac(children_s),
            phases={**parts, "rest": wall_s - sum(parts.values())} if parts else {},
        )
        self._restart()
        return timing

    def _restart(self) -> None:
        self._phases.clear()
        self._children_s = self._child_seconds()
        self._meter, self._wall, self._cpu = LoadMeter(), time.perf_counter(), time.process_time()


def time_once(action: Callable[[], object], device: str, *, child_seconds: Callable[[], float] | None = None) -> Timing:
    gc.collect()
    synchronize(device)
    clock = PhaseClock(device, child_seconds)
    action()
    return clock.end_step()


def profile_once(action: Callable[[], object], device: str) -> str:
    """Where one run spends its time, by operator. Threads that the action starts are not seen."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities) as profiler:
        action()
        synchronize(device)
    by = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    return str(profiler.key_averages().table(sort_by=by, row_limit=15, max_name_column_width=50))
