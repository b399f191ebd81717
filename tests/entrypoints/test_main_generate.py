"""The command that only evaluates: the figures of the main job's own evaluation, every answer on disk, no training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from skyrl_train.config.load import load_config
from skyrl_train.entrypoints.main_generate import main
from skyrl_train.entrypoints.run import DONE, REFUSED, run
from skyrl_train.observability.metrics import read_metrics
from tests.entrypoints.test_main_job import arguments, inputs

__all__ = ["inputs"]  # the fixture


def test_it_gives_the_figures_of_the_main_jobs_evaluation_and_writes_every_answer(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(load_config(arguments(inputs, tmp_path / "trained", "trainer.max_steps=1"))) == DONE
    assert main(arguments(inputs, tmp_path / "run")) == DONE
    (found,) = read_metrics(tmp_path / "run" / "generate" / "metrics.jsonl")
    before = read_metrics(tmp_path / "trained" / "metrics.jsonl")[0]
    wanted = {name: value for name, value in before.items() if name.startswith("eval/")}
    assert found == {"step": 0, **wanted} and len(wanted) >= 4
    answers = (tmp_path / "run" / "generate" / "rollouts" / "eval_000000.jsonl").read_text().splitlines()
    assert [json.loads(line)["trajectory_id"] for line in answers] == [f"eval-{i}/0/0" for i in range(4)]
    assert f"eval/reward_mean {wanted['eval/reward_mean']:.6g}" in capsys.readouterr().out
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_several_answers_a_prompt_give_pass_at_k(inputs: Path, tmp_path: Path) -> None:
    several = ("generator.eval_n_samples_per_prompt=2", "generator.eval_sampling_params.temperature=1")
    assert main(arguments(inputs, tmp_path / "run", *several)) == DONE
    (row,) = read_metrics(tmp_path / "run" / "generate" / "metrics.jsonl")
    assert 0 <= row["eval/pass_at_1"] <= row["eval/pass_at_2"] <= 1


def test_without_held_out_rows_it_says_so(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nothing = ("data.val_data=[]", "trainer.eval_interval=-1")
    assert main(arguments(inputs, tmp_path / "run", *nothing)) == REFUSED
    assert "data.val_data is empty" in capsys.readouterr().err
