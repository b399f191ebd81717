"""A server's own figures over all of its lives: what it counts starts at nothing in each, what we say only rises."""

from __future__ import annotations

from dataclasses import replace

from skyrl_train.engines.server.client import ServerFigures

_COUNTERS = ("num_retractions_total", "num_evicted_tokens_total", "num_steps_total")


class Counters:
    """`latest` is the last look, None before the first."""

    def __init__(self) -> None:
        self.latest: ServerFigures | None = None
        self._before = dict.fromkeys(_COUNTERS, 0)

    def look(self, figures: ServerFigures) -> None:
        for name in _COUNTERS:
            was, now = _number(self.latest, name), _number(figures, name)
            if now < was:  # started again by others, who say nothing of it
                self._before[name] += was
        self.latest = figures

    def life_over(self) -> None:
        """The server is gone, and the next one counts from nothing."""
        if self.latest is not None:
            for name in _COUNTERS:
                self._before[name] += _number(self.latest, name)
            self.latest = replace(
                self.latest, num_running=0, num_retractions_total=0, num_evicted_tokens_total=0, num_steps_total=0
            )

    def total(self, name: str) -> int:
        return self._before[name] + _number(self.latest, name)


def _number(figures: ServerFigures | None, name: str) -> int:
    return 0 if figures is None else (getattr(figures, name) or 0)
