"""Each recipe file trains on the built-in task, and its metrics show what sets it apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from skyrl_train.config.load import load_config
from skyrl_train.entrypoints.run import DONE, run
from skyrl_train.observability.metrics import Row, read_metrics

FOLDER = Path(__file__).parents[2] / "examples" / "recipes"


def steps_of(name: str, taught: Path, run_path: Path, *more: str) -> list[Row]:
    """Two steps from the taught model; they moved its weights."""
    command = [
        *("--config-path", str(FOLDER), "--config-name", name),
        f"trainer.policy.model.path={taught / 'export'}",
        f"trainer.run_path={run_path}",
        "trainer.max_steps=2",
        "trainer.train_batch_size=32",
        "trainer.eval_interval=-1",
        "trainer.ckpt_interval=-1",
        "trainer.policy.optimizer_config.lr=1e-3",
        "generator.sampling_params.max_generate_length=8",
        *more,
    ]
    assert run(load_config(command)) == DONE
    before, after = (load_file(path / "export" / "model.safetensors") for path in (taught, run_path))
    assert all(not torch.equal(before[key], after[key]) for key in after if "layers" in key and key in before)
    return [row for row in read_metrics(run_path / "metrics.jsonl") if row["step"] > 0]


def test_dapo_draws_groups_that_differ_and_punishes_long_answers(taught: Path, tmp_path: Path) -> None:
    for row in steps_of("dapo", taught, tmp_path):
        assert row["selection/num_groups"] == 32 and row["selection/num_batches_drawn"] > 1
        assert row["selection/num_uniform_dropped"] > 0
        assert row["selection/overlong_punishment_mean"] <= 0
        assert "policy/ref_kl" not in row
    algorithm = load_config(["--config-path", str(FOLDER), "--config-name", "dapo"]).config.trainer.algorithm
    assert algorithm.eps_clip_high > algorithm.eps_clip_low and algorithm.loss_reduction == "token_mean"


def test_dr_grpo_keeps_advantages_within_the_rewards_range(taught: Path, tmp_path: Path) -> None:
    """Rewards are 0 or 1: centred they are under 1; divided by their deviation one right answer of 8 would be 2.5."""
    rows = steps_of("dr_grpo", taught, tmp_path)
    assert all(0.5 < row["advantage/abs_max"] < 1 for row in rows)
    algorithm = load_config(["--config-path", str(FOLDER), "--config-name", "dr_grpo"]).config.trainer.algorithm
    assert algorithm.loss_reduction == "seq_mean_token_sum_norm" and not algorithm.grpo_norm_by_std


def test_ppo_trains_a_critic_and_pays_the_kl_from_the_reward(taught: Path, tmp_path: Path) -> None:
    rows = steps_of("ppo", taught, tmp_path)
    assert rows[0]["critic/values_mean"] == 0, "the head starts at 0"
    assert all(row["critic/grad_norm"] > 0 and "critic/clip_frac" in row for row in rows)
    assert rows[0]["reward/kl_mean"] == 0 and rows[1]["reward/kl_mean"] != 0
    assert (tmp_path / "checkpoints" / "global_step_2" / "critic").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dapo", "dr_grpo", "ppo"])
def test_each_learns_the_built_in_task(name: str, tmp_path: Path) -> None:
    """50 steps, 20 to 50 s on one core, held-out accuracy from about 30 % to 64 to 93 %.

    Seeds 42, 1, 2, 3: dapo 92 81 87 90 %, dr_grpo 88 76 76 87 %, ppo 90 64 74 85 %. Another processor rounds
    otherwise and is another seed in effect, so the bound is under them all, and far over where each began.
    """
    command = ["--config-path", str(FOLDER), "--config-name", name, f"trainer.run_path={tmp_path}"]
    command += ["trainer.max_steps=50", "trainer.eval_interval=50", "trainer.ckpt_interval=-1"]
    assert run(load_config(command)) == DONE
    rows = read_metrics(tmp_path / "metrics.jsonl")
    before, after = (row["eval/accuracy"] for row in rows if "eval/accuracy" in row)
    assert before < 0.4 and after > 0.5


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_names_its_paper_and_its_command(path: Path) -> None:
    text = path.read_text()
    assert f"--config-path examples/recipes --config-name {path.stem}" in text
    assert "arXiv:" in text or "distillation.py" in text
