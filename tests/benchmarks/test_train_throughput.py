"""The throughput table: all sides train on the same tokens, a wrong gradient is no row, and lengths are as they say."""

from __future__ import annotations

import math
import random
import statistics
from pathlib import Path

import pytest
import torch

from benchmarks import train_throughput
from benchmarks.grpo.work import StepWork
from benchmarks.report import Report
from benchmarks.train_step import draw_samples, padded_parts
from benchmarks.train_throughput import Side, check_norms, largest_divisor, lognormal_length
from benchmarks.workload import LengthRange

SIZES = ("--shape", "toy", "--prompts", "2", "--samples", "4", "--prompt", "2:9", "--median", "4", "--longest", "12")


def samples_of(prompt_lens: tuple[int, ...], completion_lens: tuple[tuple[int, ...], ...]):
    return draw_samples(StepWork(prompt_lens=prompt_lens, completion_lens=completion_lens, vocab_size=64, seed=0))


@pytest.mark.filterwarnings("default")
def test_every_side_makes_the_same_gradient_in_both_cases(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    more = ("--micro-batch-tokens", "60", "--rounds", "1", "--out", str(tmp_path))
    shared, alone = train_throughput.main([*SIZES, *more]).values()
    assert [side.name for side in shared] == list(train_throughput.SIDES.values())
    assert [side.name for side in alone] == list(train_throughput.SIDES.values())[1:], "there is nothing to share"
    for sides in (shared, alone):
        assert all(not side.error and len(side.timings) == 1 for side in sides), [side.error for side in sides]
        assert max(side.norm for side in sides) == pytest.approx(min(side.norm for side in sides), rel=1e-4)
    (page,) = tmp_path.glob("train-throughput-toy-2x4-*.md")
    assert page.read_text().count("| TRL |") == 2 and page.with_suffix(".log").is_file()


def test_a_side_without_its_package_is_a_row_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "benchmarks.grpo.trl_update", None)
    argv = [*SIZES, "--sides", "packed,trl", "--rounds", "1", "--out", str(tmp_path)]
    for packed, trl in train_throughput.main(argv).values():
        assert len(packed.timings) == 1 and "ModuleNotFoundError" in trl.error and not trl.timings


def test_a_side_with_another_gradient_is_not_timed(tmp_path: Path) -> None:
    norms = {"padded loop": 2.0, "a": 2.001, "b": 2.1, "c": math.nan}
    sides = [Side(name=name, norm=norm) for name, norm in norms.items()]
    check_norms(sides, 1e-3, Report("", "stem", tmp_path))
    assert [bool(side.error) for side in sides] == [False, False, True, True]


def test_padded_rows_are_counted_by_hand() -> None:
    samples = samples_of((1,), ((1, 4, 1, 4),))  # lengths 2 5 2 5
    lengths = [[len(s.token_ids) for s in part] for part, _ in padded_parts(samples, 10, by_length=False)]
    assert lengths == [[2, 5], [2, 5]]
    parts = padded_parts(samples, 10, by_length=True)
    assert [([len(s.token_ids) for s in part], length) for part, length in parts] == [([2, 2], 2), ([5, 5], 5)]
    assert [len(part) for part, _ in padded_parts(samples, 3, by_length=False)] == [1, 1, 1, 1], "never none"


def test_trl_gets_prompts_at_the_right_and_completions_at_the_left() -> None:
    pytest.importorskip("trl")
    from benchmarks.grpo.trl_update import trl_batch

    samples = samples_of((1, 2), ((2,), (1,)))
    batch = trl_batch(samples)
    first, second = (sample.token_ids.tolist() for sample in samples)
    assert batch["prompt_ids"].tolist() == [[0, first[0]], second[:2]]
    assert batch["prompt_mask"].tolist() == [[0, 1], [1, 1]]
    assert batch["completion_ids"].tolist() == [first[1:], [second[2], 0]]
    assert batch["completion_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch["num_items_in_batch"] == 3
    assert torch.equal(batch["advantages"], torch.stack([sample.advantages[-1] for sample in samples]))


def test_lengths_are_lognormal_and_cut() -> None:
    rng = random.Random(0)
    lens = [lognormal_length(rng, 64, 0.8, 10_000) for _ in range(4000)]
    assert statistics.median(lens) == pytest.approx(64, rel=0.05)
    # The mean of a lognormal is exp(sigma^2 / 2) times its median: 1.377.
    assert statistics.mean(lens) == pytest.approx(64 * math.exp(0.32), rel=0.05)
    assert {lognormal_length(rng, 64, 0.8, 5) for _ in range(200)} <= set(range(1, 6))


@pytest.mark.parametrize(("number", "at_most", "divisor"), [(32, 17, 16), (30, 8, 6), (7, 6, 1), (8, 100, 8)])
def test_the_largest_divisor(number: int, at_most: int, divisor: int) -> None:
    assert largest_divisor(number, at_most) == divisor


def test_both_cases_have_the_same_completions() -> None:
    args = train_throughput.parse_args([*SIZES])
    assert args.prompt == LengthRange(low=2, high=9)
    shared, alone = train_throughput.cases_of(args, train_throughput.ALL_SHAPES["toy"])
    assert shared.work.flat_lens == alone.work.flat_lens and len(alone.work.prompt_lens) == 8
    assert alone.work.num_samples == 1 and max(shared.work.flat_lens) <= 12
