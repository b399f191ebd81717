"""The KL's coefficient over steps, by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from skyrl_train.algorithms.kl_control import KlController, KlTarget
from skyrl_train.errors import CheckpointError

TARGET = KlTarget(kl=0.05, horizon=1000)


def test_a_fixed_coefficient_stays() -> None:
    controller = KlController(0.1)
    assert controller.update(100.0, 64) == controller() == 0.1
    assert not controller.is_adaptive


@pytest.mark.parametrize(
    ("kl", "wanted"),
    [
        (0.05, 0.1),  # at the target
        (0.055, 0.1 * (1 + 0.1 * 0.1)),  # 10 % over it, in a tenth of the horizon
        (0.045, 0.1 * (1 - 0.1 * 0.1)),
        (5.0, 0.1 * (1 + 0.1 * 0.2)),  # the error is bounded
        (-5.0, 0.1 * (1 - 0.1 * 0.2)),  # k1 may be negative
    ],
)
def test_an_adaptive_coefficient_follows_the_error(kl: float, wanted: float) -> None:
    controller = KlController(0.1, TARGET)
    assert controller.update(kl, 100) == pytest.approx(wanted)
    assert controller() == pytest.approx(wanted)


def test_it_finds_the_coefficient_that_holds_the_target() -> None:
    """A policy whose KL is 0.01 / coefficient: the target 0.05 is held by 0.2."""
    controller = KlController(0.001, TARGET)
    for _ in range(2000):
        controller.update(0.01 / controller(), 50)
    assert controller() == pytest.approx(0.2, rel=1e-6)


def test_its_state_goes_on(tmp_path: Path) -> None:
    controller = KlController(0.1, TARGET)
    controller.update(1.0, 100)
    controller.save(tmp_path / "kl")
    resumed = KlController(0.1, TARGET)
    resumed.load(tmp_path / "kl")
    assert resumed() == controller() != 0.1
    with pytest.raises(CheckpointError, match="no state of the KL controller"):
        resumed.load(tmp_path)
