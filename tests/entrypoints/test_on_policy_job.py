"""The main job with `rl_on_policy_target`: every step trains on the trainer's very own log-probabilities."""

from __future__ import annotations

from pathlib import Path

from skyrl_train.config.load import load_config
from skyrl_train.entrypoints.run import DONE, run
from skyrl_train.observability.metrics import read_metrics


def test_the_built_in_task_trains_exactly_on_policy(tmp_path: Path) -> None:
    overrides = [
        f"trainer.run_path={tmp_path}",
        "generator.deterministic_inference.enabled=true",
        "generator.deterministic_inference.rl_on_policy_target=fsdp",
        "generator.sampling_params.temperature=0.9",
        "trainer.train_batch_size=8",
        "trainer.policy_mini_batch_size=4",
        "trainer.max_steps=4",
    ]
    assert run(load_config(overrides)) == DONE
    steps = [row for row in read_metrics(tmp_path / "metrics.jsonl") if row["step"] > 0]
    assert len(steps) == 4
    for row in steps:
        assert row["policy/rollout_logprob_abs_diff_max"] == 0.0
        assert row["policy/importance_ratio_mean"] == row["policy/importance_ratio_max"] == 1.0
        assert row["train/num_updates"] == 2
