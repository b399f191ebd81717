"""On-policy distillation through the main job: the teacher is the reference model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from skyrl_train.algorithms.advantages import AdvantageInputs
from skyrl_train.config.load import load_config
from skyrl_train.entrypoints.run import DONE, REFUSED, run
from skyrl_train.observability.metrics import read_metrics
from skyrl_train.recipes.distillation import reverse_kl
from tests.tiny import make_model, make_tokenizer


def arguments(student: Path, teacher: Path, run_path: Path, *more: str) -> list[str]:
    return [
        "--config-path",
        "examples/recipes",
        "--config-name",
        "distillation",
        f"trainer.policy.model.path={student}",
        f"trainer.ref.model.path={teacher}",
        f"trainer.run_path={run_path}",
        "trainer.train_batch_size=64",
        "trainer.max_steps=50",
        "trainer.eval_interval=-1",
        "trainer.ckpt_interval=-1",
        "trainer.policy.optimizer_config.lr=3e-3",
        "generator.sampling_params.max_generate_length=4",
        *more,
    ]


def test_the_advantage_is_the_teachers_log_probability_minus_the_students() -> None:
    student, teacher = torch.tensor([-1.0, -0.5, -2.0]), torch.tensor([-0.2, -3.0, -2.0])
    inputs = AdvantageInputs(
        rewards=torch.tensor([0.0, 1.0, 1.0]) - (student - teacher),
        scores=torch.zeros(2),
        trajectory_index=torch.tensor([0, 0, 1]),
        group_index=torch.tensor([0, 0]),
        kl_costs=student - teacher,
    )
    torch.testing.assert_close(reverse_kl(inputs), torch.tensor([0.8, -2.5, 0.0]))


def test_the_reverse_kl_to_the_teacher_falls(fresh: Path, taught: Path, tmp_path: Path) -> None:
    assert run(load_config(arguments(fresh, taught / "export", tmp_path / "run"))) == DONE
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if row["step"] > 0]
    kl = [row["reward/kl_mean"] for row in rows]
    assert kl[0] > 5 and kl[-1] < 0.5 * kl[0], kl
    assert rows[0]["advantage/mean"] == pytest.approx(-kl[0])


def test_a_teacher_with_another_tokenizer_is_refused_by_name(
    fresh: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_model(attn_implementation="eager").save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    assert run(load_config(arguments(fresh, tmp_path / "other", tmp_path / "run"))) == REFUSED
    assert "has another tokenizer than the policy" in capsys.readouterr().err


def test_without_a_teacher_the_estimator_says_what_is_missing() -> None:
    inputs = AdvantageInputs(
        rewards=torch.zeros(1),
        scores=torch.zeros(1),
        trajectory_index=torch.tensor([0]),
        group_index=torch.tensor([0]),
    )
    with pytest.raises(ValueError, match="use_kl_in_reward=true"):
        reverse_kl(inputs)
