"""The user's own runner of trajectories, in the place of `Agent`: `generator.agent`.

class MyAgent:
    def __init__(self, *, generate, tokenizer, environments, ...): ...       # those of Agent's fields that it names
    def render(self, prompt) -> tuple[int, ...]: ...                         # the prompt's tokens, once for a group
    async def run(self, trajectory_id, prompt, prompt_token_ids, sampling) -> Trajectory: ...
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

from skyrl_train.errors import ConfigError
from skyrl_train.extension import accepted, load_object, missing
from skyrl_train.rollout.agent import Agent

WANTED = "a class (or a function that makes one) with render(prompt) and async run(...), as rollout.agent.Agent has"


def agent_factory(path: str) -> Callable[..., Any]:
    """What `generator.agent` names: called with what it names of rollout.agent.Agent's fields, gives an agent."""
    factory = load_object(path, wanted="generator.agent")
    if not callable(factory):
        raise ConfigError(f"generator.agent {path!r} is a {type(factory).__name__}; wanted: {WANTED}")
    if isinstance(factory, type):
        lacks = [name for name in ("render", "run") if not callable(getattr(factory, name, None))]
        if lacks:
            raise ConfigError(f"generator.agent {path!r} has no {lacks[0]}; wanted: {WANTED}")
        if not inspect.iscoroutinefunction(factory.run):  # type: ignore[attr-defined]
            raise ConfigError(f"generator.agent {path!r}: run is no coroutine function; wanted: {WANTED}")
    return factory  # type: ignore[no-any-return]


def own_agent(path: str, arguments: Mapping[str, Any]) -> Agent:
    """The agent, made with those of `arguments` that its class names. Raises ConfigError for one that can't run."""
    factory = agent_factory(path)
    unknown = missing(factory, arguments)
    if unknown:
        raise ConfigError(
            f"generator.agent {path!r} wants {unknown[0]!r}, and nobody gives it that; known: {', '.join(arguments)}"
        )
    agent = factory(**accepted(factory, arguments))
    if not callable(getattr(agent, "render", None)) or not inspect.iscoroutinefunction(getattr(agent, "run", None)):
        raise ConfigError(f"generator.agent {path!r} made a {type(agent).__name__}; wanted: {WANTED}")
    return cast(Agent, agent)
