"""GSM8K with a scorer that reads what models write.

skyrl-gym's scorer takes the first `####` and compares strings, so "#### 41 ... no, #### 42", "#### $1,000"
and "#### 42." miss. Here the last `####` counts and the numbers are compared as numbers.
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from typing import Any

from skyrl_gym.envs.base_text_env import BaseTextEnvStepOutput
from skyrl_gym.envs.gsm8k.env import GSM8kEnv
from skyrl_gym.envs.gsm8k.multi_turn_env import GSM8kMultiTurnEnv

_ANSWER = re.compile(r"####\s*([^\n#]*)")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def read_number(text: str) -> Decimal | None:
    """The first number in `text`, tolerant of `$`, thousands commas, a final point and `.0`: "$1,000.0." is 1000."""
    match = _NUMBER.search(text.replace("$", "").replace(" ", ""))
    if match is None:
        return None
    try:
        return Decimal(match.group().replace(",", "")).normalize()
    except InvalidOperation:  # more digits than a Decimal holds: not a number that any row has
        return None


def score(response: str, ground_truth: str) -> float:
    """1.0 if the number after the last `####` equals the ground truth, else 0.0."""
    answers = _ANSWER.findall(response)
    wanted = read_number(str(ground_truth))
    if not answers or wanted is None:
        return 0.0
    return float(read_number(answers[-1]) == wanted)


class GSM8KEnv(GSM8kEnv):  # type: ignore[misc]
    """skyrl-gym's single-turn environment with the scorer above; the row gives `reward_spec.ground_truth`."""

    runs_inline = True

    def __init__(self, env_config: Any = None, extras: dict[str, Any] | None = None) -> None:
        super().__init__(env_config, extras or {})

    def _get_reward(self, action: str) -> float:
        return score(action, self.ground_truth)


class GSM8KMultiTurnEnv(GSM8kMultiTurnEnv):  # type: ignore[misc]
    """skyrl-gym's environment that asks for an answer each turn, with the scorer above.

    A right answer has 1 and ends the trajectory; one in the right form has a share of 0.2, so that all of them together
    never reach what being right is worth.
    """

    runs_inline = True

    def step(self, action: str) -> BaseTextEnvStepOutput:
        self.turns += 1
        right = score(action, self.ground_truth) == 1.0
        reward = 1.0 if right else self.format_score_per_turn if _ANSWER.search(action) else 0.0
        done = right or self.turns >= self.max_turns
        return BaseTextEnvStepOutput(
            observations=[] if done else self._make_observation(), reward=reward, done=done, metadata={}
        )
