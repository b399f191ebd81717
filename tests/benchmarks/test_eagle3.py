"""The benchmark of a trained head runs, and compares answers that are the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import eagle3

SMALL = "--steps 2 --head-steps 1 --hidden 64 --layers 2 --batches 2 --new 8 --repeats 1"


def test_each_contestant_has_a_row_and_nobody_answers_differently(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["eagle3", *SMALL.split(), "--out", str(tmp_path)])
    eagle3.main()
    printed = capsys.readouterr().out
    assert printed.count("nobody answers differently") == 2
    (page,) = tmp_path.glob("eagle3-*.md")
    rows = [line for line in page.read_text().splitlines() if line.startswith(("| greedy", "| temperature 1"))]
    assert [row.split(" | ")[2] for row in rows] == ["none", "chain", "tree", "chain, untrained head"] * 2
