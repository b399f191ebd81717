"""Lines of SGLang's export, named as the real client names them, back to trajectories, turns and attempts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from skyrl_train.engines.sglang.client import rid_of
from skyrl_train.errors import DataError
from skyrl_train.observability.request_export import ExportedRequest, by_turn, of_rollout, read_request_export
from skyrl_train.rollout.agent import request_id
from skyrl_train.types import TrajectoryId

FIRST = TrajectoryId(prompt_id="val/7 50%$#1.2", sample=2)
SECOND = TrajectoryId(prompt_id="8", sample=-1, branch=3)


def line(trajectory: TrajectoryId, turn: int, number: int, *, version: int, reason: str = "stop") -> Mapping[str, Any]:
    return {
        "request_parameters": "{}",
        "id": rid_of(f"{request_id(trajectory, turn)}#0af3c1.{number}"),
        "finish_reason": {"type": reason},
        "prompt_tokens": 10 + number,
        "cached_tokens": 4,
        "completion_tokens": 3,
        "weight_version": str(version),
        "e2e_latency": 0.5,
        "queue_time": 0.1,
    }


def write(folder: Path, *lines: Mapping[str, Any], rest: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in lines) + rest
    (folder / "sglang-request-metrics-20260101_00.log").write_text(text)
    return folder


def whose(requests: list[ExportedRequest]) -> list[tuple[str, int, int, str | None]]:
    return [(one.trajectory_id, one.turn, one.attempt, one.weight_version) for one in requests]


def test_each_line_has_its_trajectory_turn_and_attempt(tmp_path: Path) -> None:
    folder = write(
        tmp_path,
        line(SECOND, 0, 3, version=0),  # lines are in the order of answers
        line(FIRST, 0, 1, version=0),
        line(FIRST, 1, 2, version=0, reason="abort"),
        line(FIRST, 1, 4, version=1),
        line(FIRST, 1, 9, version=5),  # the next epoch
        {"id": "a-user-of-the-server", "finish_reason": {"type": "stop"}},
        rest='{"id": "cut sho',
    )
    found = read_request_export(folder)
    assert whose(found) == [
        (str(FIRST), 0, 1, "0"),
        (str(FIRST), 1, 1, "0"),
        (str(SECOND), 0, 1, "0"),
        (str(FIRST), 1, 2, "1"),
        (str(FIRST), 1, 1, "5"),
    ]
    one = found[0]
    assert (one.num_prompt_tokens, one.num_cached_tokens, one.num_generated_tokens) == (11, 4, 3)
    assert (one.e2e_latency_s, one.queue_time_s, one.finish_reason, one.engine) == (0.5, 0.1, "stop", "")


def test_a_rollout_finds_its_requests_of_its_own_versions(tmp_path: Path) -> None:
    folder = write(
        tmp_path,
        line(FIRST, 0, 1, version=0),
        line(FIRST, 1, 2, version=0, reason="abort"),
        line(FIRST, 1, 4, version=1),
        line(FIRST, 0, 8, version=5),
    )
    rollout = {
        "trajectory_id": str(FIRST),
        "turns": [
            {"versions": [{"version": 0, "start": 0, "end": 3}]},
            {"versions": [{"version": 0, "start": 0, "end": 3}, {"version": 1, "start": 3, "end": 6}]},
        ],
    }
    found = of_rollout(rollout, by_turn(read_request_export(folder)))
    assert [[one.number for one in turn] for turn in found] == [[1], [2, 4]]


def test_engines_that_write_into_folders_of_their_own_are_told_apart(tmp_path: Path) -> None:
    for number, engine in enumerate(("sglang-0", "sglang-1")):
        write(tmp_path / engine, line(FIRST, number, 1, version=0))
    assert [one.engine for one in read_request_export(tmp_path)] == ["sglang-0", "sglang-1"]


def test_a_broken_line_and_a_missing_folder_are_said(tmp_path: Path) -> None:
    folder = write(tmp_path, rest="no json\n" + json.dumps(line(FIRST, 0, 1, version=0)) + "\n")
    with pytest.raises(DataError, match="line 1"):
        read_request_export(folder)
    with pytest.raises(DataError, match="export_to_file"):
        read_request_export(tmp_path / "nowhere")
