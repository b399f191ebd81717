"""The built-in task's model from nothing, and the same after a short supervised run of our own recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from skyrl_train.entrypoints.run import DONE
from skyrl_train.recipes.sft import main
from skyrl_train.training.builtin_model import make_model, make_tokenizer


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fresh")
    make_model(make_tokenizer(), seed=0).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def taught(fresh: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's folder; its export knows what an answer looks like, and some of the answers."""
    run_path = tmp_path_factory.mktemp("taught")
    assert main(sft_arguments(fresh, run_path, "trainer.max_steps=120", "trainer.train_batch_size=64")) == DONE
    return run_path


def sft_arguments(model: Path, run_path: Path, *more: str) -> list[str]:
    return [
        f"trainer.policy.model.path={model}",
        f"trainer.run_path={run_path}",
        "trainer.run_name=sft",
        "trainer.eval_interval=60",
        "trainer.ckpt_interval=-1",
        "trainer.policy.optimizer_config.scheduler=constant",
        "trainer.policy.optimizer_config.lr=2e-3",
        "environment.arithmetic.num_eval_prompts=256",
        *more,
    ]
