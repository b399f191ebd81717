"""A batch of prompts to scored groups: every sample of every prompt runs at once, the engine does the batching."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

from skyrl_train.errors import EnvironmentFailure
from skyrl_train.observability.tracing import span
from skyrl_train.rollout.agent import Agent, with_seed
from skyrl_train.rollout.branches import num_sampled
from skyrl_train.types import Prompt, SamplingParams, ScoredGroup, Trajectory, TrajectoryId

BASELINE = -1
"""The sample number of a prompt's greedy trajectory, which is compared with and not trained on."""


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
        turns = [len(trajectory.turns) for trajectory in trajectories]
        informative = sum(len(set(group.rewards)) > 1 for group in self.groups)
        return {
            "reward/mean": mean,
            "reward/std": (sum((reward - mean) ** 2 for reward in rewards) / count) ** 0.5,
            "reward/max": max(rewards),
            "reward/min": min(rewards),
            "reward/informative_group_frac": informative / len(self.groups),
            "rollout/num_trajectories": count,
            "rollout/num_failed": self.num_failed,
            "rollout/num_tokens": sum(map(num_sampled, trajectories)),
            "rollout/response_len_mean": sum(lengths) / count,
            "rollout/response_len_max": max(lengths),
            "rollout/prompt_len_mean": sum(prompt_lengths) / sum(turns),
            "rollout/turns_mean": sum(turns) / count,
            "rollout/turns_max": max(turns),
            "rollout/observation_len_mean": sum(map(_num_observed, trajectories)) / count,
            "rollout/truncated_frac": sum(t.status == "truncated" for t in trajectories) / count,
            "rollout/prompt_cached_frac": sum(cached) / max(sum(prompt_lengths), 1),
            **_environment_metrics(trajectories),
        }


def _num_observed(trajectory: Trajectory) -> int:
    """Tokens that the environment and the template put between the turns."""
    return sum(
        max(len(after.prompt_token_ids) - len(before.prompt_token_ids) - len(before.completion.token_ids), 0)
        for before, after in pairwise(trajectory.turns)
    )


def _environment_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """`environment/<name>`: the mean over those trajectories whose environment measured it."""
    found: dict[str, list[float]] = {}
    for trajectory in trajectories:
        for name, value in trajectory.metrics.items():
            found.setdefault(name, []).append(value)
    return {f"environment/{name}": sum(values) / len(values) for name, values in sorted(found.items())}


async def run_groups(
    agent: Agent,
    prompts: Sequence[Prompt],
    *,
    num_samples: int,
    sampling: SamplingParams,
    run_seed: int,
    max_failed_frac: float = 0.0,
    greedy_baseline: bool = False,
) -> Rollouts:
    """`num_samples` trajectories for each prompt, in the prompts' order whatever finished first.

    `greedy_baseline` adds one greedy trajectory a prompt, whose reward becomes the group's `baseline`.
    Raises EnvironmentFailure when more than `max_failed_frac` of the trajectories failed, naming the first.
    """
    # A TaskGroup: if the engine fails one trajectory, the others are cancelled and their requests aborted.
    tasks: list[list[asyncio.Task[Trajectory]]] = []
    async with asyncio.TaskGroup() as group:
        for prompt in prompts:
            runs = group_runs(agent, prompt, num_samples, sampling, run_seed, greedy_baseline=greedy_baseline)
            tasks.append([group.create_task(run()) for _, run in runs])
    return sort_out([*zip(prompts, ([task.result() for task in row] for row in tasks), strict=True)], max_failed_frac)


Run = Callable[[], Coroutine[Any, Any, Trajectory]]


def group_runs(
    agent: Agent,
    prompt: Prompt,
    num_samples: int,
    sampling: SamplingParams,
    run_seed: int,
    *,
    greedy_baseline: bool = False,
) -> list[tuple[TrajectoryId, Run]]:
    """The trajectories of one prompt, not yet started; the greedy one, if any, last and under sample BASELINE."""
    prompt_token_ids = agent.render(prompt)
    runs: list[tuple[TrajectoryId, Run]] = []
    for sample in [*range(num_samples), *([BASELINE] if greedy_baseline else [])]:
        trajectory_id = TrajectoryId(prompt_id=prompt.prompt_id, sample=sample)
        asked = replace(sampling, temperature=0.0) if sample == BASELINE else sampling
        seeded = with_seed(asked, run_seed, trajectory_id)
        runs.append((trajectory_id, partial(_run, agent, trajectory_id, prompt, prompt_token_ids, seeded)))
    return runs


async def _run(
    agent: Agent,
    trajectory_id: TrajectoryId,
    prompt: Prompt,
    prompt_token_ids: tuple[int, ...],
    sampling: SamplingParams,
) -> Trajectory:
    with span("trajectory", trajectory_id=str(trajectory_id), environment=prompt.environment):
        return await agent.run(trajectory_id, prompt, prompt_token_ids, sampling)


def sort_out(rows: Sequence[tuple[Prompt, Sequence[Trajectory]]], max_failed_frac: float) -> Rollouts:
    """Finished trajectories to scored groups and failed ones. Raises EnvironmentFailure, as `run_groups`."""
    groups: list[ScoredGroup] = []
    failed: list[ScoredGroup] = []
    for prompt, row in rows:
        greedy = next((t for t in row if t.id.sample == BASELINE), None)
        for part, has_failed in ((groups, False), (failed, True)):
            chosen = tuple(t for t in row if t is not greedy and (t.status == "failed") is has_failed)
            if chosen:
                part.append(
                    ScoredGroup(
                        prompt=prompt,
                        trajectories=chosen,
                        rewards=tuple(t.reward for t in chosen),
                        # A greedy answer that failed has no reward to compare with: that of a wrong answer.
                        baseline=None if greedy is None else greedy.reward,
                    )
                )
    rollouts = Rollouts(groups=tuple(groups), failed=tuple(failed))
    total = sum(len(row) for _, row in rows)
    if rollouts.num_failed > max_failed_frac * total or not groups:
        first = failed[0].trajectories[0]
        raise EnvironmentFailure(
            f"{rollouts.num_failed} of {total} trajectories failed (environment.max_failed_frac allows "
            f"{max_failed_frac:g}); first: {first.id}: {first.error}"
        )
    return rollouts
