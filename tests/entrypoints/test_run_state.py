"""From which checkpoint a run goes on, and what it says when there is none that it could."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from skyrl_train.algorithms.kl_control import KlController, KlTarget
from skyrl_train.config.load import load_config, plain
from skyrl_train.data.rows import PromptRow
from skyrl_train.data.stream import PromptStream
from skyrl_train.entrypoints.run_state import RunState
from skyrl_train.errors import CheckpointError, ConfigError
from skyrl_train.training.checkpoint import Parts
from skyrl_train.training.optimizer import OptimizerSettings
from skyrl_train.training.trainer import PolicyTrainer
from tests.tiny import make_model


def state(root: Path, *overrides: str) -> RunState:
    config = load_config([f"trainer.run_path={root}", *overrides]).config
    return RunState(config.trainer, plain(config))


def stream(num_rows: int = 10) -> PromptStream:
    message = {"role": "user", "content": "?"}
    rows = [PromptRow(messages=(message,), environment="x", target=None, extras={}) for _ in range(num_rows)]
    return PromptStream(rows, batch_size=2, seed=1)


def controller(coefficient: float = 0.5) -> KlController:
    return KlController(coefficient, KlTarget(kl=0.1, horizon=100))


def parts(**owners: Any) -> Parts:
    return {name: (owner.save, owner.load) for name, owner in owners.items()}


def saved(root: Path, *steps: int, overrides: tuple[str, ...] = ()) -> None:
    """A checkpoint after each of the steps, whose coefficient is the step."""
    prompts, run_state = stream(), state(root, *overrides)
    for step in range(1, max(steps) + 1):
        prompts.next_batch()
        if step in steps:
            run_state.save(step, parts(kl_controller=controller(step)), prompts.state_dict())


def restored(root: Path, *overrides: str) -> tuple[int, float, str]:
    """The step, the coefficient that was loaded, and the first prompt that comes next."""
    kl, prompts = controller(), stream()
    step = state(root, *overrides).restore(parts(kl_controller=kl), prompts)
    return step, kl(), prompts.next_batch()[0].prompt_id


def first_of(step: int) -> str:
    prompts = stream()
    return [prompts.next_batch()[0].prompt_id for _ in range(step)][-1]


def test_a_run_goes_on_after_the_newest_checkpoint_with_the_next_prompts(tmp_path: Path) -> None:
    assert restored(tmp_path) == (0, 0.5, first_of(1))
    saved(tmp_path, 2, 4)
    assert restored(tmp_path) == (4, 4.0, first_of(5))


def test_a_run_that_starts_anew_moves_the_old_checkpoints_away(tmp_path: Path) -> None:
    saved(tmp_path, 2)
    assert restored(tmp_path, "trainer.resume_mode=none") == (0, 0.5, first_of(1))
    assert restored(tmp_path) == (0, 0.5, first_of(1))
    assert (tmp_path / "checkpoints.old-1" / "global_step_2").is_dir()


def test_a_path_is_a_checkpoint_or_a_folder_of_them(tmp_path: Path) -> None:
    saved(tmp_path / "a", 2, 4)
    mode, checkpoints = "trainer.resume_mode=from_path", tmp_path / "a" / "checkpoints"
    assert restored(tmp_path / "b", mode, f"trainer.resume_path={checkpoints / 'global_step_2'}")[:2] == (2, 2.0)
    assert restored(tmp_path / "b", mode, f"trainer.resume_path={checkpoints}")[:2] == (4, 4.0)
    with pytest.raises(CheckpointError, match=r"nowhere: no readable manifest.json"):
        restored(tmp_path / "b", mode, f"trainer.resume_path={tmp_path / 'nowhere'}")


def test_the_same_command_goes_on_where_it_was_cut_short_and_another_one_from_its_path(tmp_path: Path) -> None:
    saved(tmp_path / "a", 2)
    path = ("trainer.resume_mode=from_path", f"trainer.resume_path={tmp_path / 'a' / 'checkpoints'}")
    saved(tmp_path / "b", 3, 6, overrides=path)
    assert restored(tmp_path / "b", *path)[0] == 6
    assert restored(tmp_path / "b", *path, "trainer.seed=7")[0] == 2
    (tmp_path / "b" / "checkpoints" / "global_step_6" / "manifest.json").unlink()
    assert restored(tmp_path / "b", *path)[0] == 3


def test_checkpoints_of_which_none_can_be_used_are_no_fresh_start(tmp_path: Path) -> None:
    saved(tmp_path, 2, 4)
    for manifest in tmp_path.glob("checkpoints/*/manifest.json"):
        manifest.write_text(manifest.read_text().replace('"format": 2', '"format": 1'))
    with pytest.raises(
        CheckpointError, match=r"steps \[2, 4\], none of them whole; trainer.resume_mode=none .*format 1"
    ):
        restored(tmp_path)


def test_a_part_too_many_or_too_few_is_named_with_the_keys_that_changed(tmp_path: Path) -> None:
    saved(tmp_path, 2)
    with pytest.raises(
        CheckpointError, match=r"has kl_controller, which this run doesn't(.|\n)*kl_ctrl.horizon: 10000 ->"
    ):
        state(tmp_path, "trainer.algorithm.kl_ctrl.horizon=5").restore({}, stream())
    both = parts(kl_controller=controller(), critic=controller())
    with pytest.raises(CheckpointError, match=r"has no critic: (.|\n)*changed since: no key"):
        state(tmp_path).restore(both, stream())


def test_another_model_and_other_data_are_refused_with_the_keys_that_changed(tmp_path: Path) -> None:
    settings = OptimizerSettings(lr=1e-3)
    policy = parts(policy=PolicyTrainer(make_model(), settings))
    state(tmp_path).save(1, policy, stream().state_dict())
    other = parts(policy=PolicyTrainer(make_model(hidden_size=32), settings))
    with pytest.raises(CheckpointError, match=r"different: (.|\n)*trainer.policy.model.path: 'builtin:arithmetic' -> "):
        state(tmp_path, "trainer.policy.model.path=builtin:calculator").restore(other, stream())
    longer = stream(12)
    state(tmp_path).restore(policy, longer)
    with pytest.raises(ConfigError, match="10 data rows and seed 1, this run has 12"):
        longer.next_batch()


def test_what_does_not_change_the_result_is_no_change(tmp_path: Path) -> None:
    saved(tmp_path / "a", 2)
    (tmp_path / "a").rename(tmp_path / "b")
    moved = state(tmp_path / "b", "trainer.ckpt_interval=3", "trainer.logger=[jsonl]", "trainer.run_name=other")
    assert moved.restore(parts(kl_controller=controller()), stream()) == 2
    assert moved.changes == ["trainer.ckpt_interval: 10 -> 3"]
