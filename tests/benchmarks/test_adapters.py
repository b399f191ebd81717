"""The benchmark of adapters: every contestant's answer is the merged model's, and turns are paired."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import adapters


def test_all_contestants_take_the_same_turns_and_are_right(tmp_path: Path) -> None:
    arguments = ["--requests=6", "--prompt=5", "--new=12", "--turn=4", "--adapters=1,3", "--rank=2"]
    contestants = adapters.main([*arguments, "--out", str(tmp_path)])
    names = [one.name for one in contestants]
    assert names == ["the model alone", "merged", "0 adapters", "1 adapter", "3 adapters", "3 adapters and none"]
    assert len({len(one.cpu_s) for one in contestants}) == 1
    assert {sum(one.num_tokens) for one in contestants} == {6 * 11}, "all but the first token of each answer"
    page = next(tmp_path.glob("adapters-tiny-rank2-*.md")).read_text()
    assert all(f"| {name} |" in page for name in names)


def test_a_wrong_answer_is_caught(tmp_path: Path) -> None:
    one = adapters.main(["--requests=2", "--prompt=5", "--new=6", "--turn=2", "--adapters=1", "--out", str(tmp_path)])[
        3
    ]
    one.judge = adapters.merge(one.judge, adapters.random_adapter(one.judge, rank=2, seed=9))
    with pytest.raises(RuntimeError, match="1 adapter: a log-probability is"):
        adapters.check(one)
