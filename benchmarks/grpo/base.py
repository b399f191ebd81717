"""What a side reports about its steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from benchmarks.machine import LoadMeter, synchronize


@dataclass(frozen=True, kw_only=True)
class StepTiming:
    """One whole step. `phases` are seconds side by side; what they don't cover is in `phases["rest"]`."""

    wall_s: float
    cpu_s: float
    others_frac: float | None
    phases: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        phases = ", ".join(f"{name} {seconds:.3f}" for name, seconds in self.phases.items())
        others = "" if self.others_frac is None else f", others used {self.others_frac:.0%} of the processors"
        return f"{self.wall_s:.3f} s: {phases} ({self.cpu_s:.2f} processor s{others})"


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """Completions of one step [P * G], prompt after prompt, with the engine's log-probabilities where it has them."""

    prompts: list[tuple[int, ...]]
    completions: list[tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Gradient:
    """What one step made of given completions."""

    loss: float
    grad_norm: float


class GrpoSide(Protocol):
    """One trainer in one setting, with its own copy of the weights."""

    name: str
    num_threads: int

    def run(self, num_steps: int) -> list[StepTiming]:
        """Whole steps: rollout, rewards, advantages, loss, gradients, optimizer, new weights live in the engine."""
        ...

    def gradient(self, rollout: Rollout) -> Gradient:
        """One training step on these completions. For comparing sides, not for timing."""
        ...

    def close(self) -> None: ...


class PhaseClock:
    """Collects the seconds of a step's parts; on a GPU a part ends when its kernels have ended."""

    def __init__(self, device: str) -> None:
        self._device = device
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

    def end_step(self, phases: Callable[[PhaseClock], dict[str, float]] | None = None) -> StepTiming:
        """The step since the last call or the clock's making; `phases` recombines what was collected."""
        synchronize(self._device)
        wall_s = time.perf_counter() - self._wall
        parts = dict(self._phases) if phases is None else phases(self)
        timing = StepTiming(
            wall_s=wall_s,
            cpu_s=time.process_time() - self._cpu,
            others_frac=self._meter.others_frac(),
            phases={**parts, "rest": wall_s - sum(parts.values())},
        )
        self._restart()
        return timing

    def _restart(self) -> None:
        self._phases.clear()
        self._meter, self._wall, self._cpu = LoadMeter(), time.perf_counter(), time.process_time()
