from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from skyrl_train.observability.rollouts import RolloutLog, rollout_files, shown_samples
from skyrl_train.types import Completion, Prompt, ScoredGroup, Trajectory, TrajectoryId, Turn, VersionSpan

from .synthetic_run import arithmetic_groups, decode, encode, make_completion, make_group, make_trajectory


def lines(path: Path | None) -> list[dict[str, Any]]:
    assert path is not None
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_says_what_went_in_what_came_out_and_what_it_was_worth(tmp_path: Path) -> None:
    group = make_group("7", "12+7=", ["19", "18"], [1.0, 0.0], target="19")
    log = RolloutLog(tmp_path, decode)
    path = log.write(10, [group], advantages={TrajectoryId(prompt_id="7", sample=0): 0.5})
    assert path == tmp_path / "step_000010.jsonl"
    first, second = lines(path)
    assert first == {
        "step": 10,
        "kind": "train",
        "trajectory_id": "7/0/0",
        "environment": "arithmetic",
        "target": "19",
        "prompt": [{"role": "user", "content": "12+7="}],
        "response": "19",
        "reward": 1.0,
        "advantage": 0.5,
        "status": "completed",
        "error": None,
        "finish_reason": "stop",
        "num_response_tokens": 2,
        "versions": [{"version": 0, "start": 0, "end": 2}],
        "turns": [
            {
                "observation": None,
                "response": "19",
                "reward": 1.0,
                "finish_reason": "stop",
                "num_cached_tokens": 0,
                "versions": [{"version": 0, "start": 0, "end": 2}],
                "tokens": ["1", "9"],
                "token_ids": [49, 57],
                "logprobs": [-0.25, -0.25],
            }
        ],
    }
    assert (second["trajectory_id"], second["response"], second["advantage"]) == ("7/1/0", "18", None)


def test_observations_between_turns_are_told_apart_from_what_the_model_said(tmp_path: Path) -> None:
    first = Turn(prompt_token_ids=encode("Q:"), completion=make_completion("call", version=3))
    second = Turn(prompt_token_ids=encode("Q:call[42]"), completion=make_completion("done", version=4))
    edited = Turn(prompt_token_ids=encode("short"), completion=make_completion("end", version=4))
    trajectory = Trajectory(
        id=TrajectoryId(prompt_id="1", sample=0),
        turns=(first, second, edited),
        rewards=(0.0, 0.5, 0.5),
        status="completed",
    )
    prompt = Prompt(prompt_id="1", messages=({"role": "user", "content": "Q:"},), environment="tool")
    log = RolloutLog(tmp_path, decode, tokens=False)
    record = log.record(1, prompt, trajectory, reward=1.0)
    assert [turn["observation"] for turn in record["turns"]] == [None, "[42]", "short"]
    assert record["response"] == "calldoneend"
    assert record["versions"] == [
        {"version": 3, "start": 0, "end": 4},
        {"version": 4, "start": 4, "end": 8},
        {"version": 4, "start": 8, "end": 11},
    ]
    assert "token_ids" not in record["turns"][0]


def test_whole_groups_are_kept_up_to_the_limit_and_failures_always(tmp_path: Path) -> None:
    groups = [make_group(str(g), "1+1=", ["2"] * 4, [1.0] * 4) for g in range(5)]
    failed = Trajectory(
        id=TrajectoryId(prompt_id="9", sample=0), turns=(), rewards=(), status="failed", error="ValueError: no number"
    )
    kept = lines(RolloutLog(tmp_path, decode, max_trajectories=10).write(1, groups, failed=[failed]))
    assert [record["trajectory_id"] for record in kept] == [f"{g}/{s}/0" for g in (0, 1) for s in range(4)] + ["9/0/0"]
    assert (kept[-1]["error"], kept[-1]["reward"], kept[-1]["prompt"]) == ("ValueError: no number", None, None)


def test_a_group_larger_than_the_limit_is_kept_whole_when_it_is_the_first(tmp_path: Path) -> None:
    groups = [make_group(str(g), "1+1=", ["2"] * 4, [1.0] * 4) for g in range(2)]
    assert len(lines(RolloutLog(tmp_path, decode, max_trajectories=2).write(1, groups))) == 4


def test_the_first_every_nth_and_the_last_step_are_written(tmp_path: Path) -> None:
    log = RolloutLog(tmp_path, decode, every_steps=4, total_steps=10)
    group = make_group("1", "1+1=", ["2"], [1.0])
    written = [step for step in range(1, 11) if log.write(step, [group]) is not None]
    assert written == [1, 4, 8, 10]
    assert log.write(3, [group], kind="eval") == tmp_path / "eval_000003.jsonl"
    assert [(kind, step) for kind, step, _ in rollout_files(tmp_path)] == [
        ("train", 1),
        ("eval", 3),
        ("train", 4),
        ("train", 8),
        ("train", 10),
    ]


def test_a_resume_removes_the_steps_that_will_be_done_again(tmp_path: Path) -> None:
    group = make_group("1", "1+1=", ["2"], [1.0])
    log = RolloutLog(tmp_path, decode)
    for step in range(1, 6):
        log.write(step, [group])
    (tmp_path / "notes.jsonl").write_text("mine")
    RolloutLog(tmp_path, decode, resume_step=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "notes.jsonl",
        "step_000001.jsonl",
        "step_000002.jsonl",
        "step_000003.jsonl",
    ]


def test_the_same_rollouts_make_the_same_bytes(tmp_path: Path) -> None:
    paths = []
    for name in ("a", "b"):
        groups = arithmetic_groups(random.Random(5), 1, 0.5)
        paths.append(RolloutLog(tmp_path / name, decode).write(1, groups))
    a, b = paths
    assert a is not None and b is not None
    assert a.read_bytes() == b.read_bytes()


def test_odd_text_and_odd_targets_are_written_as_json_that_reads_back(tmp_path: Path) -> None:
    emoji = "\N{GRINNING FACE}".encode()
    completion = Completion(
        request_id="r",
        token_ids=tuple(emoji[:2]),
        logprobs=(float("-inf"), -0.1),
        finish_reason="length",
        versions=(VersionSpan(version=0, start=0, end=2),),
    )
    trajectory = Trajectory(
        id=TrajectoryId(prompt_id="</script>", sample=0),
        turns=(Turn(prompt_token_ids=(1,), completion=completion),),
        rewards=(0.0,),
        status="truncated",
    )
    prompt = Prompt(
        prompt_id="x",
        messages=({"role": "user", "content": "line\u2028break \ud83d half"},),
        environment="e",
        target={"value": float("nan"), "path": Path("a"), "set": (1, None)},
    )
    group = ScoredGroup(prompt=prompt, trajectories=(trajectory,), rewards=(0.0,))

    def decode_with_surrogates(token_ids: Any) -> str:
        return bytes(token_ids).decode(errors="surrogateescape")

    path = RolloutLog(tmp_path, decode_with_surrogates).write(1, [group])
    assert path is not None
    # One line by the newline alone: U+2028 is text.
    (line,) = path.read_text(encoding="utf-8").split("\n")[:-1]
    record = json.loads(line, parse_constant=pytest.fail)
    assert record["target"] == {"value": "nan", "path": "a", "set": [1, None]}
    assert record["turns"][0]["logprobs"] == [None, -0.1]
    assert record["response"] == "\udcf0\udc9f"
    assert record["prompt"][0]["content"] == "line\u2028break \ud83d half"


def test_samples_for_the_live_view_are_spread_over_the_batch() -> None:
    groups = [make_group(str(g), f"{g}+1=", [str(g + 1)], [float(g % 2)]) for g in range(8)]
    shown = shown_samples(groups, decode, limit=4)
    assert [(s.prompt, s.response, s.reward) for s in shown] == [
        ("0+1=", "1", 0.0),
        ("2+1=", "3", 0.0),
        ("4+1=", "5", 0.0),
        ("6+1=", "7", 0.0),
    ]
    assert shown_samples([], decode) == ()
    assert len(shown_samples(groups[:1], decode, limit=4)) == 1
    assert make_trajectory("1", 0, "q", "a", 1.0).reward == 1.0
