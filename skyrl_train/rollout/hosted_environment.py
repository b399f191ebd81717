"""One trajectory's environment and where its methods run: on the event loop, or in the pool of threads.

An environment that only computes says `runs_inline = True` on its class: it runs on the event loop, in an order that
depends on tokens alone, and costs no change of threads. All others may block, and go to the pool. One whose `init` is
skyrl-gym's own, which hands the prompt back, is made on the event loop in any case: so the requests of a step reach
the engine in the prompts' order.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from skyrl_gym.envs.base_text_env import BaseTextEnv

from skyrl_train.environments.base import Environment, EnvironmentFactory, StepOutput
from skyrl_train.errors import EnvironmentsStuck
from skyrl_train.rollout.environment_pool import Call, EnvironmentPool
from skyrl_train.types import Message

logger = logging.getLogger(__name__)

T = TypeVar("T")


class HostedEnvironment:
    """Owns one environment from its making to its closing, which happens exactly once.

    `name` is the environment's and the trajectory's, for messages. `pool` None runs everything on the event loop.
    """

    def __init__(
        self,
        name: str,
        factory: EnvironmentFactory,
        *,
        env_config: Any,
        extras: Mapping[str, Any],
        pool: EnvironmentPool | None,
    ) -> None:
        self._name = name
        self._factory = factory
        self._env_config = env_config
        self._extras = extras
        self._pool = None if getattr(factory, "runs_inline", False) else pool
        self._environment: Environment | None = None
        self._call: Call[Any] | None = None

    async def init(self, prompt: Sequence[Message]) -> Sequence[Message]:
        """Makes the environment; the messages that the policy shall see."""

        def begin() -> Sequence[Message]:
            self._environment = self._factory(env_config=self._env_config, extras=dict(self._extras))
            messages, _ = self._environment.init(list(prompt))
            return messages

        return begin() if _starts_inline(self._factory) else await self._run(begin, "init")

    async def step(self, action: str) -> StepOutput:
        environment = self._environment
        assert environment is not None
        return await self._run(lambda: environment.step(action), "step")

    async def finish(self) -> dict[str, float]:
        """Closes the environment; the numbers of its `get_metrics`, if it has any."""

        def end() -> dict[str, float]:
            environment, self._environment = self._environment, None
            try:
                get_metrics = getattr(environment, "get_metrics", None)
                return numbers(get_metrics()) if get_metrics is not None else {}
            finally:
                if environment is not None:
                    environment.close()

        return end() if _ends_inline(self._environment) else await self._run(end, "close")

    async def abandon(self) -> None:
        """Closes the environment of a trajectory that failed or was cancelled: after the call that it is still in.

        Errors are logged: the trajectory has one already.
        """
        if self._call is not None and self._call.then(self._close):
            return
        try:
            if _ends_inline(self._environment):
                self._close()
            else:
                await self._run(self._close, "close")
        except EnvironmentsStuck:
            threading.Thread(target=self._close, name=f"close {self._name}", daemon=True).start()
        except Exception:
            logger.exception("%s could not be closed", self._name)

    def _close(self) -> None:
        environment, self._environment = self._environment, None
        if environment is not None:
            environment.close()

    async def _run(self, function: Callable[[], T], method: str) -> T:
        if self._pool is None:
            return function()
        return await self._pool.call(function, what=f"{self._name}: {method}", started=self._started)

    def _started(self, call: Call[Any]) -> None:
        self._call = call


def numbers(found: Any) -> dict[str, float]:
    """The finite numbers of a mapping, truth values among them; all else is not for metrics."""
    if not isinstance(found, Mapping):
        return {}
    return {
        str(key): float(value)
        for key, value in found.items()
        if isinstance(value, (bool, int, float)) and math.isfinite(value)
    }


def _starts_inline(factory: EnvironmentFactory) -> bool:
    return getattr(factory, "starts_inline", False) or getattr(factory, "init", None) is BaseTextEnv.init


def _ends_inline(environment: Environment | None) -> bool:
    """Nothing to close and nothing to measure."""
    kind = type(environment)
    return environment is None or (
        getattr(kind, "close", None) is BaseTextEnv.close
        and getattr(kind, "get_metrics", None) in (None, BaseTextEnv.get_metrics)
    )
