"""Soft punishment of answers that come near their length limit. DAPO (arXiv:2503.14476), section 3.4.

    reward     0 ┤─────────────╲
                 │              ╲
      -penalty   ┤               ╲________
                 └─────────────┬─┬────────  tokens of the answer
                          L - c   L             L max_tokens, c cache_tokens

The other half of that section, leaving truncated answers out of the loss, is `ExperienceMaker.skip_truncated`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from skyrl_train.types import ScoredGroup, Trajectory


@dataclass(frozen=True, kw_only=True)
class SoftPunishment:
    """What an answer of so many tokens loses. `max_tokens` is the limit of one completion."""

    max_tokens: int
    cache_tokens: int
    penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.cache_tokens < self.max_tokens:
            raise ValueError(
                f"cache_tokens must be in (0, max_tokens), found {self.cache_tokens} with max_tokens {self.max_tokens}"
            )
        if self.penalty <= 0:
            raise ValueError(f"penalty must be > 0, found {self.penalty}")

    def of(self, num_tokens: int) -> float:
        """In [-penalty, 0]. Equation 13, times `penalty`.

        With 20 tokens at most and a cache of 4:     tokens  16  17     18    20  21
                                                     loses    0  -0.25  -0.5  -1  -1
        """
        exceeding = num_tokens - (self.max_tokens - self.cache_tokens)
        return -self.penalty * min(max(exceeding / self.cache_tokens, 0.0), 1.0)


def punish_overlong(group: ScoredGroup, punishment: SoftPunishment) -> ScoredGroup:
    """The group with rewards shaped by length; everything else as it was.

    The limit is that of a completion, so each turn is measured alone and pays where it was too long. The baseline of
    the prompt's greedy answer stays what the environment said.
    """
    shaped = [_shape(trajectory, punishment) for trajectory in group.trajectories]
    costs = [sum(cost) for _, cost in shaped]
    if not any(costs):
        return group
    return replace(
        group,
        trajectories=tuple(trajectory for trajectory, _ in shaped),
        rewards=tuple(reward + cost for reward, cost in zip(group.rewards, costs, strict=True)),
    )


def _shape(trajectory: Trajectory, punishment: SoftPunishment) -> tuple[Trajectory, list[float]]:
    costs = [punishment.of(len(turn.completion.token_ids)) for turn in trajectory.turns]
    rewards = tuple(reward + cost for reward, cost in zip(trajectory.rewards, costs, strict=True))
    return replace(trajectory, rewards=rewards), costs
