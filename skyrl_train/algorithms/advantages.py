"""Rewards to advantages. Pure tensor functions; add an estimator as a function and a line in `ADVANTAGE_ESTIMATORS`.

Shapes: B trajectories. `group_index` [B] int64 numbers the prompt that each answers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

STD_EPSILON = 1e-6


def grpo(rewards: torch.Tensor, group_index: torch.Tensor, *, grpo_norm_by_std: bool = True) -> torch.Tensor:
    """Reward minus the group's mean, over the group's standard deviation: [B] float32.

    DeepSeekMath (arXiv:2402.03300), section 4.1.2: A_i = (r_i - mean(r)) / std(r), std over n - 1.
    Without `grpo_norm_by_std` it is Dr. GRPO's (arXiv:2503.20783), section 3.2: A_i = r_i - mean(r).
    A group whose rewards are all equal, a group of one included, has advantage 0: it compares nothing.

        rewards 1 0 0 1 | 5      groups 0 0 0 0 | 1      advantages 0.866 -0.866 -0.866 0.866 | 0
    """
    if rewards.shape != group_index.shape or rewards.dim() != 1:
        raise ValueError(f"rewards and group_index must be [B], found {rewards.shape} and {group_index.shape}")
    rewards = rewards.double()
    num_groups = int(group_index.max()) + 1 if len(group_index) else 0
    sizes = torch.bincount(group_index, minlength=num_groups).double()
    means = rewards.new_zeros(num_groups).index_add_(0, group_index, rewards) / sizes.clamp_min(1)
    centred = rewards - means[group_index]
    # Exactly 0 where the group agrees: the mean of equal floats may differ from them in the last bit.
    member = rewards.new_zeros(num_groups).index_copy_(0, group_index, rewards)
    num_different = rewards.new_zeros(num_groups).index_add_(0, group_index, (rewards != member[group_index]).double())
    centred = torch.where((num_different == 0)[group_index], 0.0, centred)
    if grpo_norm_by_std:
        squares = rewards.new_zeros(num_groups).index_add_(0, group_index, centred.square())
        std = (squares / (sizes - 1).clamp_min(1)).sqrt()
        centred = centred / (std + STD_EPSILON)[group_index]
    return centred.float()


ADVANTAGE_ESTIMATORS: dict[str, Callable[..., torch.Tensor]] = {"grpo": grpo}
