"""What a benchmark asks of a trainer with its engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from benchmarks.measure import Timing


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """Prompts [P] and their completions [P * G], prompt after prompt."""

    prompts: list[tuple[int, ...]]
    completions: list[tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Gradient:
    """What one step made of given completions; the norm is before clipping."""

    loss: float
    grad_norm: float


class GrpoSide(Protocol):
    """One trainer in one setting, with its own copy of the weights."""

    name: str
    num_threads: int

    def run(self, num_steps: int) -> list[Timing]:
        """Whole steps: rollout, rewards, advantages, loss, gradients, optimizer, new weights live in the engine."""
        ...

    def gradient(self, rollout: Rollout) -> Gradient:
        """One training step on these completions. For comparing sides, not for timing."""
        ...

    def close(self) -> None: ...
