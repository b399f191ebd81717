"""Rewards to advantages. Pure tensor functions; add an estimator as a function and a line in `ADVANTAGE_ESTIMATORS`.

Shapes: T loss tokens of B trajectories, trajectories in order; a trajectory of several sequences has all of its
tokens in a row, in the order in which they were sampled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from skyrl_train.algorithms.normalize import normalize
from skyrl_train.algorithms.scan import scan_backwards

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
    kl_costs: torch.Tensor | None = None  # [T] float32, what the KL in the reward took off, if there is one

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
        if self.kl_costs is not None and self.kl_costs.shape != tokens:
            raise ValueError(f"kl_costs must be [T] = {tokens}, found {self.kl_costs.shape}")

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
    centred, sizes = _centred(inputs)
    if grpo_norm_by_std:
        squares = centred.new_zeros(len(sizes)).index_add_(0, inputs.group_index, centred.square())
        std = (squares / (sizes - 1).clamp_min(1)).sqrt()
        centred = centred / (std + STD_EPSILON)[inputs.group_index]
    return inputs.spread(centred.float())


def rloo(inputs: AdvantageInputs) -> torch.Tensor:
    """Score minus the mean of the group's others, the same for all tokens: [T] float32.

    REINFORCE leave-one-out, Ahmadian et al. (arXiv:2402.14740):
    A_i = r_i - sum over j != i of r_j / (k - 1), which is k / (k - 1) times the distance to the group's mean.
    A group of one has no others: its advantage is 0, not the raw score.

        scores 1 0 0 1 | 5      groups 0 0 0 0 | 1      advantages 2/3 -2/3 -2/3 2/3 | 0
    """
    centred, sizes = _centred(inputs)
    scale = sizes / (sizes - 1).clamp_min(1)
    return inputs.spread((centred * scale[inputs.group_index]).float())


def remax(inputs: AdvantageInputs) -> torch.Tensor:
    """Score minus that of the prompt's greedy answer, the same for all tokens: [T] float32.

    ReMax (arXiv:2310.10505), algorithm 1. Raises ValueError where the greedy answers are missing.
    """
    if inputs.baselines is None:
        raise ValueError("remax subtracts the score of each prompt's greedy answer, and no baselines were given")
    return inputs.spread((inputs.scores.double() - inputs.baselines.double()).float())


def reinforce_plus_plus(inputs: AdvantageInputs, *, gamma: float = 1.0) -> torch.Tensor:
    """Discounted reward-to-go of each token, normalized over the tokens of the batch: [T] float32.

    REINFORCE++ (arXiv:2501.03262): A_t = sum over u >= t of gamma^(u - t) r_u, then minus the batch's mean, over its
    deviation. There is no baseline of the prompt: one sample a prompt is enough.

        rewards 0 0 1 | 0 -1      gamma 0.5      to go 0.25 0.5 1 | -0.5 -1
    """
    return normalize(scan_backwards(inputs.rewards, inputs.trajectory_index, gamma)).float()


def reinforce_plus_plus_baseline(inputs: AdvantageInputs) -> torch.Tensor:
    """Score minus the group's mean, normalized over the tokens of the batch: [T] float32.

    The variant with a baseline of REINFORCE++ (arXiv:2501.03262): all groups share one deviation, so a group that
    nearly agrees is not blown up to the size of one that doesn't, as it is by grpo.
    """
    centred, _ = _centred(inputs)
    return normalize(inputs.spread(centred)).float()


def gae(inputs: AdvantageInputs, *, gamma: float = 1.0, lambd: float = 1.0) -> torch.Tensor:
    """Generalized advantage estimation over the tokens that the policy sampled: [T] float32.

    Schulman et al. (arXiv:1506.02438), equation 16, as a backward recursion in float64:

        delta_t = r_t + gamma V_{t+1} - V_t          A_t = delta_t + gamma lambd A_{t+1}

    "Next" is the trajectory's next sampled token: observations between turns are no actions, so they take no
    discount and no value. After the last token both are 0, also where the answer was cut off by its length.

        rewards 0 1    values 0.5 0.25    gamma 1    lambd 0.5    delta -0.25 0.75    advantages 0.125 0.75
    """
    if inputs.values is None:
        raise ValueError("gae needs the critic's values, and none were given")
    values, index = inputs.values.double(), inputs.trajectory_index
    following = torch.zeros_like(values)
    following[:-1] = torch.where(index[1:] == index[:-1], values[1:], 0.0)
    deltas = inputs.rewards.double() + gamma * following - values
    return scan_backwards(deltas, index, gamma * lambd).float()


def _centred(inputs: AdvantageInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Each score minus its group's mean [B], and the groups' sizes [num_groups]; float64."""
    scores, group_index = inputs.scores.double(), inputs.group_index
    num_groups = int(group_index.max()) + 1 if len(group_index) else 0
    sizes = torch.bincount(group_index, minlength=num_groups).double()
    means = scores.new_zeros(num_groups).index_add_(0, group_index, scores) / sizes.clamp_min(1)
    centred = scores - means[group_index]
    # Exactly 0 where the group agrees: the mean of equal floats may differ from them in the last bit.
    member = scores.new_zeros(num_groups).index_copy_(0, group_index, scores)
    num_different = scores.new_zeros(num_groups).index_add_(0, group_index, (scores != member[group_index]).double())
    return torch.where((num_different == 0)[group_index], 0.0, centred), sizes


ADVANTAGE_ESTIMATORS: dict[str, AdvantageEstimator] = {
    "grpo": grpo,
    "gae": gae,
    "rloo": rloo,
    "reinforce++": reinforce_plus_plus,
    "reinforce++_baseline": reinforce_plus_plus_baseline,
    "remax": remax,
}
