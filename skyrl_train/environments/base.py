"""What a rollout asks of an environment: skyrl-gym's `BaseTextEnv`, as it is.

    env = EnvClass(env_config=..., extras={...})      # extras: the data row's columns
    messages, info = env.init(list(prompt.messages))  # may rewrite the prompt
    out = env.step(response_text)                     # {"observations", "reward", "done", "metadata"}
    env.close()

So every environment of skyrl-gym runs here unchanged, and one written for us runs there.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypedDict, cast

from skyrl_train.errors import ConfigError
from skyrl_train.types import Message


class StepOutput(TypedDict):
    """What one step returns: new messages for the policy, the reward of this turn, whether it is over."""

    observations: Sequence[Message]
    reward: float
    done: bool
    metadata: Mapping[str, Any]


class Environment(Protocol):
    """One trajectory's world. Made fresh for each trajectory, closed when it ends, fails or is cancelled."""

    def init(self, prompt: list[Message]) -> tuple[Sequence[Message], Mapping[str, Any]]: ...

    def step(self, action: str) -> StepOutput: ...

    def close(self) -> None: ...


class EnvironmentFactory(Protocol):
    """Makes the environment of one trajectory from a data row's columns."""

    def __call__(self, *, env_config: Any, extras: dict[str, Any]) -> Environment: ...


BUILT_IN = {
    "arithmetic": "skyrl_train.environments.arithmetic:ArithmeticEnv",
    "gsm8k": "skyrl_train.environments.gsm8k:GSM8KEnv",
}
"""Ours by name; they win over skyrl-gym's of the same name (gsm8k.py says why)."""


def find_environment(name: str) -> EnvironmentFactory:
    """An environment by its name here, its id in skyrl-gym, or a dotted path `package.module:Class`.

    Raises ConfigError that lists what there is.
    """
    from skyrl_gym.envs.registration import registry

    path = BUILT_IN.get(name)
    if path is None and name in registry:
        path = registry[name].entry_point
    if path is None and ("." in name or ":" in name):
        path = name
    if path is None:
        known = ", ".join(sorted({*BUILT_IN, *registry}))
        raise ConfigError(
            f"environment {name!r} is not known. Known: {known}. "
            "For your own, give its dotted path: my_package.my_module:MyEnv"
        )
    return cast(EnvironmentFactory, load_object(path, wanted=f"environment {name!r}"))


def load_object(path: Any, *, wanted: str) -> Any:
    """`package.module:Name` or `package.module.Name` -> the object; a callable is returned as it is."""
    if callable(path):
        return cast(Any, path)
    module_name, separator, attribute = path.partition(":")
    if not separator:
        module_name, _, attribute = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ImportError as exc:
        raise ConfigError(f"{wanted}: module {module_name!r} can't be imported: {exc}") from exc
    if not hasattr(module, attribute):
        raise ConfigError(f"{wanted}: module {module_name!r} has no {attribute!r}")
    return getattr(module, attribute)
