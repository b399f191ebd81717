"""An advantage estimator: the group's median as the baseline, so that one lucky answer doesn't move it."""

import torch

from skyrl_train.algorithms.advantages import AdvantageInputs


def median_baseline(inputs: AdvantageInputs, *, gamma: float = 1.0) -> torch.Tensor:
    """Score minus the group's median, less for tokens far from the answer's end. `gamma` is trainer.algorithm.gamma."""
    baselines = torch.zeros_like(inputs.scores)
    for group in inputs.group_index.unique():
        members = inputs.group_index == group
        baselines[members] = inputs.scores[members].median()
    advantages = inputs.spread(inputs.scores - baselines)
    lengths = torch.bincount(inputs.trajectory_index, minlength=len(inputs.scores))
    to_end = lengths.cumsum(0)[inputs.trajectory_index] - 1 - torch.arange(len(advantages))
    return advantages * gamma**to_end
