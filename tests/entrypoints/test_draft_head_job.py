"""The main job with an EAGLE-3 head that drafts for the policy and is trained on its rollouts."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from skyrl_train.config.load import load_config
from skyrl_train.engines.embedded.drafts.eagle.fresh import fresh_eagle3
from skyrl_train.engines.embedded.drafts.eagle.layout import save_head
from skyrl_train.entrypoints.run import DONE, REFUSED, run
from skyrl_train.errors import ConfigError
from skyrl_train.observability.metrics import deterministic_metrics, read_metrics
from skyrl_train.training.builtin_model import make_model, make_tokenizer
from tests.tiny import make_model as make_other

KEY = "generator.speculative_decoding"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("head")
    model = make_model(make_tokenizer(), seed=0)
    model.save_pretrained(root / "model")
    make_tokenizer().save_pretrained(root / "model")
    save_head(fresh_eagle3(model, seed=0), root / "head", num_layers=2)
    save_head(fresh_eagle3(make_other(), seed=0), root / "other", num_layers=2)
    return root


def arguments(folders: Path, run_path: Path, *more: str, head: str | None = "head") -> list[str]:
    drafts = () if head is None else (
        f"{KEY}.enabled=true",
        f"{KEY}.algorithm=eagle3",
        f"{KEY}.draft_model_path={folders / head}",
        f"{KEY}.num_steps=3",
    )  # fmt: skip
    return [
        f"trainer.policy.model.path={folders / 'model'}",
        f"trainer.run_path={run_path}",
        "trainer.run_name=drafted",
        "trainer.train_batch_size=8",
        "trainer.policy_mini_batch_size=8",
        "trainer.max_steps=4",
        "trainer.ckpt_interval=2",
        "trainer.eval_interval=-1",
        "trainer.policy.optimizer_config.lr=1e-3",
        *drafts,
        *more,
    ]


TAUGHT = (f"{KEY}.head_train_steps=2", f"{KEY}.head_lr=3e-3")


def test_the_head_learns_and_the_policy_does_not_notice(folders: Path, tmp_path: Path) -> None:
    """The same rollouts and updates without drafts, with them, and with a head that is trained."""
    for name, more, head in (("none", (), None), ("still", (), "head"), ("taught", TAUGHT, "head")):
        assert run(load_config(arguments(folders, tmp_path / name, *more, head=head))) == DONE
    none, still, taught = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("none", "still", "taught"))
    for rows in (still, taught):
        for row, wanted in zip(rows, none, strict=True):
            for key in ("rollout/num_tokens", "rollout/reward_mean"):
                assert row.get(key) == wanted.get(key)
            assert row.get("policy/loss") == pytest.approx(wanted.get("policy/loss"), abs=1e-5)
    steps = [row for row in taught if row["step"] > 0]
    assert steps[-1]["eagle3/loss"] < steps[0]["eagle3/loss"]
    assert not any("eagle3/loss" in row for row in still)
    assert [row["engine/draft_updates_behind"] for row in steps] == [0] * 4
    assert still[-1]["engine/draft_updates_behind"] > 0 and still[-1]["engine/accept_len"] > 1


def test_a_head_that_is_trained_resumes_with_the_run(folders: Path, tmp_path: Path) -> None:
    for name in ("whole", "cut"):
        assert run(load_config(arguments(folders, tmp_path / name, *TAUGHT))) == DONE
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "global_step_4")
    assert run(load_config(arguments(folders, tmp_path / "cut", *TAUGHT))) == DONE
    heads = [
        load_file(tmp_path / name / "checkpoints" / "global_step_4" / "draft_head" / "model.safetensors")
        for name in ("whole", "cut")
    ]
    start = load_file(folders / "head" / "model.safetensors")
    assert all(torch.equal(tensor, heads[1][name]) for name, tensor in heads[0].items())
    assert any(not torch.equal(tensor, start[name]) for name, tensor in heads[0].items())
    whole, cut = (deterministic_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "cut"))
    assert [row for row in whole if row["step"] > 2] == [row for row in cut if row["step"] > 2]


def test_a_head_for_another_model_ends_the_run_before_it_begins(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more in ((), TAUGHT):
        assert run(load_config(arguments(folders, tmp_path / "run", *more, head="other"))) == REFUSED
        assert "it is for another model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((f"{KEY}.head_train_steps=1", f"{KEY}.enabled=false"), "trains the head of .*algorithm=eagle3"),
        ((f"{KEY}.head_train_steps=1", "trainer.fully_async.enabled=true"), "the engine drafts while it trains"),
        (
            (f"{KEY}.head_train_steps=1", "trainer.policy.model.lora.rank=4"),
            "does not go with trainer.policy.model",
        ),
        ((f"{KEY}.head_lr=1e-3",), "is read with .*head_train_steps of 1 or more only"),
    ],
)
def test_training_a_head_is_refused_where_it_makes_no_sense(
    folders: Path, tmp_path: Path, more: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(arguments(folders, tmp_path / "run", *more))


def test_a_server_keeps_its_head(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is for generator\.backend=embedded, found sglang"):
        load_config([f"{KEY}.head_train_steps=1", "generator.backend=sglang"])
