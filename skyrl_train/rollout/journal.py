"""Trajectories and completions to and from JSON, exactly: a float32 written as a Python float comes back as it was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from skyrl_train.types import Completion, Trajectory, TrajectoryId, Turn, VersionSpan

Row = dict[str, Any]


def completion_to_json(completion: Completion) -> Row:
    # An agent of the user's own may have handed on numpy's numbers, which JSON does not know.
    token_ids = [int(token) for token in completion.token_ids]
    return {**asdict(completion), "token_ids": token_ids, "logprobs": [float(x) for x in completion.logprobs]}


def completion_from_json(row: Mapping[str, Any]) -> Completion:
    return Completion(
        **{
            **row,
            "token_ids": tuple(row["token_ids"]),
            "logprobs": tuple(row["logprobs"]),
            "versions": tuple(VersionSpan(**span) for span in row["versions"]),
        }
    )


def trajectory_to_json(trajectory: Trajectory) -> Row:
    return {
        "id": asdict(trajectory.id),
        "turns": [
            {
                "prompt_token_ids": [int(token) for token in turn.prompt_token_ids],
                "completion": completion_to_json(turn.completion),
            }
            for turn in trajectory.turns
        ],
        "rewards": [float(reward) for reward in trajectory.rewards],
        "status": trajectory.status,
        "error": trajectory.error,
        "metrics": {name: float(value) for name, value in trajectory.metrics.items()},
        "branches": [trajectory_to_json(branch) for branch in trajectory.branches],
    }


def trajectory_from_json(row: Mapping[str, Any]) -> Trajectory:
    return Trajectory(
        id=TrajectoryId(**row["id"]),
        turns=tuple(
            Turn(
                prompt_token_ids=tuple(turn["prompt_token_ids"]),
                completion=completion_from_json(turn["completion"]),
            )
            for turn in row["turns"]
        ),
        rewards=tuple(row["rewards"]),
        status=row["status"],
        error=row["error"],
        metrics=row["metrics"],
        # A checkpoint of an earlier version has none.
        branches=tuple(trajectory_from_json(branch) for branch in row.get("branches", ())),
    )
