"""The benchmark of exactness runs at the smallest size, and its on-policy mode is exact."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import deterministic


@pytest.mark.filterwarnings("default")
def test_the_benchmark_of_exactness_writes_a_row_for_each_mode(tmp_path: Path) -> None:
    results = deterministic.main(
        ["--cases", "tiny", "--prompts", "1", "--rounds", "1", "--threads", "1", "--out", str(tmp_path)]
    )
    sides = results["tiny"]
    assert list(sides) == ["plain", "deterministic", "on policy"]
    assert sides["on policy"].max_diff == 0.0
    assert all(len(side.rollouts) == len(side.updates) == 1 for side in sides.values())
    (page,) = tmp_path.glob("*.md")
    rows = [line.split(" | ")[0] for line in page.read_text().splitlines()]
    assert [row for row in rows if row.removeprefix("| ") in sides] == ["| plain", "| deterministic", "| on policy"]
    (log,) = tmp_path.glob("*.log")
    assert "on policy, step 1: rollout" in log.read_text()
