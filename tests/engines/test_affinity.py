"""Which engine a request goes to."""

from __future__ import annotations

from skyrl_train.engines.affinity import Affinity, group_and_trajectory
from skyrl_train.rollout.agent import request_id
from skyrl_train.types import TrajectoryId


def test_a_rollouts_request_names_its_group_and_trajectory() -> None:
    for prompt_id in ("7", "eval/12", "a/1/2"):
        for turn in (0, 1, 23):
            trajectory = TrajectoryId(prompt_id=prompt_id, sample=3, branch=1)
            assert group_and_trajectory(request_id(trajectory, turn)) == (prompt_id, str(trajectory))
    for other in ("cmpl-1", "7", "7/2", "7/2/x", "7/2/0/t"):
        assert group_and_trajectory(other) is None


def test_a_group_stays_together_and_the_next_group_goes_to_the_least_loaded() -> None:
    affinity = Affinity()
    assert affinity.choose("a/0/0", {0: 1, 1: 1, 2: 1}) == 0
    assert affinity.choose("a/1/0", {0: 9, 1: 1, 2: 1}) == 0
    assert affinity.choose("b/0/0", {0: 9, 1: 2, 2: 1}) == 2
    assert affinity.choose("anything", {0: 9, 1: 2, 2: 2}) == 1


def test_a_group_that_is_too_large_for_one_engine_goes_on_at_another_but_trajectories_stay() -> None:
    affinity = Affinity(max_lead=4)
    loads = {0: 0, 1: 0}
    for sample in range(12):
        loads[affinity.choose(f"a/{sample}/0", loads)] += 1
    assert sorted(loads.values()) == [5, 7]
    assert affinity.choose("a/0/0/t1", {0: 50, 1: 0}) == 0
    assert affinity.choose("a/11/0/t1", {0: 0, 1: 50}) == affinity.choose("a/11/0/t2", {0: 50, 1: 0})


def test_who_is_out_of_rotation_is_not_chosen_and_the_group_moves_together() -> None:
    affinity = Affinity()
    assert affinity.choose("a/0/0", {0: 0, 1: 0}) == 0
    assert affinity.choose("a/0/0/t1", {1: 3, 2: 2}) == 2
    assert affinity.choose("a/1/0", {0: 0, 1: 0, 2: 5}) == 2
    assert affinity.choose("a/0/0/t2", {0: 0, 1: 0, 2: 5}) == 2


def test_what_is_remembered_is_bounded_and_the_oldest_is_forgotten() -> None:
    affinity = Affinity(max_remembered=10)
    affinity.choose("kept/0/0", {0: 0, 1: 1})
    for number in range(1000):
        affinity.choose(f"{number}/0/0", {0: 0, 1: 1})
        assert affinity.choose("kept/0/0/t1", {0: 1, 1: 0}) == 0
    assert len(affinity) == 20
    assert affinity.choose("3/0/0", {0: 1, 1: 0}) == 1
    affinity.forget()
    assert len(affinity) == 0
