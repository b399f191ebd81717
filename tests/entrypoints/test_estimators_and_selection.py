"""The main job with each estimator and each way of selecting, on a tiny random model: what its metrics then say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from skyrl_train.config.load import load_config
from skyrl_train.entrypoints.run import DONE, FAILED, run
from skyrl_train.observability.metrics import deterministic_metrics
from tests.entrypoints.test_main_job import arguments
from tests.tiny import make_model, make_tokenizer

ALGORITHM = "trainer.algorithm"


PAIRS = "generator.n_samples_per_prompt=2"
"""Of which some agree."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    make_model(attn_implementation="eager", initializer_range=0.02).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    for name, count in (("train", 12), ("val", 1)):
        rows = [json.dumps({"prompt": f"{name} {i}?"}) for i in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def rows_of(inputs: Path, run_path: Path, *more: str, result: int = DONE) -> list[dict[str, float]]:
    argv = arguments(inputs, run_path, "trainer.max_steps=2", "trainer.eval_interval=0", "trainer.ckpt_interval=1")
    more = tuple(key if key.startswith("generator.") else f"{ALGORITHM}.{key}" for key in more)
    assert run(load_config([*argv, *more])) == result
    metrics = run_path / "metrics.jsonl"
    return [row for row in deterministic_metrics(metrics) if row["step"] > 0] if metrics.exists() else []


def trained(inputs: Path, run_path: Path) -> bool:
    before = load_file(inputs / "model" / "model.safetensors")
    after = load_file(run_path / "export" / "model.safetensors")
    return any(not torch.equal(tensor, before[name]) for name, tensor in after.items() if name in before)


@pytest.mark.parametrize("name", ["rloo", "reinforce++", "reinforce++_baseline", "remax"])
def test_every_estimator_trains(name: str, inputs: Path, tmp_path: Path) -> None:
    rows = rows_of(inputs, tmp_path, f"advantage_estimator={name}")
    assert [row["step"] for row in rows] == [1, 2] and trained(inputs, tmp_path)
    for row in rows:
        assert row["train/num_updates"] == 2 and row["advantage/std"] > 0
        if name.startswith("reinforce++"):
            assert row["advantage/mean"] == pytest.approx(0, abs=1e-5)
            assert row["advantage/std"] == pytest.approx(1, abs=1e-5)


def test_filter_fills_each_step_and_a_resumed_run_draws_the_same(inputs: Path, tmp_path: Path) -> None:
    keys = ("dynamic_sampling.type=filter", "dynamic_sampling.max_sample_batches=20", PAIRS)
    rows = rows_of(inputs, tmp_path / "whole", *keys)
    for row in rows:
        assert row["selection/num_groups"] == 4
        drawn = row["selection/num_groups_drawn"]
        assert drawn == 4 * row["selection/num_batches_drawn"] == row["rollout/num_trajectories"] / 2
        dropped = row["selection/num_uniform_dropped"] + row["selection/num_surplus_dropped"]
        assert drawn == 4 + dropped
    assert max(row["selection/num_batches_drawn"] for row in rows) > 1
    # One step, then the same command for both.
    argv = arguments(inputs, tmp_path / "cut", "trainer.eval_interval=0", "trainer.ckpt_interval=1")
    argv += [PAIRS, *(f"{ALGORITHM}.{key}" for key in keys if key != PAIRS)]
    for steps in (1, 2):
        assert run(load_config([*argv, f"trainer.max_steps={steps}"])) == DONE
    resumed = deterministic_metrics(tmp_path / "cut" / "metrics.jsonl")
    wanted = [row["selection/num_groups_drawn"] for row in rows]
    assert [row["selection/num_groups_drawn"] for row in resumed if row["step"] > 0] == wanted


def test_replace_trains_on_whole_batches_of_one_draw(inputs: Path, tmp_path: Path) -> None:
    keys = ("dynamic_sampling.type=replace", "dynamic_sampling.min_replace_ratio=0.25", PAIRS)
    rows = rows_of(inputs, tmp_path, *keys)
    for row in rows:
        assert row["selection/num_batches_drawn"] == 1
        assert row["selection/num_groups"] == 4 and row["train/num_updates"] == 2
        assert row["selection/num_copies"] == row["selection/num_uniform_dropped"]
    assert rows[0]["selection/num_copies"] > 0


ALL_THE_SAME = "generator.sampling_params.top_k=1"
"""All samples of a prompt are its greedy answer."""


def test_a_draw_without_an_end_stops_by_name(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = ("dynamic_sampling.type=filter", "dynamic_sampling.max_sample_batches=2", ALL_THE_SAME)
    assert rows_of(inputs, tmp_path, *keys, result=FAILED) == []
    message = capsys.readouterr().err
    assert "dynamic sampling (filter) found 0 groups with different rewards among 8 in 2 batches" in message


def test_a_step_with_nothing_left_changes_no_weight_and_says_so(inputs: Path, tmp_path: Path) -> None:
    rows = rows_of(inputs, tmp_path, "zero_variance_filter=true", ALL_THE_SAME)
    assert [row["selection/num_groups"] for row in rows] == [0, 0]
    assert [row["train/num_updates"] for row in rows] == [0, 0]
    assert not trained(inputs, tmp_path)


def test_overlong_answers_pay_or_leave_the_loss_and_the_log_keeps_the_tasks_reward(
    inputs: Path, tmp_path: Path
) -> None:
    plain = rows_of(inputs, tmp_path / "plain")
    assert not any(name.startswith("selection/") for row in plain for name in row)
    soft = rows_of(inputs, tmp_path / "soft", "overlong.soft_punishment=true", "overlong.cache_tokens=6")
    assert soft[0]["reward/mean"] == plain[0]["reward/mean"]
    assert soft[0]["selection/num_overlong_punished"] > 0 > soft[0]["selection/overlong_punishment_mean"]
    assert soft[0]["advantage/std"] != plain[0]["advantage/std"]
    filtered = rows_of(inputs, tmp_path / "filtered", "overlong.filter=true")
    skipped = filtered[0]["selection/num_truncated_skipped"]
    assert skipped == filtered[0]["rollout/truncated_frac"] * 16 > 0
    assert filtered[0]["train/num_loss_tokens"] == plain[0]["train/num_loss_tokens"] - 12 * skipped
    # Their scores still count: the others' advantages are what they were.
    assert filtered[0]["advantage/mean"] == plain[0]["advantage/mean"]


def test_groups_that_agree_are_counted_out_of_the_batch(inputs: Path, tmp_path: Path) -> None:
    plain = rows_of(inputs, tmp_path / "plain", PAIRS)
    rows = rows_of(inputs, tmp_path / "filter", PAIRS, "zero_variance_filter=true")
    for row in rows:
        assert row["selection/num_zero_variance_dropped"] == 4 * (1 - row["reward/informative_group_frac"])
        assert row["selection/num_groups"] == 4 - row["selection/num_zero_variance_dropped"]
    assert rows[0]["reward/mean"] == plain[0]["reward/mean"]
    assert rows[0]["train/num_loss_tokens"] < plain[0]["train/num_loss_tokens"]


def test_several_samples_of_an_evaluation_give_pass_at_k(inputs: Path, tmp_path: Path) -> None:
    keys = ["trainer.max_steps=1", "generator.eval_n_samples_per_prompt=3", "trainer.eval_interval=1"]
    keys += ["generator.eval_sampling_params.temperature=1"]
    assert run(load_config(arguments(inputs, tmp_path, *keys))) == DONE
    row = deterministic_metrics(tmp_path / "metrics.jsonl")[-1]
    assert {name for name in row if name.startswith("eval/pass")} == {f"eval/pass_at_{k}" for k in (1, 2, 3)}
    assert row["eval/pass_at_1"] == pytest.approx(row["eval/accuracy"])
    assert row["eval/pass_at_1"] <= row["eval/pass_at_2"] <= row["eval/pass_at_3"]
