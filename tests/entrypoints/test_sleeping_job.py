"""A run whose engine sleeps while the trainer works is the same run, in less memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from skyrl_train.config.load import load_config
from skyrl_train.entrypoints.run import DONE, run
from skyrl_train.errors import ConfigError
from skyrl_train.observability.metrics import deterministic_metrics, read_metrics
from tests.tiny import make_model, make_tokenizer

SLEEPS = "+generator.engine_init_kwargs.sleeps_in_training=true"


def arguments(folder: Path, run_path: Path, *more: str) -> list[str]:
    return [
        f"trainer.policy.model.path={folder / 'model'}",
        f"data.train_data=[{folder / 'train.jsonl'}]",
        "environment.env_class=tests.entrypoints.letters:LetterEnv",
        f"trainer.run_path={run_path}",
        "trainer.run_name=tiny",
        "trainer.train_batch_size=4",
        "trainer.policy_mini_batch_size=4",
        "trainer.epochs=1",
        "trainer.eval_interval=-1",
        "trainer.ckpt_interval=-1",
        "generator.n_samples_per_prompt=4",
        "generator.sampling_params.max_generate_length=12",
        *more,
    ]


def test_a_run_whose_engine_sleeps_in_training_has_the_same_numbers(tmp_path: Path) -> None:
    make_model(attn_implementation="eager", initializer_range=0.02).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps({"prompt": f"train {i}?"}) for i in range(8)) + "\n")
    for name, more in (("plain", ()), ("sleeping", (SLEEPS,))):
        assert run(load_config(arguments(tmp_path, tmp_path / name, *more))) == DONE
    plain, sleeping = (tmp_path / name / "metrics.jsonl" for name in ("plain", "sleeping"))
    assert deterministic_metrics(sleeping) == deterministic_metrics(plain)
    steps = [row for row in read_metrics(sleeping) if "timing/train_s" in row]
    assert len(steps) == 2 and all("timing/engine_sleep_s" in row for row in steps)
    assert not any("timing/engine_sleep_s" in row for row in read_metrics(plain))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("trainer.placement.policy_num_gpus_per_node=1", "can't sleep on a GPU"),
        ("trainer.fully_async.enabled=true", "the engine works while the trainer does"),
    ],
)
def test_where_nobody_can_take_turns_it_is_refused(more: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config([SLEEPS, more])
