"""The built-in task of several turns: a product that nobody here can do in the head, and a tool that can.

    user        What is 417 * 86?
    assistant   <calc>417*86</calc>
    user        35862
    assistant   35862                    reward 1

One problem in five is held out, by a hash of its numbers.
"""

from __future__ import annotations

import random
import re
import zlib
from typing import Any

from skyrl_gym.envs.base_text_env import BaseTextEnv, BaseTextEnvStepOutput

from skyrl_train.data.rows import PromptRow
from skyrl_train.environments.arithmetic import Split, final_number
from skyrl_train.errors import ConfigError

FIRST, SECOND = range(100, 1000), range(10, 40)
"""Their products have four digits about as often as five: an answer's length must be read, not learned by heart."""
HELD_OUT_IN = 5
"""One problem in so many is held out."""

_CALL = re.compile(r"<calc>(.*?)</calc>", re.DOTALL)
_PRODUCT = re.compile(r"\s*(\d{1,12})\s*([*+-])\s*(\d{1,12})\s*")
HINT = "error: write <calc>12*34</calc>"


class CalculatorEnv(BaseTextEnv):  # type: ignore[misc]
    """An answer that calls the tool gets what it says; one that doesn't is the final one, right (1) or wrong (0).

    An answer that holds a call is never judged by the numbers in it. The last turn that `max_turns` of the row (or of
    the run) allows ends the trajectory. `calculator.call_reward` is paid once, for the first call that is well formed.
    """

    runs_inline = True

    def __init__(self, env_config: Any = None, extras: dict[str, Any] | None = None) -> None:
        super().__init__()
        row = extras or {}
        self.target = int(row["reward_spec"]["ground_truth"])
        self.max_turns = int(row.get("max_turns", 3))
        self._call_reward = float(env_config.calculator.call_reward) if env_config is not None else 0.0
        self._num_calls = 0
        self._num_errors = 0

    def step(self, action: str) -> BaseTextEnvStepOutput:
        self.turns += 1
        if "<calc>" not in action:
            right = final_number(action) == self.target
            return self._output([], float(right), done=True)
        result = calculate(action)
        reward = self._call_reward if result is not None and not self._num_calls else 0.0
        self._num_calls += result is not None
        self._num_errors += result is None
        observation = {"role": "user", "content": HINT if result is None else str(result)}
        return self._output([observation], reward, done=self.turns >= self.max_turns)

    def _output(self, observations: list[dict[str, str]], reward: float, *, done: bool) -> BaseTextEnvStepOutput:
        metadata = {"num_calls": self._num_calls, "num_malformed_calls": self._num_errors}
        return BaseTextEnvStepOutput(
            observations=[] if done else observations, reward=reward, done=done, metadata=metadata
        )


def calculate(action: str) -> int | None:
    """What the first call of the tool gives: "<calc>12*34</calc>" is 408. None for a call that isn't well formed."""
    call = _CALL.search(action)
    match = _PRODUCT.fullmatch(call[1]) if call else None
    if match is None:
        return None
    a, b = int(match[1]), int(match[3])
    return {"*": a * b, "+": a + b, "-": a - b}[match[2]]


def question(a: int, b: int) -> str:
    """The text of the problem."""
    return f"What is {a} * {b}?"


def demonstration(a: int, b: int) -> list[dict[str, str]]:
    """The conversation that solves it."""
    return [
        {"role": "user", "content": question(a, b)},
        {"role": "assistant", "content": f"<calc>{a}*{b}</calc>"},
        {"role": "user", "content": str(a * b)},
        {"role": "assistant", "content": str(a * b)},
    ]


def problems(split: Split) -> list[tuple[int, int]]:
    """All problems of a split, in a fixed shuffled order."""
    chosen = [(a, b) for a in FIRST for b in SECOND if _is_held_out(a, b) is (split == "eval")]
    random.Random(0).shuffle(chosen)
    return chosen


def calculator_rows(split: Split, count: int) -> list[PromptRow]:
    """The first `count` problems of a split. Raises ConfigError when there are fewer."""
    chosen = problems(split)
    if count > len(chosen):
        key = "num_train_prompts" if split == "train" else "num_eval_prompts"
        raise ConfigError(f"environment.calculator.{key} is {count}, there are {len(chosen)} such problems")
    return [
        PromptRow(
            messages=({"role": "user", "content": question(a, b)},),
            environment="calculator",
            target=str(a * b),
            extras={"reward_spec": {"method": "rule", "ground_truth": str(a * b)}},
        )
        for a, b in chosen[:count]
    ]


def _is_held_out(a: int, b: int) -> bool:
    return zlib.crc32(f"{a}*{b}".encode()) % HELD_OUT_IN == 0
