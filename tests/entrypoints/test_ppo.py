"""PPO: the main job with a critic, and that a resume loses nothing of it."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from skyrl_train.config.load import load_config
from skyrl_train.entrypoints.run import DONE, FAILED, REFUSED, run
from skyrl_train.observability.metrics import read_metrics
from tests.entrypoints.test_main_job import arguments, assert_equal_runs, inputs, start, wait_for_step
from tests.tiny import make_model, make_tokenizer

__all__ = ["inputs"]  # the fixture

PPO = (
    "trainer.algorithm.advantage_estimator=gae",
    "trainer.algorithm.lambd=0.95",
    "trainer.algorithm.use_kl_in_reward=true",
    "trainer.algorithm.kl_loss_coef=0.05",
    "trainer.algorithm.kl_ctrl.type=adaptive",
    "trainer.algorithm.kl_ctrl.kl_target=1e-3",
    "trainer.algorithm.kl_ctrl.horizon=160",
    "trainer.critic.optimizer_config.lr=1e-3",
    "trainer.critic_mini_batch_size=4",
    "trainer.update_epochs_per_batch=2",
)


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    run_path = tmp_path_factory.mktemp("whole") / "run"
    assert run(load_config(arguments(inputs, run_path, *PPO))) == DONE
    return run_path


def test_the_critic_is_trained_and_the_kl_leaves_the_reward(whole: Path) -> None:
    rows = [row for row in read_metrics(whole / "metrics.jsonl") if row["step"] > 0]
    assert all(row["critic/lr"] == 1e-3 and row["critic/grad_norm"] > 0 for row in rows)
    assert rows[0]["critic/values_mean"] == 0, "the head starts at 0"
    assert len({row["critic/values_mean"] for row in rows}) == len(rows)
    assert rows[0]["reward/kl_cost_mean"] == 0, "the policy is still its own reference"
    assert all(row["reward/kl_cost_mean"] > 0 for row in rows[1:])
    assert "policy/ref_kl" not in rows[-1], "the loss has no KL of its own"


def test_the_kl_controller_moves_the_coefficient_by_what_was_measured(whole: Path) -> None:
    """16 samples a step over a horizon of 160: at most 2 % a step, up or down."""
    rows = [row for row in read_metrics(whole / "metrics.jsonl") if row["step"] > 0]
    coefficient = 0.05
    for row in rows:
        assert row["policy/kl_coef"] == pytest.approx(coefficient)
        assert row["reward/kl_cost_mean"] == pytest.approx(coefficient * row["reward/kl_mean"])
        error = min(max(row["reward/kl_mean"] / 1e-3 - 1, -0.2), 0.2)
        coefficient *= 1 + 0.1 * error
    assert rows[1]["policy/kl_coef"] == pytest.approx(0.05 * 0.98), "nothing measured in the first step"


def test_the_checkpoint_has_parts_of_the_critic_and_the_controller(whole: Path) -> None:
    assert sorted(p.name for p in (whole / "checkpoints" / "global_step_6").iterdir() if p.is_dir()) == [
        "critic",
        "kl_controller",
        "policy",
    ]


def test_a_killed_run_goes_on_and_ends_with_the_same_bits(whole: Path, inputs: Path, tmp_path: Path) -> None:
    run_path = tmp_path / "killed"
    process = start(arguments(inputs, run_path, *PPO))
    wait_for_step(run_path, 3, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (run_path / "export").exists(), "it was over before it was killed"
    assert run(load_config(arguments(inputs, run_path, *PPO))) == DONE
    assert_equal_runs(whole, run_path)


def test_a_checkpoint_without_a_critic_is_refused_by_name(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(load_config(arguments(inputs, tmp_path / "run", "trainer.max_steps=1"))) == DONE
    assert run(load_config(arguments(inputs, tmp_path / "run", "trainer.max_steps=2", *PPO))) == FAILED
    error = capsys.readouterr().err
    assert "global_step_1 has no critic" in error and "trainer.algorithm.advantage_estimator: 'grpo' -> 'gae'" in error


def test_the_critic_may_start_from_another_model(whole: Path, inputs: Path, tmp_path: Path) -> None:
    """From the trained policy's export instead of the policy's own start: other values from step 2 on."""
    critic = f"trainer.critic.model.path={whole / 'export'}"
    assert run(load_config(arguments(inputs, tmp_path / "run", *PPO, critic))) == DONE
    first, second = (read_metrics(path / "metrics.jsonl") for path in (whole, tmp_path / "run"))
    assert first[1]["reward/mean"] == second[1]["reward/mean"]
    assert first[2]["critic/values_mean"] != second[2]["critic/values_mean"]


def test_a_critic_with_other_tokens_is_refused_by_name(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_model(vocab_size=310).save_pretrained(tmp_path / "critic")
    make_tokenizer(310).save_pretrained(tmp_path / "critic")
    critic = f"trainer.critic.model.path={tmp_path / 'critic'}"
    assert run(load_config(arguments(inputs, tmp_path / "run", *PPO, critic))) == REFUSED
    assert f"the critic {tmp_path / 'critic'} has another tokenizer" in capsys.readouterr().err


@pytest.mark.slow
def test_ppo_learns_the_built_in_task(tmp_path: Path) -> None:
    """80 steps, about 70 s on two cores, went from 32.4 % to 98.4 % held-out accuracy."""
    command = [
        f"trainer.run_path={tmp_path}",
        "trainer.run_name=ppo",
        "trainer.algorithm.advantage_estimator=gae",
        "trainer.algorithm.lambd=0.95",
        "trainer.critic.optimizer_config.lr=2e-3",
        "trainer.max_steps=80",
        "trainer.eval_interval=80",
        "trainer.ckpt_interval=-1",
    ]
    assert run(load_config(command)) == DONE
    rows = read_metrics(tmp_path / "metrics.jsonl")
    before, after = (row["eval/accuracy"] for row in rows if "eval/accuracy" in row)
    assert before < 0.5 and after > 0.9
