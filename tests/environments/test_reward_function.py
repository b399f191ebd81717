"""A plain function as an environment: what it is given, and what it may return."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from skyrl_train.environments.reward_function import reward_function
from skyrl_train.errors import ConfigError

HERE = "tests.environments.test_reward_function"
ROW = {"reward_spec": {"ground_truth": "71"}, "level": 2}


def everything(**known: Any) -> float:
    assert sorted(known) == ["extras", "messages", "response", "target"]
    assert known["messages"] == [{"role": "user", "content": "23 + 48?"}]
    return known["extras"]["level"] + float(known["response"] == known["target"])


def returns_what_it_reads(response: str) -> Any:
    return {
        "bool": True,
        "tensor": torch.tensor(0.5),
        "numpy": np.float32(0.25),
        "text": "1",
        "nothing": None,
        "nan": float("nan"),
    }[response]


def positional(response: str, /) -> float:
    return 1.0


def score(name: str, response: str) -> float:
    environment = reward_function(f"{HERE}.{name}", target_key="reward_spec.ground_truth")(
        env_config=None, extras=dict(ROW)
    )
    environment.init([{"role": "user", "content": "23 + 48?"}])
    step = environment.step(response)
    assert step["done"] and not step["observations"]
    return step["reward"]


def test_the_function_gets_what_it_names_and_all_of_it_if_it_takes_anything() -> None:
    assert score("everything", "71") == 3.0
    assert score("everything", "72") == 2.0


@pytest.mark.parametrize(("kind", "reward"), [("bool", 1.0), ("tensor", 0.5), ("numpy", 0.25)])
def test_any_number_will_do(kind: str, reward: float) -> None:
    found = score("returns_what_it_reads", kind)
    assert found == reward and type(found) is float


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("text", r"returned '1' \(str\); a number"),
        ("nothing", r"returned None \(NoneType\)"),
        ("nan", "returned nan; a finite"),
    ],
)
def test_what_is_no_finite_number_is_an_error_that_names_the_function(kind: str, error: str) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"{HERE}.returns_what_it_reads {error}"):
        score("returns_what_it_reads", kind)


def test_a_function_that_wants_its_argument_by_position_is_refused() -> None:
    with pytest.raises(ConfigError, match="it takes"):
        reward_function(f"{HERE}.positional", target_key="a")
