"""What training compares where trajectories branched: the answers to one prompt, whichever search they come from.

    group of prompt 7      trajectory 7/0/0 with branches 7/0/1 7/0/2 | 7/0/3 7/0/4      (two after the prompt, two
                           trajectory 7/1/0 with branches 7/1/1 7/1/2                      after the answer 7/0/1)
    groups to train on     7/0/1 7/0/2 7/1/1 7/1/2 | 7/0/3 7/0/4

The trajectory itself, the best path, is left out: its answers are among the branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from skyrl_train.types import ScoredGroup, Trajectory


def by_branches(groups: Sequence[ScoredGroup]) -> list[ScoredGroup]:
    """The groups to train on, prompts in their order; a group without branches is itself.

    In a group with branches, a trajectory that has none is compared with those that answer the same prompt, by the
    score that the group has for it.
    """
    return [part for group in groups for part in _split(group)]


def num_sampled(trajectory: Trajectory) -> int:
    """Tokens that the policy sampled for it, branches that are not its best path included."""
    parts = trajectory.branches or (trajectory,)
    return sum(len(turn.completion.token_ids) for part in parts for turn in part.turns)


def _split(group: ScoredGroup) -> list[ScoredGroup]:
    if not any(trajectory.branches for trajectory in group.trajectories):
        return [group]
    alternatives: dict[tuple[int, ...], list[tuple[Trajectory, float]]] = {}
    for trajectory, score in zip(group.trajectories, group.rewards, strict=True):
        parts = [(branch, branch.reward) for branch in trajectory.branches] or [(trajectory, score)]
        for part, reward in parts:
            asked = part.turns[0].prompt_token_ids if part.turns else ()
            alternatives.setdefault(asked, []).append((part, reward))
    return [
        replace(group, trajectories=tuple(part for part, _ in row), rewards=tuple(reward for _, reward in row))
        for row in alternatives.values()
    ]
