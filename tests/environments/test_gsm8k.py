from typing import Any

import pytest

from skyrl_train.environments.gsm8k import GSM8KMultiTurnEnv, read_number, score


@pytest.mark.parametrize(
    ("response", "truth", "reward"),
    [
        ("#### 42", "42", 1.0),
        ("first #### 41, no: #### 42", "42", 1.0),
        ("first #### 42, no: #### 41", "42", 0.0),
        ("#### 42.", "42", 1.0),
        ("#### $42", "42", 1.0),
        ("#### $1,000.00", "1000", 1.0),
        ("#### 1000", "1,000", 1.0),
        ("#### -3", "-3", 1.0),
        ("#### 3", "-3", 0.0),
        ("####42 apples", "42", 1.0),
        ("42", "42", 0.0),
        ("#### none", "42", 0.0),
        ("#### 0.50", "0.5", 1.0),
    ],
)
def test_the_last_answer_counts_and_is_compared_as_a_number(response: str, truth: str, reward: float) -> None:
    assert score(response, truth) == reward


def test_a_number_is_read_through_signs_and_separators() -> None:
    assert str(read_number("$ 12,345.0.")) == "12345"
    assert read_number("no digits") is None


def test_several_turns_pay_for_the_form_each_time_and_end_with_the_right_answer() -> None:
    environment: Any = GSM8KMultiTurnEnv(extras={"reward_spec": {"ground_truth": "42"}, "max_turns": 4})
    outputs = [environment.step(text) for text in ("#### 41", "I think 42", "#### 41, no: #### $42.")]
    assert [out["reward"] for out in outputs] == [0.05, 0.0, 1.0]
    assert [out["done"] for out in outputs] == [False, False, True]
    assert outputs[0]["observations"][0]["role"] == "user" and outputs[2]["observations"] == []
    assert environment.get_metrics() == {"steps": 3}


def test_the_last_turn_ends_it_right_or_wrong() -> None:
    environment: Any = GSM8KMultiTurnEnv(extras={"reward_spec": {"ground_truth": "42"}, "max_turns": 1})
    assert environment.step("#### 41")["done"]
