"""Algorithms by name, by dotted path, and with the options that they name."""

from __future__ import annotations

import inspect
import math

import pytest

from skyrl_train.algorithms.advantages import ADVANTAGE_ESTIMATORS, grpo
from skyrl_train.algorithms.policy_losses import POLICY_LOSSES, ppo_clip
from skyrl_train.algorithms.registry import RENAMED, bind, flat_options, resolve
from skyrl_train.algorithms.selections import SELECTIONS
from skyrl_train.config.check_policy import READERS
from skyrl_train.config.load import load_config
from skyrl_train.errors import ConfigError


def test_a_name_and_a_dotted_path_are_both_found() -> None:
    assert resolve("advantage estimator", ADVANTAGE_ESTIMATORS, "grpo") is grpo
    assert resolve("advantage estimator", ADVANTAGE_ESTIMATORS, "math.hypot") is math.hypot


def test_a_wrong_name_gets_the_nearest_one() -> None:
    with pytest.raises(
        ConfigError, match=r"no policy loss named 'dualclip'; did you mean 'dual_clip'\? known: regular"
    ):
        resolve("policy loss", POLICY_LOSSES, "dualclip")


@pytest.mark.parametrize("path", ["no_such_module.loss", "math.no_such_function"])
def test_a_path_that_leads_nowhere_is_refused(path: str) -> None:
    with pytest.raises(ConfigError, match=f"policy loss '{path}' can't be imported"):
        resolve("policy loss", POLICY_LOSSES, path)


def test_a_path_to_something_else_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'math.pi' is a float, not a function"):
        resolve("policy loss", POLICY_LOSSES, "math.pi")


def test_a_function_is_given_the_options_that_it_names() -> None:
    bound = bind(ppo_clip, {"eps_clip_low": 0.1, "clip_ratio_c": 3.0})
    assert bound.keywords == {"eps_clip_low": 0.1}  # type: ignore[attr-defined]


def test_a_loss_names_the_keys_of_its_group() -> None:
    options = flat_options(load_config([]).config.trainer.algorithm.model_dump())
    assert bind(POLICY_LOSSES["sapo"], options).keywords == {"tau_pos": 1.0, "tau_neg": 1.05}  # type: ignore[attr-defined]
    assert bind(SELECTIONS["clip_cov"], options).keywords == {  # type: ignore[attr-defined]
        "clip_cov_ratio": 0.0002,
        "clip_cov_lb": 1.0,
        "clip_cov_ub": 5.0,
    }
    assert options["sapo"] == {"tau_pos": 1.0, "tau_neg": 1.05}, "the group itself stays"


def test_every_option_in_the_losses_groups_is_read_by_one() -> None:
    functions = [*POLICY_LOSSES.values(), *SELECTIONS.values()]
    read = {name for function in functions for name in inspect.signature(function).parameters}
    assert {RENAMED.get(key, key.rpartition(".")[2]) for key in READERS} <= read
