"""A batch of samples and the objectives that the trainer's tests share."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from skyrl_train.algorithms.kl import k3
from skyrl_train.algorithms.objective import PolicyObjective
from skyrl_train.algorithms.policy_losses import ppo_clip
from skyrl_train.algorithms.reductions import token_mean
from skyrl_train.types import TrainingSample
from tests.training.batches import make_samples


@pytest.fixture
def samples() -> Sequence[TrainingSample]:
    return make_samples()


@pytest.fixture
def objective() -> PolicyObjective:
    """PPO clip, mean over tokens, with an entropy bonus and no reference."""
    return PolicyObjective(policy_loss=ppo_clip, reduction=token_mean, entropy_loss_coef=0.01)


@pytest.fixture
def objective_with_kl() -> PolicyObjective:
    return PolicyObjective(policy_loss=ppo_clip, reduction=token_mean, kl=k3, kl_loss_coef=0.1, entropy_loss_coef=0.01)
