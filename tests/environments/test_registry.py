import pytest
from skyrl_gym.envs.aime.env import AIMEEnv

from skyrl_train.environments.base import find_environment
from skyrl_train.environments.gsm8k import GSM8KEnv
from skyrl_train.errors import ConfigError


def test_our_own_scorer_wins_over_skyrl_gyms_of_the_same_name() -> None:
    assert find_environment("gsm8k") is GSM8KEnv


def test_an_id_of_skyrl_gym_and_a_dotted_path_give_the_class() -> None:
    assert find_environment("aime") is AIMEEnv
    assert find_environment("skyrl_gym.envs.aime.env:AIMEEnv") is AIMEEnv
    assert find_environment("skyrl_gym.envs.aime.env.AIMEEnv") is AIMEEnv


def test_an_unknown_environment_is_an_error_that_lists_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"'arithmatic' is not known. Known: aime, arithmetic, .*gsm8k"):
        find_environment("arithmatic")
    with pytest.raises(ConfigError, match=r"module 'no_such_package.env' can't be imported"):
        find_environment("no_such_package.env:MyEnv")
    with pytest.raises(ConfigError, match="has no 'Missing'"):
        find_environment("skyrl_gym.envs.aime.env:Missing")
