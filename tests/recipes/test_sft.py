"""Supervised fine-tuning: the loss against a padded reference, what a run leaves behind, resuming, refusals."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from skyrl_train.algorithms.likelihood import negative_log_likelihood
from skyrl_train.data.conversations import encode_conversation
from skyrl_train.data.pack import pack
from skyrl_train.entrypoints.run import DONE, FAILED, INTERRUPTED, REFUSED
from skyrl_train.observability.metrics import deterministic_metrics, read_metrics
from skyrl_train.recipes.sft import main
from skyrl_train.training.optimizer import OptimizerSettings
from skyrl_train.training.trainer import PolicyTrainer
from skyrl_train.types import TrainingSample
from tests.entrypoints.test_main_job import ROOT, assert_equal_runs, wait_for_step
from tests.recipes.conftest import sft_arguments
from tests.tiny import make_model, make_tokenizer

CONVERSATIONS = [
    ("2+3", "5", "and 1 more", "it is 6"),
    ("say a long thing", "a rather long thing, said at some length"),
    ("hi", "ho"),
]


@pytest.fixture
def samples() -> list[TrainingSample]:
    return [
        sample
        for number, texts in enumerate(CONVERSATIONS)
        for sample in encode_conversation(
            make_tokenizer(),
            [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)],
            name=f"row-{number}",
        )
    ]


@pytest.mark.parametrize("limit", [{"max_tokens_per_micro_batch": 4096}, {"micro_batch_size": 1}])
def test_loss_and_gradient_are_those_of_cross_entropy_however_the_batch_is_cut(
    samples: list[TrainingSample], limit: dict[str, int]
) -> None:
    """Reference: each conversation on its own through transformers' own forward; sums over one count of tokens."""
    reference = make_model(attn_implementation="eager")
    total = sum(int(sample.loss_mask.sum()) for sample in samples)
    loss = torch.zeros(())
    for sample in samples:
        logits = reference(input_ids=sample.token_ids[None, :-1]).logits[0]
        labels = sample.token_ids[1:].masked_fill(~sample.loss_mask[1:], -100)
        loss = loss + F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") / total
    loss.backward()
    model = make_model()
    trainer = PolicyTrainer(model, OptimizerSettings(lr=1e-3))
    metrics = trainer.forward_backward(pack(samples, **limit), negative_log_likelihood)
    assert metrics["policy/loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["policy/nll"] == pytest.approx(loss.item(), rel=1e-5)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_the_held_out_loss_falls_and_the_run_leaves_what_a_run_leaves(taught: Path, fresh: Path) -> None:
    rows = read_metrics(taught / "metrics.jsonl")
    losses = [row["eval/loss"] for row in rows if "eval/loss" in row]
    assert len(losses) == 3 and losses[0] > 5 and losses[1] < 1.6 and losses[2] < losses[1]
    assert {"policy/loss", "policy/grad_norm", "train/num_loss_tokens", "timing/train_s"} <= rows[-1].keys()
    assert not any("rollout" in name for name in rows[-1]), "nothing was sampled"
    assert sorted(p.name for p in (taught / "checkpoints").iterdir()) == ["global_step_120"]
    assert (taught / "report.html").exists()
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (fresh, taught / "export"))
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    rows = [
        {"messages": [{"role": "user", "content": f"What is {i} + 1?"}, {"role": "assistant", "content": f"{i + 1}"}]}
        for i in range(10, 42)
    ]
    (folder / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (folder / "bad.jsonl").write_text(json.dumps(rows[0]) + "\n" + json.dumps({"messages": rows[0]["messages"][:1]}))
    long = [*rows[0]["messages"][:1], {"role": "assistant", "content": "x" * 600}]
    (folder / "long.jsonl").write_text("\n".join(json.dumps(row) for row in [*rows, {"messages": long}]))
    return folder


def on_files(fresh: Path, files: Path, run_path: Path, *more: str) -> list[str]:
    own = ("trainer.train_batch_size=8", "trainer.epochs=2", "trainer.policy.optimizer_config.num_warmup_steps=2")
    arguments = [a for a in sft_arguments(fresh, run_path) if not a.startswith("environment.")]
    return [*arguments, f"data.train_data=[{files / 'train.jsonl'}]", *own, "trainer.ckpt_interval=2", *more]


def test_an_interrupted_run_goes_on_and_ends_with_the_same_bits(
    fresh: Path, files: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    epochs = "trainer.epochs=40"
    assert main(on_files(fresh, files, tmp_path / "whole", epochs)) == DONE
    command = on_files(fresh, files, tmp_path / "cut", epochs)
    process = subprocess.Popen(
        [sys.executable, "-m", "skyrl_train.recipes.sft", *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for_step(tmp_path / "cut", 3, process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED, output
    assert "the same command goes on" in output and "Traceback" not in output
    done = read_metrics(tmp_path / "cut" / "metrics.jsonl")[-1]["step"]
    assert 3 <= done < 160
    assert main(command) == DONE
    assert_equal_runs(tmp_path / "whole", tmp_path / "cut")
    steps = [row["step"] for row in deterministic_metrics(tmp_path / "cut" / "metrics.jsonl")]
    assert [step for step in steps if step > 0] == list(range(1, 161))


def test_a_row_without_an_answer_is_named_or_counted(
    fresh: Path, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    bad = [f"data.train_data=[{files / 'bad.jsonl'}]", "trainer.train_batch_size=1"]
    assert main(on_files(fresh, files, tmp_path / "a", *bad)) == FAILED
    assert "bad.jsonl, row 2: a conversation needs an assistant message" in capsys.readouterr().err
    assert main(on_files(fresh, files, tmp_path / "b", *bad, "data.on_bad_row=skip")) == DONE
    assert "1 of 2 rows skipped" in caplog.text


def test_conversations_over_the_limit_are_left_out_and_counted(
    fresh: Path, files: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = f"data.train_data=[{files / 'long.jsonl'}]"
    assert main(on_files(fresh, files, tmp_path / "run", long, "trainer.max_steps=1")) == DONE
    assert "1 of 33 train conversations are longer than 512 tokens" in caplog.text


@pytest.mark.parametrize(
    "setting",
    [
        "generator.n_samples_per_prompt=4",
        "trainer.algorithm.policy_loss_type=dual_clip",
        "trainer.update_epochs_per_batch=2",
    ],
)
def test_keys_of_reinforcement_learning_are_refused_by_name(setting: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([setting]) == REFUSED
    assert f"has no use for {setting}" in capsys.readouterr().err


def test_explain_prints_the_keys_that_are_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trainer.seed=7", "--explain"]) == DONE
    printed = capsys.readouterr().out
    assert "trainer.seed=7    (override trainer.seed=7)" in printed
    assert "generator.n_samples_per_prompt" not in printed
