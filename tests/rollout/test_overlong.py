"""DAPO's soft punishment by length, and what it leaves alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyrl_train.rollout.overlong import SoftPunishment, punish_overlong
from skyrl_train.rollout.samples import make_sequences
from tests.rollout.scored import group


def slow_punishment(num_tokens: int, max_tokens: int, cache_tokens: int) -> float:
    """Equation 13, case by case."""
    if num_tokens <= max_tokens - cache_tokens:
        return 0.0
    if num_tokens <= max_tokens:
        return ((max_tokens - cache_tokens) - num_tokens) / cache_tokens
    return -1.0


def test_the_papers_lengths_by_hand() -> None:
    # 16384 tokens are free, 4096 more are the cache: 20480 at most.
    punishment = SoftPunishment(max_tokens=20480, cache_tokens=4096)
    assert [punishment.of(n) for n in (1, 16384, 17408, 18432, 20480, 20481)] == [0, 0, -0.25, -0.5, -1, -1]
    assert SoftPunishment(max_tokens=20480, cache_tokens=4096, penalty=3).of(17408) == -0.75


@given(st.integers(2, 200), st.data())
def test_every_length_equals_the_equation(max_tokens: int, data: st.DataObject) -> None:
    cache_tokens = data.draw(st.integers(1, max_tokens - 1))
    punishment = SoftPunishment(max_tokens=max_tokens, cache_tokens=cache_tokens)
    costs = [punishment.of(n) for n in range(max_tokens + 10)]
    assert costs == pytest.approx([slow_punishment(n, max_tokens, cache_tokens) for n in range(max_tokens + 10)])
    assert costs == sorted(costs, reverse=True)


@pytest.mark.parametrize("cache_tokens", [0, 8, 9])
def test_a_cache_that_leaves_no_free_length_is_refused(cache_tokens: int) -> None:
    with pytest.raises(ValueError, match=r"cache_tokens must be in \(0, max_tokens\)"):
        SoftPunishment(max_tokens=8, cache_tokens=cache_tokens)


def test_a_group_is_shaped_turn_by_turn_and_keeps_every_other_field() -> None:
    before = group("a", (0.25, 1.0), 0.5, lengths=[[6, 1], [4]], baseline=0.75)
    after = punish_overlong(before, SoftPunishment(max_tokens=8, cache_tokens=4))
    assert [t.rewards for t in after.trajectories] == [(-0.25, 1.0), (0.5,)]
    assert after.rewards == (0.75, 0.5) and tuple(t.reward for t in after.trajectories) == after.rewards
    assert (after.prompt, after.baseline) == (before.prompt, 0.75)
    for new, old in zip(after.trajectories, before.trajectories, strict=True):
        assert replace(new, rewards=old.rewards) == old
    # The cost stands at the last token of the turn that was too long.
    (sequence,) = make_sequences(replace(after.trajectories[1], rewards=(-0.5,)))
    assert sequence.rewards.tolist() == [0, 0, 0, 0, 0, -0.5]


def test_a_group_of_short_answers_is_the_same_object() -> None:
    before = group("a", 1.0, 0.0)
    assert punish_overlong(before, SoftPunishment(max_tokens=8, cache_tokens=4)) is before
