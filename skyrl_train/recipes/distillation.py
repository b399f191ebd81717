"""On-policy distillation: the student samples, the teacher scores each token that it sampled.

The main job is all that it takes, with the teacher as the reference model (examples/recipes/distillation.yaml):

    student's tokens ──► log-probabilities of student and teacher ──► advantage_t = log q_t - log p_t ──► policy loss

Agarwal et al., "On-Policy Distillation of Language Models" (GKD, arXiv:2306.13649), on the student's own samples
(lambda = 1) with the reverse KL as the divergence; its gradient is the policy's, one token ahead (discount 0), as in
Thinking Machines, "On-Policy Distillation" (2025). The environment's reward is logged, and nothing is learned from it.
"""

from __future__ import annotations

import torch

from skyrl_train.algorithms.advantages import AdvantageInputs


def reverse_kl(inputs: AdvantageInputs) -> torch.Tensor:
    """log q_t - log p_t of each sampled token [T]: q is the teacher's, p the student's before the update.

    It is minus what `use_kl_in_reward` takes off the rewards with kl_estimator_type=k1 and kl_loss_coef=1, and its mean
    over tokens is minus the metric `reward/kl_mean`: the reverse KL per token, which training lowers.
    Raises ValueError where no KL is taken off.

        student log p  -1 -0.5     teacher log q  -0.2 -3     advantages  0.8 -2.5
    """
    if inputs.kl_costs is None:
        raise ValueError("reverse_kl distils from a reference model: set trainer.algorithm.use_kl_in_reward=true")
    return -inputs.kl_costs
