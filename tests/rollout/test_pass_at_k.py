"""pass@k against counting every choice of k samples."""

from __future__ import annotations

from itertools import combinations

import pytest

from skyrl_train.rollout.pass_at_k import pass_at_k, pass_at_k_metrics
from tests.rollout.scored import group, rollouts


@pytest.mark.parametrize("num_samples", [1, 2, 5])
def test_every_choice_of_k_samples_counts_the_same(num_samples: int) -> None:
    for num_right in range(num_samples + 1):
        answers = [True] * num_right + [False] * (num_samples - num_right)
        for k in range(1, num_samples + 1):
            choices = [any(chosen) for chosen in combinations(answers, k)]
            assert pass_at_k(num_samples, num_right, k) == pytest.approx(sum(choices) / len(choices))


def test_more_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="pass@3"):
        pass_at_k(2, 1, 3)


def test_a_right_answer_is_a_full_score_over_all_turns_and_a_failed_one_is_wrong() -> None:
    found = pass_at_k_metrics(
        rollouts(
            group("a", (1.0, 0.0), 0.0, 0.0),  # right by its first turn; its fourth sample failed
            group("b", 1.0, 1.0, 1.0, 1.0),
            failed=[group("a", 0.0, failed=True), group("c", 0.0, 0.0, 0.0, 0.0, failed=True)],
        ),
        num_samples=4,
    )
    # a: 1/4, 1/2, 1    b: 1, 1, 1    c: 0, 0, 0
    assert found == pytest.approx({"eval/pass_at_1": 1.25 / 3, "eval/pass_at_2": 1.5 / 3, "eval/pass_at_4": 2 / 3})
    assert pass_at_k_metrics(rollouts(group("a", 1.0)), num_samples=1) == {"eval/pass_at_1": 1.0}
