"""SIGKILL twenty times, at random moments: every prompt is trained on once, and the weights are the same to the bit."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path

import pytest
import torch

from skyrl_train.entrypoints.run import DONE, FAILED
from skyrl_train.observability.metrics import deterministic_metrics, read_metrics
from tests.entrypoints.killing import MOMENTS, live, rows_of
from tests.entrypoints.test_main_job import arguments, final_weights
from tests.tiny import make_model, make_tokenizer

ROWS, PROMPTS, EPOCHS = 12, 4, 6
KILLS = 10
ASYNC = ("trainer.fully_async.enabled=true", "trainer.fully_async.max_staleness_steps=2")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    make_model(attn_implementation="eager", initializer_range=0.02).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    for name, count in (("train", ROWS), ("val", 4)):
        rows = [json.dumps({"prompt": f"{name} {number}?", "number": number}) for number in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.mark.parametrize("loop", [(), ASYNC], ids=["sync", "async"])
def test_a_run_that_is_killed_again_and_again_trains_on_each_prompt_once_and_ends_at_the_same_bits(
    loop: tuple[str, ...], inputs: Path, tmp_path: Path
) -> None:
    seed = int(os.environ.get("KILL_SEED") or random.SystemRandom().randrange(10**6))
    print(f"KILL_SEED={seed} draws these moments again")
    rng = random.Random(seed)
    log = tmp_path / "log.txt"

    def command(name: str) -> list[str]:
        more = ("environment.env_class=tests.entrypoints.killing:NumberedEnv", f"trainer.epochs={EPOCHS}")
        return arguments(inputs, tmp_path / name, "trainer.logger=[jsonl]", *more, *loop)

    assert live(command("whole"), log) == DONE, log.read_text()
    assert trained_rows(tmp_path / "whole") == sorted([*range(ROWS)] * EPOCHS)

    begin, end = ((tmp_path / "whole" / name).stat().st_mtime for name in ("config.yaml", "report.html"))
    whole_s = end - begin + 0.3

    moments = [*MOMENTS, *["any"] * (KILLS - len(MOMENTS))]
    rng.shuffle(moments)
    runs, num_kills = ["killed-0"], 0
    while moments:
        moment = moments[-1]
        if moment == "any":
            code = live(command(runs[-1]), log, after_s=rng.uniform(0.0, whole_s))
        else:
            code = live(command(runs[-1]), log, moment=moment, times=rng.randint(1, MOMENTS[moment]))
        if code == -signal.SIGKILL:
            moments.pop()
            num_kills += 1
        else:  # it was over before its moment came: the next run has more ahead of it
            assert code == DONE, log.read_text()[-4000:]
            runs.append(f"killed-{len(runs)}")
    assert num_kills == KILLS
    assert live(command(runs[-1]), log) == DONE, log.read_text()[-4000:]
    for name in runs:
        assert_same_run(tmp_path / "whole", tmp_path / name)


def test_a_save_that_finds_no_room_ends_the_run_by_name_and_the_checkpoint_before_it_is_used(
    inputs: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log.txt"

    def command(name: str) -> list[str]:
        return arguments(
            inputs,
            tmp_path / name,
            "trainer.logger=[jsonl]",
            "environment.env_class=tests.entrypoints.killing:NumberedEnv",
        )

    assert live(command("whole"), log) == DONE, log.read_text()
    renamed = "a checkpoint is renamed and older ones are not yet removed"
    assert live(command("full"), log, moment=renamed) == -signal.SIGKILL
    # A checkpoint has about a megabyte; everything else that a step writes is far smaller.
    assert live(command("full"), log, max_file_bytes=400_000) == FAILED, log.read_text()
    last = log.read_text().splitlines()[-1]
    assert last.startswith("error: the checkpoint of step 4 can't be written to ") and "those of steps [2]" in last
    assert "Traceback" not in log.read_text()
    assert [path.name for path in (tmp_path / "full" / "checkpoints").iterdir()] == ["global_step_2"]
    assert live(command("full"), log) == DONE, log.read_text()
    assert_same_run(tmp_path / "whole", tmp_path / "full")


def test_a_full_disk_is_named_wherever_the_run_meets_it(inputs: Path, tmp_path: Path) -> None:
    """Here in an export of the first step: its weights have 450 kB."""
    log = tmp_path / "log.txt"
    env = "environment.env_class=tests.entrypoints.killing:NumberedEnv"
    command = arguments(inputs, tmp_path / "run", "trainer.logger=[jsonl]", "trainer.hf_save_interval=1", env)
    assert live(command, log, max_file_bytes=400_000) == FAILED, log.read_text()
    assert log.read_text().splitlines()[-1].startswith("error: there is no room for what the run writes: ")
    assert "Traceback" not in log.read_text()


def assert_same_run(whole: Path, killed: Path) -> None:
    assert trained_rows(killed) == trained_rows(whole)
    assert deterministic_metrics(killed / "metrics.jsonl") == deterministic_metrics(whole / "metrics.jsonl")
    a, b = final_weights(whole), final_weights(killed)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a), f"{killed}: weights differ"
    names = [sorted(path.name for path in (run / "checkpoints").iterdir()) for run in (whole, killed)]
    assert names[0] == names[1], "a kill leaves nothing behind in the end"


def trained_rows(run_path: Path) -> list[int]:
    """Of all steps of the run, as their rewards tell."""
    rows = []
    for step in read_metrics(run_path / "metrics.jsonl"):
        if step["step"] > 0:
            found = rows_of(step["reward/mean"], PROMPTS)
            assert len(found) == PROMPTS, (step["step"], found)
            rows += found
    return sorted(rows)
