from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from skyrl_train.environments.base import find_environment
from skyrl_train.environments.calculator import (
    HINT,
    CalculatorEnv,
    calculate,
    calculator_rows,
    demonstration,
    problems,
)
from skyrl_train.errors import ConfigError


def environment(*, call_reward: float = 0.0, max_turns: int = 3) -> CalculatorEnv:
    config = SimpleNamespace(calculator=SimpleNamespace(call_reward=call_reward))
    return CalculatorEnv(config, {"reward_spec": {"ground_truth": "7506"}, "max_turns": max_turns})


def steps(made: CalculatorEnv, *actions: str) -> list[tuple[str | None, float, bool]]:
    """(observation, reward, done) of each."""
    outputs: list[Any] = [made.step(action) for action in actions]
    return [
        (out["observations"][0]["content"] if out["observations"] else None, out["reward"], out["done"])
        for out in outputs
    ]


@pytest.mark.parametrize(
    ("action", "result"),
    [
        ("<calc>417*18</calc>", 7506),
        ("let me see: <calc> 417 * 18 </calc> ...", 7506),
        ("<calc>2+3</calc><calc>9*9</calc>", 5),
        ("<calc>2-3</calc>", -1),
        ("<calc>417*18", None),
        ("<calc></calc>", None),
        ("<calc>417*18*2</calc>", None),
        ("<calc>9**9</calc>", None),
        ("<calc>__import__('os')</calc>", None),
        (f"<calc>{'9' * 13}*2</calc>", None),
        ("417*18", None),
    ],
)
def test_the_tool_takes_two_whole_numbers_and_nothing_else(action: str, result: int | None) -> None:
    assert calculate(action) == result


def test_a_call_gets_its_result_and_the_answer_is_judged_by_its_last_number() -> None:
    assert steps(environment(), "<calc>417*18</calc>", "7506") == [("7506", 0.0, False), (None, 1.0, True)]
    assert steps(environment(), "<calc>417*18</calc>", "7506 or 7507") == [("7506", 0.0, False), (None, 0.0, True)]
    assert steps(environment(), "7506") == [(None, 1.0, True)]


def test_a_number_in_a_call_is_no_answer() -> None:
    assert steps(environment(max_turns=2), "<calc>7506", "<calc>7506*1</calc> 7506") == [
        (HINT, 0.0, False),
        (None, 0.0, True),
    ]


def test_a_well_formed_call_is_paid_once() -> None:
    found = steps(environment(call_reward=0.25), "<calc>x</calc>", "<calc>1+1</calc>", "<calc>1+1</calc>")
    assert [reward for _, reward, _ in found] == [0.0, 0.25, 0.0] and found[-1][2]


def test_calls_are_counted() -> None:
    made = environment()
    made.step("<calc>1</calc>")
    assert made.step("<calc>1+1</calc>")["metadata"] == {"num_calls": 1, "num_malformed_calls": 1}


def test_no_held_out_problem_is_met_in_training_and_lengths_differ() -> None:
    train, held_out = set(problems("train")), set(problems("eval"))
    assert not train & held_out and len(train) + len(held_out) == 900 * 30 and len(held_out) > 5000
    share = sum(a * b < 10_000 for a, b in held_out) / len(held_out)
    assert 0.35 < share < 0.65, "four digits about as often as five"


def test_rows_are_the_same_at_each_call_and_the_demonstration_solves_them() -> None:
    rows = calculator_rows("train", 50)
    assert rows == calculator_rows("train", 60)[:50]
    for row, (a, b) in zip(rows, problems("train"), strict=False):
        asked, call, result, answer = demonstration(a, b)
        made: Any = find_environment(row.environment)(env_config=None, extras=dict(row.extras))
        assert row.messages == (asked,)
        assert made.step(call["content"])["observations"] == [result]
        assert made.step(answer["content"])["reward"] == 1.0


def test_more_problems_than_there_are_is_an_error_with_both_numbers() -> None:
    with pytest.raises(ConfigError, match=r"calculator.num_eval_prompts is 99999, there are \d+ such problems"):
        calculator_rows("eval", 99999)
