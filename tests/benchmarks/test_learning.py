"""The curves' rows and the asynchronous comparison: every name has a row that the main job takes, figures by hand."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from benchmarks import async_vs_sync, curves
from benchmarks.async_vs_sync import Mode, counted_steps
from benchmarks.curves import Curve, known_curve, mean_series, settings_of
from benchmarks.learning import rows as rows_module
from benchmarks.learning.chart import Panel, small_multiples
from benchmarks.learning.job import Outcome, mean_around
from benchmarks.learning.ragged import LowWords, stop_ids
from benchmarks.learning.rows import CurveRow, curve_rows
from benchmarks.models import SHAPES, ModelShape, build_byte_tokenizer, build_model
from benchmarks.report import command_line
from skyrl_train.algorithms.advantages import ADVANTAGE_ESTIMATORS
from skyrl_train.algorithms.policy_losses import POLICY_LOSSES
from skyrl_train.config.check_training import ESTIMATORS
from skyrl_train.config.check_training import POLICY_LOSSES as LOSS_NAMES
from skyrl_train.config.load import load_config

ROWS = curve_rows()
SMALL = ModelShape(
    name="tiny",
    hidden_size=32,
    intermediate_size=64,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    vocab_size=300,
    tied=True,
)


def test_every_name_that_the_configuration_knows_has_a_row() -> None:
    assert {row.estimator for row in ROWS if row.loss == "regular"} == set(ESTIMATORS) == set(ADVANTAGE_ESTIMATORS)
    assert {row.loss for row in ROWS if row.estimator == "grpo"} == set(LOSS_NAMES) == set(POLICY_LOSSES)
    assert len({row.name for row in ROWS}) == len(ROWS), "names name files"


def test_overrides_belong_to_names_that_exist() -> None:
    assert set(rows_module.ESTIMATOR_OVERRIDES) <= set(ADVANTAGE_ESTIMATORS)
    assert set(rows_module.LOSS_OVERRIDES) <= set(POLICY_LOSSES)


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_the_main_job_takes_each_row_without_a_warning(row: CurveRow) -> None:
    args = curves.parse_args(["--steps", "60"])
    loaded = load_config(settings_of(row, 42, args))
    algorithm = loaded.config.trainer.algorithm
    assert (algorithm.advantage_estimator, algorithm.policy_loss_type) == (row.estimator, row.loss)
    assert loaded.warnings == ()


def curve_args(folder: Path, *more: str) -> Namespace:
    argv = ["--out", str(folder / "curves"), "--page", str(folder / "docs" / "CURVES.md"), "--seeds", "1,2", *more]
    return curves.parse_args([*argv, "--runs", str(folder / "runs"), "--steps", "4", "--parallel", "1"])


def put(row: CurveRow, seed: int, args: Namespace, accuracy: list[float], reward: list[float]) -> None:
    series = {
        "eval/accuracy": [[0, accuracy[0]], [4, accuracy[1]]],
        "reward/mean": [[step, value] for step, value in enumerate(reward, start=1)],
    }
    curve = Curve(settings=settings_of(row, seed, args), wall_s=3.0, series=series)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{row.name}-{seed}.json").write_text(json.dumps(asdict(curve)))


def test_a_row_that_is_known_is_not_run_again_and_stands_on_the_page(tmp_path: Path) -> None:
    args = curve_args(tmp_path)
    for seed, end in ((1, 0.5), (2, 0.75)):
        put(ROWS[0], seed, args, [0.25, end], [0.1, 0.2, 0.3, 0.4])
    out = ["--out", str(args.out), "--page", str(args.page), "--seeds", "1,2", "--steps", "4", "--rows", ROWS[0].name]
    known = curves.main([*out, "--runs", str(tmp_path / "runs")])
    assert list(known) == [ROWS[0].name] and not (tmp_path / "runs").exists(), "nothing was run"
    page = args.page.read_text()
    line = next(line for line in page.splitlines() if line.startswith("| grpo | regular |  |"))
    assert "| 25.0% | 62.5% | 50.0%, 75.0% |" in line
    # Steps 1, 2, 3 and 4: means over those within two of it.
    assert "| 0.200 | 0.250 | 0.250 | 0.300 |" in line
    assert page.count("| not run |") == len(ROWS) - 1
    assert (args.page.parent / "images" / "curves.svg").is_file()


def test_other_settings_are_another_run(tmp_path: Path) -> None:
    args = curve_args(tmp_path)
    put(ROWS[0], 1, args, [0.0, 1.0], [1.0])
    assert known_curve(ROWS[0], 1, args) is not None
    args.steps = 5
    assert known_curve(ROWS[0], 1, args) is None
    assert known_curve(ROWS[0], 2, args) is None, "another seed"


def test_curves_of_seeds_are_averaged_step_by_step() -> None:
    runs = [Curve(settings=[], series={"r": [[1, a], [2, b]]}) for a, b in ((0.0, 1.0), (0.5, 0.5))]
    assert mean_series(runs, "r") == [(1, 0.25), (2, 0.75)]


def test_the_chart_is_xml_with_a_line_for_each_curve() -> None:
    panel = Panel(title="a < b", reward=[(1, 0.0), (2, 1.0)], accuracy=[(0, 0.5), (2, 1.0)])
    root = ElementTree.fromstring(small_multiples([panel] * 5, num_steps=2, reference=panel.accuracy))
    lines = root.findall(".//{http://www.w3.org/2000/svg}polyline")
    assert len(lines) == 5 * 3
    # Half of 0 to 1 in a panel's inner height of 130 - 24 - 20, from its left to its right edge.
    assert lines[0].get("points") == "30.0,67.0 200.0,24.0"


def test_counted_steps_leave_out_the_warm_up_and_what_was_generated_ahead() -> None:
    modes = [Mode.parse(text, None) for text in ("sync", "1", "4free")]
    assert list(counted_steps(10, 3, modes)) == [4, 5, 6]
    assert list(counted_steps(10, 3, modes[:1])) == [4, 5, 6, 7, 8, 9, 10]
    assert list(counted_steps(4, 3, modes)) == [4], "at least one"


def test_a_modes_name_is_its_settings() -> None:
    assert Mode.parse("sync", None).settings == []
    assert Mode.parse("4free", None).settings == [
        "trainer.fully_async.enabled=true",
        "trainer.fully_async.max_staleness_steps=4",
        "trainer.fully_async.deterministic=false",
    ]
    with pytest.raises(ValueError, match="found 'often'"):
        Mode.parse("often", None)


def test_samples_per_second_leave_evaluations_out() -> None:
    rows = [
        {"step": 1, "timing/step_s": 100.0},
        {"step": 2, "timing/step_s": 3.0, "timing/evaluate_s": 1.0},
        {"step": 3, "timing/step_s": 2.5, "timing/checkpoint_s": 0.5},
    ]
    mode = Mode.parse("sync", None)
    mode.outcomes.append(Outcome(rows=rows, wall_s=1.0))
    assert async_vs_sync.rate_of(mode, range(2, 4), 8) == 8 * 2 / (2.0 + 2.0)
    assert mean_around([(0, 50.0), (1, 1.0), (2, 2.0), (5, 9.0), (6, 50.0)], 3) == (1.0 + 2.0 + 9.0) / 3


def test_one_token_in_m_ends_an_answer_and_both_halves_end_as_many() -> None:
    ids = stop_ids(4096, 48)
    assert len(ids) == 4096 // 48 and min(ids) >= 259 and max(ids) < 4096
    assert abs(sum(i < 2177 for i in ids) - len(ids) / 2) <= 1  # 2177 is the middle of the words


def test_low_words_are_rewarded_by_their_fraction() -> None:
    env = LowWords(env_config=None, extras={"half": 300})
    assert env.step("w299w300 w7, and a byte")["reward"] == pytest.approx(2 / 3)
    assert env.step("none")["reward"] == 0.0


@pytest.mark.filterwarnings("default")
def test_both_loops_run_on_the_ragged_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "tiny", SMALL)
    sizes = ["--prompts=2", "--samples=2", "--prompt-chars=4", "--mean=10", "--longest=12", "--steps=3"]
    sizes += ["--warmup=1", "--threads=1"]
    out = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    results = async_vs_sync.main(["--tasks", "ragged", "--modes", "sync,1", *sizes, *out])
    assert [(mode.name, mode.error) for mode in results["ragged"]] == [("sync", ""), ("staleness 1", "")]
    (page,) = (tmp_path / "out").glob("async-vs-sync-ragged-*.md")
    assert "| staleness 1 | 1 |" in page.read_text()


def test_the_byte_tokenizer_survives_a_qwen2_folder(tmp_path: Path) -> None:
    build_model(SMALL, attn_implementation="sdpa", device="cpu", dtype=torch.float32).save_pretrained(tmp_path)
    build_byte_tokenizer(300).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("ab c").input_ids == [ord("a"), ord("b"), ord(" "), ord("c")]
    assert tokenizer.decode([261, 299]) == "w261w299"


def test_a_page_names_its_command_without_the_folders_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ["/a/benchmarks/curves.py", "--steps", "4", "--out", "/tmp/x", "--runs=/tmp/y", "--seeds", "1"]
    monkeypatch.setattr("sys.argv", argv)
    assert command_line() == "python -m benchmarks.curves --steps 4 --seeds 1"
