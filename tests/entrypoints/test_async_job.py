"""The main job with the asynchronous loop: the synchronous one at staleness 0, and nothing lost however it ends."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from skyrl_train.config.load import load_config
from skyrl_train.entrypoints.run import DONE, run
from skyrl_train.observability.metrics import deterministic_metrics, read_metrics
from tests.entrypoints.test_main_job import STEPS, arguments, final_weights, inputs, start, wait_for_step

__all__ = ["inputs"]

ASYNC = ("trainer.fully_async.enabled=true", "trainer.max_steps=6")


def train(folder: Path, run_path: Path, *more: str) -> None:
    assert run(load_config(arguments(folder, run_path, "trainer.logger=[jsonl]", *more))) == DONE


def equal(a: Path, b: Path) -> bool:
    left, right = final_weights(a), final_weights(b)
    return all(torch.equal(left[name], right[name]) for name in left)


def test_staleness_0_gives_the_synchronous_runs_weights_and_metrics(inputs: Path, tmp_path: Path) -> None:
    train(inputs, tmp_path / "sync")
    train(inputs, tmp_path / "async", "trainer.fully_async.enabled=true", "trainer.fully_async.max_staleness_steps=0")
    assert equal(tmp_path / "sync", tmp_path / "async")
    sync, other = (deterministic_metrics(tmp_path / name / "metrics.jsonl") for name in ("sync", "async"))
    assert [{k: v for k, v in row.items() if not k.startswith("async/")} for row in other] == sync


@pytest.mark.parametrize("staleness", [1, 3])
def test_a_run_that_is_killed_twice_ends_with_the_same_bits(inputs: Path, tmp_path: Path, staleness: int) -> None:
    more = (*ASYNC, f"trainer.fully_async.max_staleness_steps={staleness}", "trainer.ckpt_interval=1")
    train(inputs, tmp_path / "whole", *more)
    for step in (2, 4):
        process = start(arguments(inputs, tmp_path / "killed", "trainer.logger=[jsonl]", *more))
        wait_for_step(tmp_path / "killed", step, process)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    train(inputs, tmp_path / "killed", *more)
    assert equal(tmp_path / "whole", tmp_path / "killed")
    assert deterministic_metrics(tmp_path / "killed" / "metrics.jsonl") == deterministic_metrics(
        tmp_path / "whole" / "metrics.jsonl"
    )
    rows = [row for row in read_metrics(tmp_path / "whole" / "metrics.jsonl") if row["step"] > 0]
    assert len(rows) == STEPS and max(row["async/staleness_steps"] for row in rows) == staleness
