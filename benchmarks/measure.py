"""Timing: contestants take turns (A B A B), so that what drifts on the machine drifts for all of them."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks.machine import LoadMeter, synchronize


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One run: by the clock, and in processor seconds of this process. `others_frac`: see LoadMeter."""

    wall_s: float
    cpu_s: float
    others_frac: float | None

    def __str__(self) -> str:
        others = "" if self.others_frac is None else f", others used {self.others_frac:.0%} of the processors"
        return f"{self.wall_s:.3f} s ({self.cpu_s:.2f} processor s{others})"


def time_once(action: Callable[[], object], device: str) -> Timing:
    gc.collect()
    synchronize(device)
    meter, wall, cpu = LoadMeter(), time.perf_counter(), time.process_time()
    action()
    synchronize(device)
    return Timing(wall_s=time.perf_counter() - wall, cpu_s=time.process_time() - cpu, others_frac=meter.others_frac())


def take_turns(
    actions: Mapping[str, Callable[[], object]], *, repetitions: int, device: str, log: Callable[[str], None]
) -> dict[str, list[Timing]]:
    """Each action `repetitions` times, in turn."""
    timings: dict[str, list[Timing]] = {name: [] for name in actions}
    for i in range(repetitions):
        for name, action in actions.items():
            timing = time_once(action, device)
            log(f"{name}, repetition {i}: {timing}")
            timings[name].append(timing)
    return timings


def median_wall_s(timings: list[Timing]) -> float:
    return statistics.median(timing.wall_s for timing in timings)


def median_cpu_s(timings: list[Timing]) -> float:
    return statistics.median(timing.cpu_s for timing in timings)


def others_frac(timings: list[Timing]) -> float | None:
    """The largest share of the processors that others used during these runs."""
    return max((timing.others_frac for timing in timings if timing.others_frac is not None), default=None)
