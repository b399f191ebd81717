import pytest

from skyrl_train.environments.arithmetic import ArithmeticEnv, arithmetic_rows, pairs
from skyrl_train.environments.base import find_environment
from skyrl_train.errors import ConfigError


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("71", 1.0),
        (" 71 ", 1.0),
        ("23 + 48 = 71", 1.0),
        ("71.", 1.0),
        ("071", 1.0),
        ("70 or 71", 1.0),
        ("71 or 70", 0.0),
        ("-71", 0.0),
        ("", 0.0),
        ("seventy-one", 0.0),
        ("7" * 5000, 0.0),
    ],
)
def test_the_last_integer_of_the_answer_counts(response: str, reward: float) -> None:
    environment = ArithmeticEnv(extras={"reward_spec": {"ground_truth": "71"}})
    output = environment.step(response)
    assert (output["reward"], output["done"]) == (reward, True)


def test_no_held_out_problem_is_met_in_training_not_even_turned_around() -> None:
    train, held_out = pairs("train"), pairs("eval")
    unordered = {tuple(sorted(pair)) for pair in train}
    assert not unordered & {tuple(sorted(pair)) for pair in held_out}
    assert len(train) + len(held_out) == 90 * 90 and len(held_out) > 1000


def test_rows_are_the_same_at_each_call_and_carry_the_right_answer() -> None:
    rows = arithmetic_rows("train", 50)
    assert rows == arithmetic_rows("train", 60)[:50]
    for row in rows:
        text = row.messages[0]["content"]
        a, b = (int(word) for word in text.removeprefix("What is ").removesuffix("?").split(" + "))
        environment = find_environment(row.environment)(env_config=None, extras=dict(row.extras))
        assert environment.step(str(a + b))["reward"] == 1.0 and row.target == str(a + b)


def test_more_problems_than_there_are_is_an_error_with_both_numbers() -> None:
    with pytest.raises(ConfigError, match=r"num_eval_prompts is 9999, there are \d+ such problems"):
        arithmetic_rows("eval", 9999)
