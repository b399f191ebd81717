"""Trajectories and completions to and from JSON, exactly: a float32 written as a Python float comes back as it was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from skyrl_train.types import Completion, Trajectory, TrajectoryId, Turn, VersionSpan

Row = dict[str, Any]


def completion_to_json(completion: Completion) -> Row:
    return {**asdict(completion), "token_ids": list(completion.token_ids), "logprobs": list(completion.logprobs)}


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
            {"prompt_token_ids": list(turn.prompt_token_ids), "completion": completion_to_json(turn.completion)}
            for turn in trajectory.turns
        ],
        "rewards": list(trajectory.rewards),
        "status": trajectory.status,
        "error": trajectory.error,
        "metrics": dict(trajectory.metrics),
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
    )
