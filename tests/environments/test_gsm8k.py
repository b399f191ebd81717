import pytest

from skyrl_train.environments.gsm8k import read_number, score


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
