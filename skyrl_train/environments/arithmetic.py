"""The built-in task: "What is 23 + 48?", right or wrong.

All sums of two two-digit numbers are split by a hash of the unordered pair: 23 + 48 and 48 + 23 are on the same side,
so no held-out problem is met in training, not even turned around.
"""

from __future__ import annotations

import random
import re
import zlib
from decimal import Decimal
from typing import Any, Literal

from skyrl_gym.envs.base_text_env import BaseTextEnv, BaseTextEnvStepOutput

from skyrl_train.data.rows import PromptRow
from skyrl_train.errors import ConfigError

Split = Literal["train", "eval"]

NUMBERS = range(10, 100)
HELD_OUT_IN = 5
"""One pair in so many is held out."""

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


class ArithmeticEnv(BaseTextEnv):  # type: ignore[misc]
    """Reward 1 when the last number of the answer is `reward_spec.ground_truth`, else 0; one turn."""

    runs_inline = True

    def __init__(self, env_config: Any = None, extras: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.ground_truth = Decimal((extras or {})["reward_spec"]["ground_truth"])

    def step(self, action: str) -> BaseTextEnvStepOutput:
        right = final_number(action) == self.ground_truth
        return BaseTextEnvStepOutput(observations=[], reward=float(right), done=True, metadata={})


def final_number(text: str) -> Decimal | None:
    """The last number in a text: "3 + 8 = 11, so 71." is 71; of "71.5", "1,071" and "-71" none is 71."""
    numbers = _NUMBER.findall(text)
    return Decimal(numbers[-1].replace(",", "")) if numbers else None


def question(a: int, b: int) -> str:
    """The text of the problem."""
    return f"What is {a} + {b}?"


def pairs(split: Split) -> list[tuple[int, int]]:
    """All problems of a split, in a fixed shuffled order."""
    chosen = [(a, b) for a in NUMBERS for b in NUMBERS if _is_held_out(a, b) is (split == "eval")]
    random.Random(0).shuffle(chosen)
    return chosen


def arithmetic_rows(split: Split, count: int) -> list[PromptRow]:
    """The first `count` problems of a split. Raises ConfigError when there are fewer."""
    chosen = pairs(split)
    if count > len(chosen):
        key = "num_train_prompts" if split == "train" else "num_eval_prompts"
        raise ConfigError(f"environment.arithmetic.{key} is {count}, there are {len(chosen)} such problems")
    return [
        PromptRow(
            messages=({"role": "user", "content": question(a, b)},),
            environment="arithmetic",
            target=str(a + b),
            extras={"reward_spec": {"method": "rule", "ground_truth": str(a + b)}},
        )
        for a, b in chosen[:count]
    ]


def _is_held_out(a: int, b: int) -> bool:
    low, high = sorted((a, b))
    return zlib.crc32(f"{low}+{high}".encode()) % HELD_OUT_IN == 0
