"""Group-relative advantages against a scalar reference."""

from __future__ import annotations

import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl_train.algorithms.advantages import ADVANTAGE_ESTIMATORS, grpo


def slow_grpo(rewards: list[float], groups: list[int], by_std: bool) -> list[float]:
    """The definition, one sample at a time."""
    found = []
    for reward, group in zip(rewards, groups, strict=True):
        others = [r for r, g in zip(rewards, groups, strict=True) if g == group]
        if len(set(others)) == 1:
            found.append(0.0)
            continue
        advantage = reward - statistics.fmean(others)
        found.append(advantage / (statistics.stdev(others) + 1e-6) if by_std else advantage)
    return found


def test_four_answers_by_hand() -> None:
    rewards, groups = torch.tensor([1.0, 0, 0, 1, 5]), torch.tensor([0, 0, 0, 0, 1])
    # mean 1/2, squared distances 4 * 1/4, over n - 1 = 3: std = sqrt(1/3), advantage = 0.5 * sqrt(3)
    torch.testing.assert_close(
        grpo(rewards, groups), torch.tensor([0.866, -0.866, -0.866, 0.866, 0]), rtol=0, atol=1e-3
    )
    assert grpo(rewards, groups, grpo_norm_by_std=False).tolist() == [0.5, -0.5, -0.5, 0.5, 0.0]


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(st.floats(-10, 10, width=32), st.integers(0, 4)), min_size=1, max_size=20),
    st.booleans(),
)
def test_ragged_groups_equal_the_scalar_reference(pairs: list[tuple[float, int]], by_std: bool) -> None:
    rewards, groups = [reward for reward, _ in pairs], [group for _, group in pairs]
    found = grpo(torch.tensor(rewards), torch.tensor(groups), grpo_norm_by_std=by_std)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor(slow_grpo(rewards, groups, by_std)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("by_std", [True, False])
@pytest.mark.parametrize("reward", [0.0, 0.1, 1e9, -3.3])
def test_a_group_that_agrees_has_advantage_exactly_0(reward: float, by_std: bool) -> None:
    for size in (1, 3, 7):
        found = grpo(torch.full((size,), reward), torch.zeros(size, dtype=torch.int64), grpo_norm_by_std=by_std)
        assert found.tolist() == [0.0] * size


def test_the_order_of_samples_does_not_matter() -> None:
    rewards, groups = torch.tensor([1.0, 2, 3, 4, 5, 7]), torch.tensor([0, 1, 0, 1, 0, 1])
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    torch.testing.assert_close(grpo(rewards[order], groups[order]), grpo(rewards, groups)[order])


def test_no_samples_have_no_advantages() -> None:
    assert grpo(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0,)


def test_rewards_per_token_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must be \[B\]"):
        grpo(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))


def test_the_names_of_the_configuration_are_known() -> None:
    assert ADVANTAGE_ESTIMATORS["grpo"] is grpo
