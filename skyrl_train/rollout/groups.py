"""A batch of prompts to scored groups: every sample of every prompt runs at once, the engine does the batching."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from skyrl_train.errors import EnvironmentFailure
from skyrl_train.rollout.agent import Agent, with_seed
from skyrl_train.types import Prompt, SamplingParams, ScoredGroup, Trajectory, TrajectoryId


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """What one batch of prompts became. Trajectories that failed are in `failed` by prompt, never in `groups`."""

    groups: tuple[ScoredGroup, ...]
    failed: tuple[ScoredGroup, ...]

    @property
    def trajectories(self) -> list[Trajectory]:
        """All that can be trained on, in order."""
        return [trajectory for group in self.groups for trajectory in group.trajectories]

    @property
    def num_failed(self) -> int:
        return sum(len(group.trajectories) for group in self.failed)

    def metrics(self) -> dict[str, float]:
        """Reward and length figures of the batch."""
        trajectories = self.trajectories
        rewards = [trajectory.reward for trajectory in trajectories]
        lengths = [len(turn.completion.token_ids) for t in trajectories for turn in t.turns]
        prompt_lengths = [len(turn.prompt_token_ids) for t in trajectories for turn in t.turns]
        cached = [turn.completion.num_cached_tokens for t in trajectories for turn in t.turns]
        count = len(trajectories)
        mean = sum(rewards) / count
        informative = sum(len(set(group.rewards)) > 1 for group in self.groups)
        return {
            "reward/mean": mean,
            "reward/std": (sum((reward - mean) ** 2 for reward in rewards) / count) ** 0.5,
            "reward/max": max(rewards),
            "reward/min": min(rewards),
            "reward/informative_group_frac": informative / len(self.groups),
            "rollout/num_trajectories": count,
            "rollout/num_failed": self.num_failed,
            "rollout/num_tokens": sum(lengths),
            "rollout/response_len_mean": sum(lengths) / count,
            "rollout/response_len_max": max(lengths),
            "rollout/prompt_len_mean": sum(prompt_lengths) / count,
            "rollout/truncated_frac": sum(t.status == "truncated" for t in trajectories) / count,
            "rollout/prompt_cached_frac": sum(cached) / max(sum(prompt_lengths), 1),
        }


async def run_groups(
    agent: Agent,
    prompts: Sequence[Prompt],
    *,
    num_samples: int,
    sampling: SamplingParams,
    run_seed: int,
    max_failed_frac: float = 0.0,
) -> Rollouts:
    """`num_samples` trajectories for each prompt, in the prompts' order whatever finished first.

    Raises EnvironmentFailure when more than `max_failed_frac` of the trajectories failed, naming the first.
    """

    async def run(prompt: Prompt, prompt_token_ids: tuple[int, ...], sample: int) -> Trajectory:
        trajectory_id = TrajectoryId(prompt_id=prompt.prompt_id, sample=sample)
        return await agent.run(trajectory_id, prompt, prompt_token_ids, with_seed(sampling, run_seed, trajectory_id))

    # A TaskGroup: if the engine fails one trajectory, the others are cancelled and their requests aborted.
    tasks: list[list[asyncio.Task[Trajectory]]] = []
    async with asyncio.TaskGroup() as group:
        for prompt in prompts:
            prompt_token_ids = agent.render(prompt)
            tasks.append([group.create_task(run(prompt, prompt_token_ids, k)) for k in range(num_samples)])

    groups: list[ScoredGroup] = []
    failed: list[ScoredGroup] = []
    for prompt, row in zip(prompts, tasks, strict=True):
        trajectories = [task.result() for task in row]
        for part, has_failed in ((groups, False), (failed, True)):
            chosen = tuple(t for t in trajectories if (t.status == "failed") is has_failed)
            if chosen:
                part.append(ScoredGroup(prompt=prompt, trajectories=chosen, rewards=tuple(t.reward for t in chosen)))
    rollouts = Rollouts(groups=tuple(groups), failed=tuple(failed))
    total = len(prompts) * num_samples
    if rollouts.num_failed > max_failed_frac * total or not groups:
        first = failed[0].trajectories[0]
        raise EnvironmentFailure(
            f"{rollouts.num_failed} of {total} trajectories failed (environment.max_failed_frac allows "
            f"{max_failed_frac:g}); first: {first.id}: {first.error}"
        )
    return rollouts
