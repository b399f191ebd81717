"""Rewards to advantages. Pure tensor functions; add an estimator as a function and a line in `ADVANTAGE_ESTIMATORS`.

Shapes: T loss tokens of B trajectories, trajectories in order; a trajectory of several sequences has all of its
tokens in a row, in the order in which they were sampled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

STD_EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True, eq=False)
class AdvantageInputs:
    """What an estimator may look at. Two trajectories of one prompt, the first with two turns, then another prompt:

        rewards           0 .5  0  1 |  0  0 |  1        trajectory_index  0 0 0 0 1 1 2
        scores            1.5           0       1        group_index       0 0 1

    `rewards` stand at the last token of the turn that earned them; a KL in the reward is already subtracted, from
    `scores` too. `scores` are what group-relative estimators compare: a trajectory without a loss token has one.
    """

    rewards: torch.Tensor  # [T] float32
    scores: torch.Tensor  # [B] float32
    trajectory_index: torch.Tensor  # [T] int64, rising
    group_index: torch.Tensor  # [B] int64, numbers the prompt that each answers
    values: torch.Tensor | None = None  # [T] float32, the critic's, before the update
    baselines: torch.Tensor | None = None  # [B] float32, the score of the prompt's greedy answer

    def __post_init__(self) -> None:
        tokens, trajectories = self.rewards.shape, self.scores.shape
        if len(tokens) != 1 or self.trajectory_index.shape != tokens:
            raise ValueError(f"rewards and trajectory_index must be [T], found {tokens}, {self.trajectory_index.shape}")
        if len(trajectories) != 1 or self.group_index.shape != trajectories:
            raise ValueError(f"scores and group_index must be [B], found {trajectories}, {self.group_index.shape}")
        if self.values is not None and self.values.shape != tokens:
            raise ValueError(f"values must be [T] = {tokens}, found {self.values.shape}")
        if self.baselines is not None and self.baselines.shape != trajectories:
            raise ValueError(f"baselines must be [B] = {trajectories}, found {self.baselines.shape}")

    def spread(self, per_trajectory: torch.Tensor) -> torch.Tensor:
        """[B] -> [T]: every token carries its trajectory's number."""
        return per_trajectory[self.trajectory_index]


AdvantageEstimator = Callable[..., torch.Tensor]
"""`f(inputs, **options it names) -> advantages [T] float32`."""


def grpo(inputs: AdvantageInputs, *, grpo_norm_by_std: bool = True) -> torch.Tensor:
    """Score minus the group's mean, over the group's standard deviation, the same for all tokens: [T] float32.

    DeepSeekMath (arXiv:2402.03300), section 4.1.2: A_i = (r_i - mean(r)) / std(r), std over n - 1.
    Without `grpo_norm_by_std` it is Dr. GRPO's (arXiv:2503.20783), section 3.2: A_i = r_i - mean(r).
    A group whose scores are all equal, a group of one included, has advantage 0: it compares nothing.

        scores 1 0 0 1 | 5      groups 0 0 0 0 | 1      advantages 0.866 -0.866 -0.866 0.866 | 0
    """
    scores, group_index = inputs.scores.double(), inputs.group_index
    num_groups = int(group_index.max()) + 1 if len(group_index) else 0
    sizes = torch.bincount(group_index, minlength=num_groups).double()
    means = scores.new_zeros(num_groups).index_add_(0, group_index, scores) / sizes.clamp_min(1)
    centred = scores - means[group_index]
    # Exactly 0 where the group agrees: the mean of equal floats may differ from them in the last bit.
    member = scores.new_zeros(num_groups).index_copy_(0, group_index, scores)
    num_different = scores.new_zeros(num_groups).index_add_(0, group_index, (scores != member[group_index]).double())
    centred = torch.where((num_different == 0)[group_index], 0.0, centred)
    if grpo_norm_by_std:
        squares = scores.new_zeros(num_groups).index_add_(0, group_index, centred.square())
        std = (squares / (sizes - 1).clamp_min(1)).sqrt()
        centred = centred / (std + STD_EPSILON)[group_index]
    return inputs.spread(centred.float())


ADVANTAGE_ESTIMATORS: dict[str, AdvantageEstimator] = {"grpo": grpo}
