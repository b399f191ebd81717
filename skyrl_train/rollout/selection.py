"""Which rollouts a step learns from: all of one batch, or what filters and further draws make of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from skyrl_train.rollout.groups import Rollouts
from skyrl_train.types import Prompt, ScoredGroup


@dataclass(frozen=True, kw_only=True)
class Selected:
    """`groups` to learn from, out of all that was rolled out for the step; `metrics` count what was left out."""

    groups: tuple[ScoredGroup, ...]
    rollouts: Rollouts
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TakeAll:
    """One batch of prompts, every group of it."""

    draws_one_batch: bool = True

    async def draw(
        self,
        roll_out: Callable[[Sequence[Prompt]], Awaitable[Rollouts]],
        next_prompts: Callable[[], list[Prompt]],
    ) -> Selected:
        rollouts = await roll_out(next_prompts())
        return Selected(groups=rollouts.groups, rollouts=rollouts)
