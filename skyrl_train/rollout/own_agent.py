"""The user's own runner of trajectories, in the place of `Agent`: `generator.agent`.

class MyAgent:
    def __init__(self, *, generate, tokenizer, environments, ...): ...       # those of Agent's fields that it names
    def render(self, prompt) -> tuple[int, ...]: ...                         # the prompt's tokens, once for a group
    async def run(self, trajectory_id, prompt, prompt_token_ids, sampling) -> Trajectory: ...
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import traceback
from collections.abc import Callable, Mapping
from typing import Any, cast

from skyrl_train.errors import ConfigError, EngineError, EnvironmentsStuck
from skyrl_train.extension import accepted, load_object, missing
from skyrl_train.rollout.agent import Agent
from skyrl_train.types import Prompt, SamplingParams, Trajectory, TrajectoryId

logger = logging.getLogger(__name__)

WANTED = "a class (or a function that makes one) with render(prompt) and async run(...), as rollout.agent.Agent has"


def agent_factory(path: str) -> Callable[..., Any]:
    """What `generator.agent` names: called with what it names of rollout.agent.Agent's fields, gives an agent."""
    factory = load_object(path, wanted="generator.agent")
    if not callable(factory):
        raise ConfigError(f"generator.agent {path!r} is a {type(factory).__name__}; wanted: {WANTED}")
    if isinstance(factory, type):
        _check(path, factory, f"is {factory.__name__}")
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
    _check(path, agent, f"made a {type(agent).__name__}")
    return cast(Agent, _Guarded(path, agent))


class _Guarded:
    """The user's agent as rollouts see it: what it raises fails one trajectory, and what it returns is looked at."""

    def __init__(self, path: str, agent: Any) -> None:
        self._path = path
        self._agent = agent

    def render(self, prompt: Prompt) -> tuple[int, ...]:
        return tuple(self._agent.render(prompt))

    async def run(
        self, trajectory_id: TrajectoryId, prompt: Prompt, prompt_token_ids: tuple[int, ...], sampling: SamplingParams
    ) -> Trajectory:
        try:
            found = await self._agent.run(trajectory_id, prompt, prompt_token_ids, sampling)
            if not isinstance(found, Trajectory):
                raise TypeError(f"{self._path} returned a {type(found).__name__}; a Trajectory is wanted")
            if found.id != trajectory_id:
                raise ValueError(f"{self._path} returned trajectory {found.id}; {trajectory_id} is wanted")
            return found
        except (EngineError, EnvironmentsStuck, asyncio.CancelledError):
            raise
        except Exception as exc:  # one trajectory is the boundary: it is logged here and counted by the caller
            at = traceback.extract_tb(exc.__traceback__)[-1]
            error = f"{type(exc).__name__}: {exc} (at {at.filename}:{at.lineno})"
            logger.warning("trajectory %s failed in generator.agent %s: %s", trajectory_id, self._path, error)
            return Trajectory(id=trajectory_id, turns=(), rewards=(), status="failed", error=error)


def _check(path: str, agent: Any, found: str) -> None:
    if not callable(getattr(agent, "render", None)) or not inspect.iscoroutinefunction(getattr(agent, "run", None)):
        raise ConfigError(f"generator.agent {path!r} {found}; wanted: {WANTED}")
