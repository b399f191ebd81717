"""What a rollout asks of an environment: skyrl-gym's `BaseTextEnv`, as it is.

    env = EnvClass(env_config=..., extras={...})      # extras: the data row's columns
    messages, info = env.init(list(prompt.messages))  # may rewrite the prompt
    out = env.step(response_text)                     # {"observations", "reward", "done", "metadata"}
    env.get_metrics()                                 # if it has this: numbers for the run's metrics
    env.close()                                       # once, however the trajectory ends

So every environment of skyrl-gym runs here unchanged, and one written for us runs there. Calls of one environment come
one after the other, from threads that may change; a class that only computes says `runs_inline = True` and is called
on the event loop (rollout/hosted_environment.py says more).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NotRequired, Protocol, TypedDict, cast

from skyrl_train.errors import ConfigError
from skyrl_train.extension import load_object
from skyrl_train.types import Message


class StepOutput(TypedDict):
    """What one step returns: new messages for the policy, the reward of this turn, whether it is over.

    `metadata`: its numbers go to the run's metrics, the last turn's winning. `postprocessed_action` is the text that
    shall stand in the history in the answer's place; what was sampled is trained on in any case.
    """

    observations: Sequence[Message]
    reward: float
    done: bool
    metadata: Mapping[str, Any]
    postprocessed_action: NotRequired[str | None]


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
    "calculator": "skyrl_train.environments.calculator:CalculatorEnv",
    "gsm8k": "skyrl_train.environments.gsm8k:GSM8KEnv",
    "gsm8k_multi_turn": "skyrl_train.environments.gsm8k:GSM8KMultiTurnEnv",
    "llm_as_a_judge": "skyrl_train.environments.llm_as_a_judge:LLMJudgeEnv",
}
"""Ours by name; they win over skyrl-gym's of the same name (gsm8k.py says why)."""

OWN_SETTINGS = {
    "search": "skyrl_gym.envs.search.env:SearchEnvConfig",
    "text2sql": "skyrl_gym.envs.sql.env:Text2SQLEnvConfig",
}
"""skyrl-gym's environments that read `env_config`, and the class that holds their settings and its defaults."""


@dataclass(frozen=True, kw_only=True)
class ConfiguredEnvironment:
    """A factory with settings of its own in the place of the run's `env_config`."""

    factory: EnvironmentFactory
    settings: Any
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, *, env_config: Any, extras: dict[str, Any]) -> Environment:
        return self.factory(env_config=self.settings, extras=extras, **self.kwargs)

    @property
    def runs_inline(self) -> bool:
        return bool(getattr(self.factory, "runs_inline", False))

    @property
    def init(self) -> Any:
        """The class's, for whoever wants to know whether it is a class's own."""
        return getattr(self.factory, "init", None)


def find_environment(name: str, settings: Mapping[str, Any] | None = None) -> EnvironmentFactory:
    """An environment by its name here, its id in skyrl-gym, or a dotted path `package.module:Class`.

    `settings` become its `env_config`: entries and attributes alike. Raises ConfigError that lists what there is.
    """
    from skyrl_gym.envs.registration import registry

    path = BUILT_IN.get(name)
    kwargs: Mapping[str, Any] = {}
    if path is None and name in registry:
        path, kwargs = registry[name].entry_point, registry[name].kwargs
    if path is None and ("." in name or ":" in name):
        path = name
    if path is None:
        known = ", ".join(sorted({*BUILT_IN, *registry}))
        raise ConfigError(
            f"environment {name!r} is not known. Known: {known}. "
            "For your own, give its dotted path: my_package.my_module:MyEnv"
        )
    found = path if callable(path) else load_object(path, wanted=f"environment {name!r}: class")
    factory = cast(EnvironmentFactory, found)
    if settings is None and not kwargs and name not in OWN_SETTINGS:
        return factory
    return ConfiguredEnvironment(factory=factory, settings=_env_config(name, settings or {}), kwargs=kwargs)


def _env_config(name: str, settings: Mapping[str, Any]) -> Any:
    if name not in OWN_SETTINGS:
        from omegaconf import OmegaConf

        return OmegaConf.create(dict(settings))
    kind = load_object(OWN_SETTINGS[name], wanted=f"environment.env_config.{name}")
    known = {item.name for item in fields(kind)}
    unknown = [key for key in settings if key not in known]
    if unknown:
        raise ConfigError(
            f"environment.env_config.{name}.{unknown[0]}: no such setting; there is {', '.join(sorted(known))}"
        )
    return kind(**settings)
