"""The whole job over an environment of several turns: what it leaves, and that a killed run ends with the same bits."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from skyrl_train.config.load import load_config
from skyrl_train.entrypoints.run import DONE, FAILED, run
from skyrl_train.observability.metrics import read_metrics
from tests.entrypoints.test_main_job import arguments, assert_equal_runs, inputs, start, wait_for_step

__all__ = ["inputs"]

# A random model seldom ends an answer: every fourth token does it here, without the template's end token.
STOPS = list(range(0, 256, 4))
MORE = (
    f"generator.sampling_params.stop_token_ids={STOPS}",
    f"generator.eval_sampling_params.stop_token_ids={STOPS}",
    f"environment.env_class={__name__}:AskingEnv",
    "generator.max_turns=3",
    "generator.max_input_length=160",
    "trainer.epochs=1",
    "trainer.ckpt_interval=1",
    "trainer.logger=[jsonl]",
)


class AskingEnv:
    """Asks for more until the second answer, or the third where the first one is short: more vowels, more reward."""

    runs_inline = True

    def __init__(self, *, env_config: Any, extras: dict[str, Any]) -> None:
        self.answers: list[str] = []

    def init(self, prompt: list[Any]) -> tuple[list[Any], dict[str, Any]]:
        return prompt, {}

    def step(self, action: str) -> dict[str, Any]:
        self.answers.append(action)
        vowels = sum(letter in "aeiouAEIOU" for letter in action)
        done = len(self.answers) == (3 if len(self.answers[0]) < 10 else 2)
        return {
            "observations": [{"role": "user", "content": f"more than {vowels}!"}],
            "reward": min(1.0, vowels / 2),
            "done": done,
            "metadata": {"vowels": vowels},
        }

    def close(self) -> None:
        pass


class ThreadedAskingEnv(AskingEnv):
    runs_inline = False


class StuckEnv(ThreadedAskingEnv):
    def step(self, action: str) -> dict[str, Any]:
        __import__("threading").Event().wait(600)
        raise AssertionError


def multi_turn(inputs: Path, run_path: Path, *more: str) -> list[str]:
    return arguments(inputs, run_path, *MORE, *more)


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_path = tmp_path_factory.mktemp("whole") / "run"
    assert run(load_config(multi_turn(inputs, run_path))) == DONE
    return run_path


def test_engine_and_trainer_agree_on_every_token_of_every_turn_and_all_turns_are_written(whole: Path) -> None:
    rows = [row for row in read_metrics(whole / "metrics.jsonl") if row["step"]]
    assert len(rows) == 3
    for row in rows:
        assert row["policy/rollout_logprob_abs_diff_max"] < 1e-5
        assert 1.5 < row["rollout/turns_mean"] <= 3 and row["rollout/turns_max"] == 3
        assert row["rollout/observation_len_mean"] > 20 and "environment/vowels" in row
    records = [json.loads(line) for line in (whole / "rollouts" / "step_000001.jsonl").read_text().splitlines()]
    whole_ones = [record for record in records if record["status"] == "completed"]
    assert {len(record["turns"]) for record in whole_ones} == {2, 3}
    for record in whole_ones:
        first, second = record["turns"][:2]
        seen = second["observation"].removeprefix("<|im_end|>")  # unless the model ended its answer itself
        assert first["observation"] is None and seen.startswith("\n<|im_start|>user\nmore than ")
        assert second["token_ids"] and record["reward"] == pytest.approx(sum(t["reward"] for t in record["turns"]))


def test_a_killed_run_of_several_turns_goes_on_and_ends_with_the_same_bits(
    whole: Path, inputs: Path, tmp_path: Path
) -> None:
    process = start(multi_turn(inputs, tmp_path / "killed"))
    wait_for_step(tmp_path / "killed", 1, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert run(load_config(multi_turn(inputs, tmp_path / "killed"))) == DONE
    assert_equal_runs(whole, tmp_path / "killed")


@pytest.mark.parametrize("staleness", [0, 2])
def test_an_asynchronous_run_of_several_turns_that_is_killed_ends_with_the_same_bits(
    whole: Path, inputs: Path, tmp_path: Path, staleness: int
) -> None:
    more = ("trainer.fully_async.enabled=true", f"trainer.fully_async.max_staleness_steps={staleness}")
    assert run(load_config(multi_turn(inputs, tmp_path / "async", *more))) == DONE
    process = start(multi_turn(inputs, tmp_path / "killed", *more))
    wait_for_step(tmp_path / "killed", 1, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert run(load_config(multi_turn(inputs, tmp_path / "killed", *more))) == DONE
    assert_equal_runs(tmp_path / "async", tmp_path / "killed")


def test_an_environment_in_threads_trains_as_well_and_each_turn_can_be_a_sequence(inputs: Path, tmp_path: Path) -> None:
    more = (f"environment.env_class={__name__}:ThreadedAskingEnv", "generator.chat_history=template")
    assert run(load_config(multi_turn(inputs, tmp_path / "run", *more))) == DONE
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if row["step"]]
    assert len(rows) == 3 and all(row["policy/rollout_logprob_abs_diff_max"] < 1e-5 for row in rows)


def test_a_run_whose_environments_all_hang_ends_with_an_error(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = (
        f"environment.env_class={__name__}:StuckEnv",
        "environment.num_workers=2",
        "environment.step_timeout_s=0.2",
        "trainer.eval_interval=-1",
    )
    assert run(load_config(multi_turn(inputs, tmp_path / "run", *more))) == FAILED
    assert "all 2 workers (environment.num_workers) are stuck" in capsys.readouterr().err


def test_a_turn_can_be_a_sample_of_its_own(inputs: Path, tmp_path: Path) -> None:
    rows = {}
    for name in ("false", "true"):
        command = arguments(inputs, tmp_path / name, *MORE, f"generator.step_wise_trajectories={name}")
        assert run(load_config([*command, "trainer.max_steps=1"])) == DONE
        rows[name] = read_metrics(tmp_path / name / "metrics.jsonl")[-1]
    whole, step_wise = rows["false"], rows["true"]
    assert step_wise["train/num_loss_tokens"] == whole["train/num_loss_tokens"] > 0
    assert step_wise["train/num_rows"] > whole["train/num_rows"], "a turn repeats its history"
    # Every sampled token has the same advantage and the same log-probability before the update either way.
    for figure in ("advantage/mean", "advantage/std", "policy/entropy"):
        assert step_wise[figure] == pytest.approx(whole[figure], rel=1e-4, abs=1e-7)
