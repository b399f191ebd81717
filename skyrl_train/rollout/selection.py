"""Which rollouts become training data, and drawing further prompts until there are enough.

    off       batch ──────────────────────────────────► [soft punishment] ─► [zero-variance filter] ─► groups
    filter    batch, batch, ... until enough are mixed ──► (the same)
    replace   batch ─► copies of mixed groups in the place of uniform ones ──► (the same)

A group is mixed when its trajectories' scores differ: only then does a comparison say anything. Dynamic sampling looks
at the scores that the environment gave, as DAPO does with right and wrong; the zero-variance filter comes last and
looks at what the estimator will compare. Nothing waits here from one step to the next, so selecting makes no rollout
older and a checkpoint holds nothing of it: groups beyond the batch are dropped, and counted like all that is.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from skyrl_train.errors import SelectionError
from skyrl_train.rollout.groups import Rollouts
from skyrl_train.rollout.overlong import SoftPunishment, punish_overlong
from skyrl_train.types import Prompt, ScoredGroup, Trajectory

TOLERANCE = 1e-6
"""Scores closer than this, relative to the larger or to 1, are one score with rounding in it."""

RollOut = Callable[[Sequence[Prompt]], Awaitable[Rollouts]]


@dataclass(frozen=True, kw_only=True)
class DynamicSampling:
    """DAPO (arXiv:2503.14476), section 3.2: every group of a batch has answers of different score.

    `filter` draws until `batch_size` groups are mixed. `replace` draws until `min_replace_ratio` of the batch is (one
    group at least) and fills the rest with copies. After `max_batches` for one step the run ends in SelectionError.
    """

    type: Literal["filter", "replace"]
    max_batches: int
    min_replace_ratio: float = 0.0

    def num_wanted(self, batch_size: int) -> int:
        """Mixed groups that end the drawing."""
        if self.type == "filter":
            return batch_size
        # Rounded first: 0.3 * 10 is a little more than 3.
        return max(1, math.ceil(round(self.min_replace_ratio * batch_size, 6)))


@dataclass(frozen=True, kw_only=True)
class Selected:
    """What a step learns from, `groups`, out of all that was rolled out for it, `rollouts`, as it was scored.

    `metrics` count under `selection/` what was left out, copied or shaped; empty where nothing is switched on.
    """

    groups: tuple[ScoredGroup, ...]
    rollouts: Rollouts
    metrics: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The settings; without state. `batch_size` counts groups of a step, `seed` is the run's."""

    batch_size: int
    dynamic_sampling: DynamicSampling | None = None
    zero_variance_filter: bool = False
    punishment: SoftPunishment | None = None
    seed: int = 0

    @property
    def draws_one_batch(self) -> bool:
        """Whether each step takes exactly one batch of prompts."""
        return self.dynamic_sampling is None

    async def draw(self, roll_out: RollOut, next_prompts: Callable[[], list[Prompt]]) -> Selected:
        """One step's groups; `groups` may be empty with the zero-variance filter alone.

        Raises SelectionError when dynamic sampling does not find enough.
        """
        metrics: dict[str, float] = {}
        if self.dynamic_sampling is None:
            rollouts = await roll_out(next_prompts())
            groups = rollouts.groups
        else:
            groups, rollouts, metrics = await self._draw_mixed(self.dynamic_sampling, roll_out, next_prompts)
        if self.punishment is not None:
            groups, shaping = _punish(groups, self.punishment)
            metrics |= shaping
        if self.zero_variance_filter:
            left = tuple(group for group in groups if is_mixed(group))
            metrics["selection/num_zero_variance_dropped"] = len(groups) - len(left)
            groups = left
        if metrics:
            metrics["selection/num_groups"] = len(groups)
        return Selected(groups=groups, rollouts=rollouts, metrics=metrics)

    async def _draw_mixed(
        self, sampling: DynamicSampling, roll_out: RollOut, next_prompts: Callable[[], list[Prompt]]
    ) -> tuple[tuple[ScoredGroup, ...], Rollouts, dict[str, float]]:
        wanted = sampling.num_wanted(self.batch_size)
        batches: list[Rollouts] = []
        mixed: list[ScoredGroup] = []
        while len(mixed) < wanted:
            if len(batches) == sampling.max_batches:
                raise SelectionError(
                    f"dynamic sampling ({sampling.type}) found {len(mixed)} groups with different rewards among "
                    f"{sum(len(batch.groups) for batch in batches)} in {len(batches)} batches, and wants {wanted} for "
                    "a step: the task is too easy or too hard for the policy; raise "
                    "trainer.algorithm.dynamic_sampling.max_sample_batches or generator.n_samples_per_prompt, or "
                    "change the data"
                )
            batches.append(await roll_out(next_prompts()))
            mixed += [group for group in batches[-1].groups if is_mixed(group)]
        rollouts = joined(batches)
        kept = tuple(mixed[: self.batch_size])
        groups = with_copies(kept, self.batch_size, seed=self.seed) if sampling.type == "replace" else kept
        return (
            groups,
            rollouts,
            {
                "selection/num_batches_drawn": len(batches),
                "selection/num_groups_drawn": len(rollouts.groups),
                "selection/num_uniform_dropped": len(rollouts.groups) - len(mixed),
                "selection/num_surplus_dropped": len(mixed) - len(kept),
                "selection/num_copies": len(groups) - len(kept),
            },
        )


def is_mixed(group: ScoredGroup) -> bool:
    """Whether the trajectories' scores differ by more than rounding; a group of one doesn't."""
    low, high = min(group.rewards), max(group.rewards)
    return high - low > TOLERANCE * max(1.0, abs(low), abs(high))


def joined(batches: Sequence[Rollouts]) -> Rollouts:
    """Several batches as one, in order."""
    return Rollouts(
        groups=tuple(group for batch in batches for group in batch.groups),
        failed=tuple(group for batch in batches for group in batch.failed),
    )


def with_copies(groups: Sequence[ScoredGroup], batch_size: int, *, seed: int) -> tuple[ScoredGroup, ...]:
    """`groups`, at least one, filled up to `batch_size` with copies of them, each copied equally often up to one.

    Which are copied once more depends on `seed` and the groups' names alone: a resumed run takes the same.

        groups a b c, batch_size 5, drawn b a         a b c b#1 a#1
    """
    names = "/".join(group.prompt.prompt_id for group in groups)
    digest = hashlib.blake2b(f"{seed}/{names}".encode(), digest_size=8).digest()
    generator = random.Random(int.from_bytes(digest, "little"))
    result = list(groups)
    number = 0
    while len(result) < batch_size:
        number += 1
        chosen = generator.sample(groups, k=min(len(groups), batch_size - len(result)))
        result += [_copy(group, number) for group in chosen]
    return tuple(result)


def _copy(group: ScoredGroup, number: int) -> ScoredGroup:
    """The same group under a name of its own, `<prompt_id>#<number>`: what is joined by prompt must not join them."""
    name = f"{group.prompt.prompt_id}#{number}"
    return replace(
        group,
        prompt=replace(group.prompt, prompt_id=name),
        trajectories=tuple(_renamed(t, name) for t in group.trajectories),
    )


def _renamed(trajectory: Trajectory, prompt_id: str) -> Trajectory:
    branches = tuple(_renamed(branch, prompt_id) for branch in trajectory.branches)
    return replace(trajectory, id=replace(trajectory.id, prompt_id=prompt_id), branches=branches)


def _punish(
    groups: Sequence[ScoredGroup], punishment: SoftPunishment
) -> tuple[tuple[ScoredGroup, ...], dict[str, float]]:
    shaped = tuple(punish_overlong(group, punishment) for group in groups)
    costs = [
        after - before
        for old, new in zip(groups, shaped, strict=True)
        for before, after in zip(old.rewards, new.rewards, strict=True)
    ]
    return shaped, {
        "selection/num_overlong_punished": sum(cost < 0 for cost in costs),
        "selection/overlong_punishment_mean": sum(costs) / max(len(costs), 1),
    }
