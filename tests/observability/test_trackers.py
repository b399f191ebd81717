from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from skyrl_train.errors import ConfigError, DataError
from skyrl_train.observability.metrics import deterministic_metrics, memory_metrics, read_metrics
from skyrl_train.observability.trackers import (
    ConsoleTracker,
    JsonlTracker,
    MlflowTracker,
    Trackers,
    WandbTracker,
    open_trackers,
    truncate_after,
)


def steps_in(path: Path) -> list[int]:
    return [row["step"] for row in read_metrics(path)]


def test_each_step_is_one_json_line_with_step_first(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path / "run" / "metrics.jsonl")
    tracker.log(1, {"reward/mean": 0.25, "rollout/num_tokens": 40})
    # Read before close: what was logged is on disk at once.
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == (
        '{"step": 1, "reward/mean": 0.25, "rollout/num_tokens": 40}\n'
    )
    tracker.close()


def test_a_resume_keeps_the_steps_up_to_the_checkpoint_and_a_cut_last_line_goes(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path)
    for step in range(1, 8):
        tracker.log(step, {"reward/mean": step / 10})
    tracker.close()
    with path.open("a") as file:
        file.write('{"step": 8, "rew')
    assert steps_in(path) == [1, 2, 3, 4, 5, 6, 7]

    resumed = JsonlTracker(path, resume_step=5)
    resumed.log(6, {"reward/mean": 0.66})
    resumed.close()
    assert steps_in(path) == [1, 2, 3, 4, 5, 6]
    assert read_metrics(path)[-1]["reward/mean"] == 0.66
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_line_cut_before_its_newline_is_whole_and_the_next_line_does_not_run_into_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    resumed = JsonlTracker(path, resume_step=2)
    resumed.log(3, {})
    resumed.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'


def test_a_process_killed_while_it_logs_leaves_a_file_that_resumes(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    code = (
        "import os, signal, sys\n"
        "from skyrl_train.observability.trackers import JsonlTracker\n"
        "tracker = JsonlTracker(sys.argv[1])\n"
        "for step in range(1, 51):\n"
        "    tracker.log(step, {'reward/mean': step / 7})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert done.returncode == -9
    assert steps_in(path) == list(range(1, 51))


def test_a_new_run_in_an_old_folder_starts_with_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    JsonlTracker(path).close()
    assert path.read_text() == ""


def test_truncating_counts_what_it_removes(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert truncate_after(path, 3) == 0
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    assert truncate_after(path, 2) == 2
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_damaged_line_in_the_middle_is_an_error_that_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2: .*found b'\{\"st'"):
        read_metrics(path)


def test_values_that_are_not_finite_become_null_and_are_counted_and_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trackers = open_trackers(["jsonl"], tmp_path)
    with caplog.at_level(logging.WARNING):
        trackers.log(3, {"policy/loss": float("nan"), "policy/ref_kl": float("-inf"), "reward/mean": 0.5})
    trackers.close()
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {
        "step": 3,
        "policy/loss": None,
        "policy/ref_kl": None,
        "reward/mean": 0.5,
        "nonfinite": {"policy/loss": "nan", "policy/ref_kl": "-inf"},
    }
    assert trackers.num_nonfinite == 2
    assert "step 3: metrics that are not finite: {'policy/loss': 'nan', 'policy/ref_kl': '-inf'}" in caplog.text


def test_two_runs_are_compared_without_what_the_clock_decides(tmp_path: Path) -> None:
    for name, clock in (("a", 0.5), ("b", 0.7)):
        tracker = JsonlTracker(tmp_path / name / "metrics.jsonl")
        wall = {
            "timing/rollout_s": clock,
            "throughput/rollout_tokens_per_s": 10 / clock,
            "memory/peak_rss_bytes": clock,
        }
        tracker.log(1, {"reward/mean": 0.1, "policy/loss": float("nan"), **wall})
        tracker.close()
    a, b = (deterministic_metrics(tmp_path / name / "metrics.jsonl") for name in ("a", "b"))
    assert a == b == [{"step": 1, "reward/mean": 0.1, "policy/loss": None, "nonfinite": {"policy/loss": "nan"}}]


def test_scalars_of_torch_and_numpy_are_numbers_and_text_is_refused_by_name() -> None:
    logged: list[Any] = []

    class Kept:
        def log(self, step: int, metrics: Any) -> None:
            logged.append(dict(metrics))

        def close(self) -> None:
            pass

    trackers = Trackers([Kept()])
    trackers.log(1, {"a": torch.tensor(0.5), "b": np.float32(0.25), "c": 3, "d": True, "e": np.int64(4)})
    assert logged == [{"a": 0.5, "b": 0.25, "c": 3, "d": 1, "e": 4}]
    assert [type(v) for v in logged[0].values()] == [float, float, int, int, float]
    with pytest.raises(TypeError, match="metric policy/loss: expected a number, found the text 'high'"):
        trackers.log(2, {"policy/loss": "high"})
    with pytest.raises(TypeError, match="metric policy/loss: expected a number"):
        trackers.log(3, {"policy/loss": torch.zeros(2)})


def test_a_step_can_not_be_logged_twice(tmp_path: Path) -> None:
    with open_trackers(["jsonl"], tmp_path) as trackers:
        trackers.log(4, {})
        with pytest.raises(ValueError, match="step 4 was logged after step 4"):
            trackers.log(4, {})


def test_the_console_gets_a_line_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    ConsoleTracker(total_steps=120).log(
        34,
        {
            "reward/mean": 0.734,
            "eval/accuracy": 0.78125,
            "throughput/rollout_tokens_per_s": 4321.4,
            "timing/step_s": 1.42,
        },
    )
    assert capsys.readouterr().out == "step  34/120  reward 0.734  accuracy 78.1%  tok/s 4,321  1.42s\n"


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return [(event.step, round(event.value, 3)) for event in accumulator.Scalars(tag)]


def test_tensorboard_reads_the_scalars_back_and_a_resume_purges_the_steps_done_again(tmp_path: Path) -> None:
    with open_trackers(["tensorboard"], tmp_path) as trackers:
        for step in range(1, 6):
            trackers.log(step, {"reward/mean": step / 10})
        # Flushed each step: there before close.
        assert [step for step, _ in scalars(tmp_path / "tensorboard", "reward/mean")] == [1, 2, 3, 4, 5]
    with open_trackers(["tensorboard"], tmp_path, resume_step=3) as trackers:
        trackers.log(4, {"reward/mean": 0.9})
    assert scalars(tmp_path / "tensorboard", "reward/mean") == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.9)]


def test_an_unknown_tracker_is_refused_with_the_choices(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown tracker 'jsonlines'; choose from console, jsonl, tensorboard"):
        open_trackers(["jsonlines"], tmp_path)


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_whose_package_is_missing_is_refused_before_anything_is_written(name: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed here")
    with pytest.raises(ConfigError, match=rf"{name} is not installed in this environment; `pip install {name}`"):
        open_trackers(["jsonl", name], tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore")  # of the packages that mlflow brings
def test_mlflow_keeps_each_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    tracker = MlflowTracker(project_name="project", run_name="quickstart")
    tracker.log(1, {"reward/mean": 0.25, "policy/loss": float("nan")})
    tracker.log(2, {"reward/mean": 0.5})
    tracker.close()
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("project").experiment_id])
    assert (run.info.run_name, run.info.status) == ("quickstart", "FINISHED")
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "reward/mean")] == [
        (1, 0.25),
        (2, 0.5),
    ]


@pytest.mark.filterwarnings("ignore")  # of the packages that wandb brings
def test_wandb_writes_an_offline_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = WandbTracker(tmp_path, project_name="project", run_name="quickstart", group="quickstart")
    tracker.log(1, {"reward/mean": 0.25})
    tracker.close()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_peak_memory_is_in_bytes_and_does_not_fall() -> None:
    before = memory_metrics()["memory/peak_rss_bytes"]
    block = np.ones(8_000_000)
    after = memory_metrics()["memory/peak_rss_bytes"]
    del block
    assert 50 * 2**20 < before <= after < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
