"""A plain function as an environment: one turn, scored by whatever the function says.

    def reward(response: str, target: Any) -> float

Of `messages`, `response`, `target` and `extras` it names those that it wants. The function stands in for
`init`, `step` and `close`, so a reward that needs no more than the answer is one function.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from skyrl_train.environments.base import StepOutput
from skyrl_train.errors import ConfigError
from skyrl_train.extension import accepted, load_object, missing
from skyrl_train.types import Message

ARGUMENTS = {
    "messages": "the prompt, a list of messages",
    "response": "the answer's text, without special tokens",
    "target": "the row's column data.target_key",
    "extras": "the row's other columns, a dict",
}


@dataclass(frozen=True, kw_only=True)
class RewardFunction:
    """An EnvironmentFactory. `target_key` is where a row's columns hold what the answer is compared with."""

    path: str
    function: Callable[..., Any]
    target_key: str
    starts_inline: ClassVar[bool] = True

    def __call__(self, *, env_config: Any, extras: dict[str, Any]) -> _ScoredOnce:
        return _ScoredOnce(self, extras)


def reward_function(path: str, *, target_key: str) -> RewardFunction:
    """The function that a dotted path names. Raises ConfigError for one that can't be called as it will be."""
    function = load_object(path, wanted="environment.reward")
    wanted = f"a plain function of any of {', '.join(ARGUMENTS)} that returns a number is wanted"
    if not callable(function):
        raise ConfigError(f"environment.reward {path!r} is a {type(function).__name__}; {wanted}")
    if inspect.iscoroutinefunction(function):
        raise ConfigError(f"environment.reward {path!r} is a coroutine function; {wanted}")
    unknown = missing(function, ARGUMENTS)
    if unknown or not accepted(function, ARGUMENTS):
        found = f"it takes {inspect.signature(function)}" + (f", and nobody gives it {unknown[0]}" if unknown else "")
        raise ConfigError(f"environment.reward {path!r}: {wanted}; {found}")
    return RewardFunction(path=path, function=function, target_key=target_key)


class _ScoredOnce:
    """The environment of one trajectory."""

    def __init__(self, reward: RewardFunction, extras: Mapping[str, Any]) -> None:
        self._reward = reward
        self._extras = extras
        self._messages: list[Message] = []

    def init(self, prompt: list[Message]) -> tuple[Sequence[Message], Mapping[str, Any]]:
        self._messages = prompt
        return prompt, {}

    def step(self, action: str) -> StepOutput:
        target: Any = self._extras
        for part in self._reward.target_key.split("."):
            target = target.get(part) if isinstance(target, Mapping) else None
        known = {"messages": self._messages, "response": action, "target": target, "extras": dict(self._extras)}
        function = self._reward.function
        return StepOutput(
            observations=[], reward=self._number(function(**accepted(function, known))), done=True, metadata={}
        )

    def close(self) -> None:
        pass

    def _number(self, found: Any) -> float:
        """A text that looks like a number is no number: the function is wrong, and should hear of it."""
        if isinstance(found, (str, bytes)) or not hasattr(found, "__float__"):
            raise TypeError(f"{self._reward.path} returned {found!r:.80} ({type(found).__name__}); a number is wanted")
        number = float(found)
        if not math.isfinite(number):
            raise ValueError(f"{self._reward.path} returned {number}; a finite number is wanted")
        return number
