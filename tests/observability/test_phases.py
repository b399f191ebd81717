from __future__ import annotations

import pytest

from skyrl_train.observability.phases import PhaseTimer


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_phases_add_up_within_a_step_and_start_from_zero_in_the_next() -> None:
    clock = Clock()
    phases = PhaseTimer(clock=clock)
    with phases("rollout"):
        clock.now += 3
    clock.now += 0.5
    with phases("train"):
        clock.now += 2
    with phases("rollout"):
        clock.now += 1
    assert phases.seconds("rollout") == 4
    assert phases.take() == {"timing/rollout_s": 4, "timing/train_s": 2, "timing/step_s": 6.5}
    clock.now += 1
    assert phases.take() == {"timing/step_s": 1}


def test_a_part_of_a_phase_is_within_the_whole() -> None:
    clock = Clock()
    phases = PhaseTimer(clock=clock)
    with phases("train"):
        clock.now += 1
        with phases("train/forward"):
            clock.now += 2
    assert phases.take() == {"timing/train_s": 3, "timing/train/forward_s": 2, "timing/step_s": 3}


def test_a_phase_that_raises_is_timed_and_the_error_passes() -> None:
    clock = Clock()
    phases = PhaseTimer(clock=clock)
    with pytest.raises(RuntimeError, match="engine gone"), phases("rollout"):
        clock.now += 2
        raise RuntimeError("engine gone")
    assert phases.take()["timing/rollout_s"] == 2


def test_the_start_of_each_phase_is_told() -> None:
    told: list[str] = []
    phases = PhaseTimer(on_start=told.append)
    with phases("rollout"):
        assert told == ["rollout"]
    with phases("train"):
        pass
    assert told == ["rollout", "train"]
