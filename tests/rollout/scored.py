"""Scored groups for the tests of selection, from rewards and lengths."""

from __future__ import annotations

from collections.abc import Sequence

from skyrl_train.rollout.groups import Rollouts
from skyrl_train.types import Completion, Prompt, ScoredGroup, Trajectory, TrajectoryId, Turn, VersionSpan


def turn(num_tokens: int, *, name: str = "r") -> Turn:
    return Turn(
        prompt_token_ids=(1, 2),
        completion=Completion(
            request_id=name,
            token_ids=(3,) * num_tokens,
            logprobs=(-0.5,) * num_tokens,
            finish_reason="stop",
            versions=(VersionSpan(version=0, start=0, end=num_tokens),) if num_tokens else (),
        ),
    )


def group(
    name: str,
    *scores: float | Sequence[float],
    lengths: Sequence[Sequence[int]] | None = None,
    failed: bool = False,
    baseline: float | None = None,
) -> ScoredGroup:
    """One trajectory a score; a sequence of scores is one a turn. Turns have one token unless `lengths` says."""
    rewards = [(score,) if isinstance(score, int | float) else tuple(score) for score in scores]
    sizes = lengths or [[1] * len(turns) for turns in rewards]
    trajectories = tuple(
        Trajectory(
            id=TrajectoryId(prompt_id=name, sample=k),
            turns=tuple(turn(size, name=f"{name}/{k}/0") for size in sizes[k]),
            rewards=turns,
            status="failed" if failed else "completed",
            metrics={"sample": k},
        )
        for k, turns in enumerate(rewards)
    )
    return ScoredGroup(
        prompt=Prompt(prompt_id=name, messages=({"role": "user", "content": name},), environment="e", target=name),
        trajectories=trajectories,
        rewards=tuple(trajectory.reward for trajectory in trajectories),
        baseline=baseline,
    )


def rollouts(*groups: ScoredGroup, failed: Sequence[ScoredGroup] = ()) -> Rollouts:
    return Rollouts(groups=groups, failed=tuple(failed))
