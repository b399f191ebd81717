"""The training benchmark runs, checks the gradients of its modes against each other, and writes its table."""

from __future__ import annotations

from pathlib import Path

from benchmarks import train_step


def test_all_modes_make_the_same_gradient_and_stand_in_the_table(tmp_path: Path) -> None:
    sizes = ["--prompts", "3", "--samples", "4", "--prompt", "2:9", "--new", "1:6", "--micro-batch-tokens", "40"]
    timings = train_step.main([*sizes, "--rounds", "1", "--out", str(tmp_path)])
    assert {mode: len(values) for mode, values in timings.items()} == {"shared": 1, "unshared": 1, "padded": 1}
    (page,) = tmp_path.glob("train-step-toy-3x4-*.md")
    assert all(f"| {mode} |" in page.read_text() for mode in train_step.MODES)
    assert page.with_suffix(".log").is_file()
