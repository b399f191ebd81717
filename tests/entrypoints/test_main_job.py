"""The whole job on a tiny random model: what a run leaves behind, and that nothing is lost however it ends."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from skyrl_train.config.load import load_config
from skyrl_train.entrypoints.run import DONE, FAILED, INTERRUPTED, REFUSED, run
from skyrl_train.observability.metrics import deterministic_metrics, read_metrics
from tests.tiny import make_model, make_tokenizer

ROOT = Path(__file__).parents[2]
STEPS = 6


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    make_model(attn_implementation="eager", initializer_range=0.02).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    for name, count in (("train", 12), ("val", 4)):
        rows = [json.dumps({"prompt": f"{name} {i}?"}) for i in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "failing.jsonl").write_text("\n".join(json.dumps({"prompt": f"{i}", "raises": i == 1}) for i in range(4)))
    return folder


def arguments(inputs: Path, run_path: Path, *more: str) -> list[str]:
    return [
        f"trainer.policy.model.path={inputs / 'model'}",
        f"data.train_data=[{inputs / 'train.jsonl'}]",
        f"data.val_data=[{inputs / 'val.jsonl'}]",
        "environment.env_class=tests.entrypoints.letters:LetterEnv",
        f"trainer.run_path={run_path}",
        "trainer.run_name=tiny",
        "trainer.train_batch_size=4",
        "trainer.policy_mini_batch_size=2",
        "trainer.epochs=2",
        "trainer.eval_interval=3",
        "trainer.ckpt_interval=2",
        "trainer.policy.optimizer_config.lr=1e-3",
        "trainer.policy.optimizer_config.num_warmup_steps=1",
        "generator.n_samples_per_prompt=4",
        "generator.sampling_params.max_generate_length=12",
        "generator.eval_sampling_params.max_generate_length=12",
        *more,
    ]


def start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "skyrl_train.entrypoints.main_base", *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def wait_for_step(run_path: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    metrics = run_path / "metrics.jsonl"
    while not (metrics.exists() and any(row["step"] >= step for row in read_metrics(metrics))):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the run did not get there"
        time.sleep(0.02)


def final_weights(run_path: Path) -> dict[str, torch.Tensor]:
    return load_file(run_path / "export" / "model.safetensors")


def assert_equal_runs(first: Path, second: Path) -> None:
    assert deterministic_metrics(first / "metrics.jsonl") == deterministic_metrics(second / "metrics.jsonl")
    a, b = final_weights(first), final_weights(second)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a), "weights differ"


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    run_path = tmp_path_factory.mktemp("whole") / "run"
    assert run(load_config(arguments(inputs, run_path))) == DONE
    return run_path


def test_a_run_leaves_metrics_rollouts_checkpoints_an_export_and_a_report(whole: Path, inputs: Path) -> None:
    rows = read_metrics(whole / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    assert [row["step"] for row in rows if "eval/accuracy" in row] == [0, 3, 6]
    for row in rows[1:]:
        assert {"reward/mean", "timing/rollout_s", "timing/train_s", "throughput/rollout_tokens_per_s"} <= row.keys()
        assert row["policy/rollout_logprob_abs_diff_max"] < 1e-5, "engine and trainer disagree"
    assert rows[-1]["policy/version"] == 2 * STEPS, "two mini-batches a step"
    assert (whole / "report.html").stat().st_size > 10_000
    assert (whole / "rollouts" / "step_000001.jsonl").exists()
    assert sorted(p.name for p in (whole / "checkpoints").iterdir()) == ["global_step_4", "global_step_6"]
    settings = load_config(["--config-path", str(whole), "--config-name", "config"]).config
    assert settings.trainer.train_batch_size == 4, "config.yaml is the resolved configuration"


def test_the_export_is_a_model_that_transformers_loads(whole: Path, inputs: Path) -> None:
    trained = AutoModelForCausalLM.from_pretrained(whole / "export")
    before = AutoModelForCausalLM.from_pretrained(inputs / "model")
    assert any(not torch.equal(a, b) for a, b in zip(trained.parameters(), before.parameters(), strict=True))
    tokenizer = AutoTokenizer.from_pretrained(whole / "export")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert trained(**ids).logits.isfinite().all()


def test_the_same_seed_gives_the_same_metrics_and_weights_and_another_does_not(
    whole: Path, inputs: Path, tmp_path: Path
) -> None:
    assert run(load_config(arguments(inputs, tmp_path / "again"))) == DONE
    assert_equal_runs(whole, tmp_path / "again")
    assert run(load_config(arguments(inputs, tmp_path / "other", "trainer.seed=7"))) == DONE
    assert deterministic_metrics(whole / "metrics.jsonl") != deterministic_metrics(tmp_path / "other" / "metrics.jsonl")


@pytest.mark.parametrize("step", [1, 3])
def test_a_killed_run_goes_on_and_ends_with_the_same_bits(whole: Path, inputs: Path, tmp_path: Path, step: int) -> None:
    run_path = tmp_path / "killed"
    process = start(arguments(inputs, run_path))
    wait_for_step(run_path, step, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (run_path / "export").exists(), "it was over before it was killed"
    assert run(load_config(arguments(inputs, run_path))) == DONE
    assert_equal_runs(whole, run_path)


def test_ctrl_c_ends_after_the_step_with_a_checkpoint_and_the_same_command_goes_on(
    whole: Path, inputs: Path, tmp_path: Path
) -> None:
    run_path = tmp_path / "interrupted"
    process = start(arguments(inputs, run_path, "trainer.ckpt_interval=-1"))
    wait_for_step(run_path, 2, process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED, output
    assert "the same command goes on" in output and "Traceback" not in output
    done = read_metrics(run_path / "metrics.jsonl")[-1]["step"]
    assert [p.name for p in (run_path / "checkpoints").iterdir()] == [f"global_step_{done}"]
    assert run(load_config(arguments(inputs, run_path))) == DONE
    assert_equal_runs(whole, run_path)


def test_ctrl_c_before_the_first_checkpoint_promises_none(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    assert run(load_config(arguments(inputs, tmp_path)), interrupted) == INTERRUPTED
    assert "the same command starts anew: there is no checkpoint yet" in capsys.readouterr().err


def test_a_finished_run_is_not_trained_again(whole: Path, inputs: Path) -> None:
    before = (whole / "metrics.jsonl").read_bytes()
    assert run(load_config(arguments(inputs, whole))) == DONE
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_starting_anew_sets_the_old_checkpoints_aside(inputs: Path, tmp_path: Path) -> None:
    run_path = tmp_path / "anew"
    short = ("trainer.max_steps=1", "trainer.eval_interval=-1")
    assert run(load_config(arguments(inputs, run_path, *short))) == DONE
    assert run(load_config(arguments(inputs, run_path, *short, "trainer.resume_mode=none"))) == DONE
    assert [row["step"] for row in read_metrics(run_path / "metrics.jsonl")] == [1]
    assert (run_path / "checkpoints.old-1" / "global_step_1").exists()


def test_two_processes_can_not_share_a_folder(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    process = start(arguments(inputs, tmp_path / "run", "trainer.epochs=200"))
    wait_for_step(tmp_path / "run", 1, process)
    assert run(load_config(arguments(inputs, tmp_path / "run"))) == REFUSED
    assert f"(process {process.pid})" in capsys.readouterr().err
    process.kill()
    process.communicate()


def test_a_reward_that_raises_stops_the_run_by_name_or_is_counted(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failing = (f"data.train_data=[{inputs / 'failing.jsonl'}]", "trainer.eval_interval=-1", "trainer.epochs=1")
    assert run(load_config(arguments(inputs, tmp_path / "a", *failing))) == FAILED
    said = capsys.readouterr().err
    assert "4 of 16 trajectories failed" in said and "ValueError: this row always fails" in said
    allowed = (*failing, "environment.max_failed_frac=0.5")
    assert run(load_config(arguments(inputs, tmp_path / "b", *allowed))) == DONE
    assert read_metrics(tmp_path / "b" / "metrics.jsonl")[-1]["rollout/num_failed"] == 4
    lines = (tmp_path / "b/rollouts/step_000001.jsonl").read_text().splitlines()
    statuses = [json.loads(line)["status"] for line in lines]
    assert statuses.count("failed") == 4


def test_a_model_without_a_chat_template_is_refused_by_name(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_model(attn_implementation="eager").save_pretrained(tmp_path / "model")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "model")
    command = arguments(inputs, tmp_path / "run", f"trainer.policy.model.path={tmp_path / 'model'}")
    assert run(load_config(command)) == REFUSED
    assert "has no chat template" in capsys.readouterr().err
