"""Where a step's time goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from skyrl_train.observability.metrics import STEP_SECONDS
from skyrl_train.observability.tracing import span


class PhaseTimer:
    """Adds up wall-clock seconds per phase of a step.

        phases = PhaseTimer(on_start=progress.phase)
        for step in ...:
            with phases("rollout"): ...
            with phases("train"): ...
            metrics |= phases.take()     # timing/rollout_s, timing/train_s, timing/step_s

    A phase that is entered twice in a step counts both times. `step_s` is all time since the last `take`,
    so what it has over the sum of the phases was spent between them. A part of a phase is named with a
    slash (`train/forward`) and is already within the whole. On a GPU this is the host's time: work that is
    only queued shows in the phase that waits for it. Of a traced run each phase is a span.
    """

    def __init__(
        self, *, on_start: Callable[[str], None] | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._clock = clock
        self._on_start = on_start
        self._seconds: dict[str, float] = {}
        self._step_start = clock()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if self._on_start is not None:
            self._on_start(name)
        start = self._clock()
        try:
            with span(name):
                yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + self._clock() - start

    def seconds(self, name: str) -> float:
        """Seconds of this phase since the last `take`; 0 for a phase that did not run."""
        return self._seconds.get(name, 0.0)

    def take(self) -> dict[str, float]:
        """The seconds since the last call, as `timing/<phase>_s` and `timing/step_s`; starts from zero again."""
        now = self._clock()
        metrics = {f"timing/{name}_s": seconds for name, seconds in self._seconds.items()}
        metrics[STEP_SECONDS] = now - self._step_start
        self._seconds = {}
        self._step_start = now
        return metrics
