"""What of a step's rollouts is learned from, drawn from a scripted stream of batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl_train.errors import SelectionError
from skyrl_train.rollout.groups import Rollouts
from skyrl_train.rollout.overlong import SoftPunishment
from skyrl_train.rollout.selection import DynamicSampling, Selected, Selection, is_mixed, with_copies
from skyrl_train.types import Prompt, ScoredGroup
from tests.rollout.scored import group, rollouts

FILTER = DynamicSampling(type="filter", max_batches=3)
REPLACE = DynamicSampling(type="replace", max_batches=3, min_replace_ratio=0.3)


class Source:
    """Batches of scored groups one after the other; `drawn` counts the batches that were asked for."""

    def __init__(self, *batches: Rollouts) -> None:
        self.batches = batches
        self.drawn = 0

    def next_prompts(self) -> list[Prompt]:
        self.drawn += 1
        return [g.prompt for g in self.batches[self.drawn - 1].groups]

    async def roll_out(self, prompts: Sequence[Prompt]) -> Rollouts:
        batch = self.batches[self.drawn - 1]
        assert [g.prompt for g in batch.groups] == list(prompts)
        return batch


async def draw(selection: Selection, *batches: Rollouts) -> tuple[Selected, Source]:
    source = Source(*batches)
    return await selection.draw(source.roll_out, source.next_prompts), source


def ids(groups: Sequence[ScoredGroup]) -> list[str]:
    return [g.prompt.prompt_id for g in groups]


def mixed(name: str) -> ScoredGroup:
    return group(name, 1.0, 0.0)


def uniform(name: str, reward: float = 1.0) -> ScoredGroup:
    return group(name, reward, reward)


async def test_with_everything_off_a_step_is_one_batch_as_it_came() -> None:
    batch = rollouts(mixed("a"), uniform("b"))
    selected, source = await draw(Selection(batch_size=2), batch)
    assert selected.groups == batch.groups and selected.rollouts is batch
    assert selected.metrics == {} and source.drawn == 1
    assert (
        Selection(batch_size=2).draws_one_batch and not Selection(batch_size=2, dynamic_sampling=FILTER).draws_one_batch
    )


# Which groups are mixed


def test_groups_are_compared_by_their_trajectories_scores_whatever_the_turns_say() -> None:
    assert not is_mixed(group("a", (0.5, 0.5), (0.0, 1.0), (1.0,)))
    assert is_mixed(group("b", (0.5, 0.5), (0.5, 0.25)))
    assert not is_mixed(group("one", 0.7))


def test_rounding_is_no_difference() -> None:
    assert not is_mixed(group("a", 0.1 + 0.2, 0.3))
    assert not is_mixed(group("b", 1e9 + 1e-3, 1e9))
    assert is_mixed(group("c", 0.3, 0.30001))
    assert is_mixed(group("d", -1.0, 1.0))


# Zero variance


async def test_groups_that_agree_are_left_out_and_counted_and_stay_in_the_log() -> None:
    batch = rollouts(uniform("a"), mixed("b"), uniform("c", 0.0))
    selected, source = await draw(Selection(batch_size=3, zero_variance_filter=True), batch)
    assert ids(selected.groups) == ["b"] and ids(selected.rollouts.groups) == ["a", "b", "c"]
    assert selected.metrics == {"selection/num_zero_variance_dropped": 2, "selection/num_groups": 1}
    assert source.drawn == 1


async def test_a_batch_may_have_nothing_left() -> None:
    selected, _ = await draw(Selection(batch_size=1, zero_variance_filter=True), rollouts(uniform("a")))
    assert selected.groups == () and selected.metrics["selection/num_zero_variance_dropped"] == 1


# Filter


async def test_filter_draws_until_the_batch_is_full_and_counts_what_it_drops() -> None:
    first, second = rollouts(mixed("a"), uniform("b"), uniform("c")), rollouts(mixed("d"), mixed("e"), mixed("f"))
    selected, source = await draw(Selection(batch_size=3, dynamic_sampling=FILTER), first, second)
    assert ids(selected.groups) == ["a", "d", "e"]
    assert ids(selected.rollouts.groups) == ["a", "b", "c", "d", "e", "f"]
    assert source.drawn == 2
    assert selected.metrics == {
        "selection/num_batches_drawn": 2,
        "selection/num_groups_drawn": 6,
        "selection/num_uniform_dropped": 2,
        "selection/num_surplus_dropped": 1,
        "selection/num_copies": 0,
        "selection/num_groups": 3,
    }


async def test_filter_stops_at_its_bound_and_says_the_numbers() -> None:
    poor = rollouts(mixed("a"), uniform("b"))
    with pytest.raises(SelectionError, match=r"found 3 groups .* among 6 in 3 batches, and wants 4"):
        await draw(Selection(batch_size=4, dynamic_sampling=FILTER), poor, poor, poor, poor)


async def test_failed_trajectories_of_all_batches_stay_in_the_log() -> None:
    broken = group("x", 0.0, failed=True)
    first, second = rollouts(mixed("a"), failed=[broken]), rollouts(mixed("b"))
    selected, _ = await draw(Selection(batch_size=2, dynamic_sampling=FILTER), first, second)
    assert ids(selected.rollouts.failed) == ["x"] and selected.rollouts.num_failed == 1


# Replace


async def test_replace_fills_up_with_copies_of_their_own_name_and_every_field_kept() -> None:
    good = group("a", 1.0, 0.0, baseline=0.5)
    selected, source = await draw(
        Selection(batch_size=3, dynamic_sampling=REPLACE), rollouts(uniform("x"), good, uniform("y"))
    )
    assert ids(selected.groups) == ["a", "a#1", "a#2"] and source.drawn == 1
    for copy, name in zip(selected.groups[1:], ("a#1", "a#2"), strict=True):
        assert {str(t.id) for t in copy.trajectories} == {f"{name}/0/0", f"{name}/1/0"}
        assert (copy.rewards, copy.baseline, copy.prompt.target) == (good.rewards, good.baseline, good.prompt.target)
        for mine, its in zip(copy.trajectories, good.trajectories, strict=True):
            assert replace(mine, id=its.id) == its
    assert selected.metrics["selection/num_copies"] == 2 and selected.metrics["selection/num_uniform_dropped"] == 2


async def test_replace_draws_again_below_its_ratio_and_loses_no_good_group() -> None:
    # 0.5 of 4: two good groups are wanted, the first batch has one.
    keys = DynamicSampling(type="replace", max_batches=2, min_replace_ratio=0.5)
    first = rollouts(mixed("a"), uniform("b"), uniform("c"), uniform("d"))
    second = rollouts(uniform("e"), mixed("f"), uniform("g"), uniform("h"))
    selected, source = await draw(Selection(batch_size=4, dynamic_sampling=keys), first, second)
    assert source.drawn == 2 and ids(selected.groups[:2]) == ["a", "f"]
    assert sorted(ids(selected.groups[2:])) == ["a#1", "f#1"]
    with pytest.raises(SelectionError, match=r"found 0 groups .* and wants 2"):
        await draw(Selection(batch_size=4, dynamic_sampling=keys), *[rollouts(uniform("b"))] * 2)


@pytest.mark.parametrize(("ratio", "batch_size", "wanted"), [(0.3, 10, 3), (0.3, 11, 4), (0.0, 8, 1), (1.0, 8, 8)])
def test_the_ratio_in_groups(ratio: float, batch_size: int, wanted: int) -> None:
    keys = DynamicSampling(type="replace", max_batches=1, min_replace_ratio=ratio)
    assert keys.num_wanted(batch_size) == wanted


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 6), st.integers(1, 20), st.integers(0, 5))
def test_copies_are_spread_evenly_named_once_and_the_same_each_time(count: int, batch_size: int, seed: int) -> None:
    groups = [mixed(f"p{i}") for i in range(count)]
    filled = with_copies(groups, batch_size, seed=seed)
    assert len(filled) == max(batch_size, count) and list(filled[:count]) == groups
    assert len(set(ids(filled))) == len(filled)
    assert len({t.id for g in filled for t in g.trajectories}) == 2 * len(filled)
    times = [sum(name.split("#")[0] == g.prompt.prompt_id for name in ids(filled)) for g in groups]
    assert max(times) - min(times) <= 1
    assert ids(with_copies(groups, batch_size, seed=seed)) == ids(filled)


def test_another_seed_or_other_groups_are_copied_otherwise() -> None:
    groups = [mixed(f"p{i}") for i in range(8)]
    by_seed = {tuple(ids(with_copies(groups, 10, seed=seed))) for seed in range(20)}
    assert len(by_seed) > 5


# Overlong


async def test_dynamic_sampling_looks_at_the_tasks_reward_and_the_zero_variance_filter_at_the_shaped_one() -> None:
    """The right answer of 8 tokens loses all of its reward: the group is mixed as scored, and agrees as compared."""
    long_and_right = group("a", 1.0, 0.0, lengths=[[8], [1]])
    right_in_two_lengths = group("b", 1.0, 1.0, lengths=[[8], [1]])
    punishment = SoftPunishment(max_tokens=8, cache_tokens=4)
    batch = rollouts(long_and_right, right_in_two_lengths)
    keys = DynamicSampling(type="filter", max_batches=1)
    selected, _ = await draw(Selection(batch_size=1, dynamic_sampling=keys, punishment=punishment), batch)
    assert ids(selected.groups) == ["a"] and selected.groups[0].rewards == (0.0, 0.0)
    selected, _ = await draw(Selection(batch_size=2, zero_variance_filter=True, punishment=punishment), batch)
    assert ids(selected.groups) == ["b"] and selected.groups[0].rewards == (0.0, 1.0)
    # The log shows what the environment said.
    assert [g.rewards for g in selected.rollouts.groups] == [(1.0, 0.0), (1.0, 1.0)]
    assert selected.metrics == {
        "selection/num_overlong_punished": 2,
        "selection/overlong_punishment_mean": -0.5,
        "selection/num_zero_variance_dropped": 1,
        "selection/num_groups": 1,
    }
