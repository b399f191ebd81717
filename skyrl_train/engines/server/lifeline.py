"""One server's lives: up, noticed dead, up again. Every life has a client and a channel of its own.

start ──► life 1 ──► dead (its process ended, or it stopped answering) ──► life 2 ──► …    at most `max_restarts`

Whoever owns the lives ends one (`end`) before the next one begins (`revive`); that may be much later.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass

from skyrl_train.engines.server.client import ServerClient
from skyrl_train.engines.server.process import ServerProcess
from skyrl_train.errors import EngineUnavailable
from skyrl_train.weight_sync.channel import WeightChannel

logger = logging.getLogger(__name__)

ACCOUNT_TIMEOUT_S = 5.0
"""A server that answers that it broke takes a moment to end."""
LOOP_HELD_S = 30.0


class OutOfLives(EngineUnavailable):
    """The server died too often, or stayed away for too long: it is not brought up again."""


@dataclass(frozen=True, kw_only=True)
class HealthPolicy:
    """`max_failures` checks in a row without an answer, `interval_s` apart, and a server counts as dead."""

    interval_s: float = 10.0
    max_failures: int = 3
    attached_timeout_s: float = 600.0
    """How long a server that somebody else runs may be away before the run gives up."""


@dataclass(frozen=True, kw_only=True)
class Life:
    """`number` counts from 1: what the server of an earlier life kept is gone."""

    number: int
    url: str
    client: ServerClient
    channel: WeightChannel


class Lifeline:
    """`process` is a server of ours; `url` one that somebody else runs. Give one of them."""

    def __init__(
        self,
        name: str,
        *,
        process: ServerProcess | None = None,
        url: str | None = None,
        connect: Callable[[str], ServerClient],
        open_channel: Callable[[str], WeightChannel],
        health: HealthPolicy | None = None,
        max_restarts: int = 5,
    ) -> None:
        assert (process is None) is not (url is None), (process, url)
        self._name = name
        self._process = process
        self._url = url
        self._connect = connect
        self._open_channel = open_channel
        self._health = health or HealthPolicy()
        self._max_restarts = max_restarts
        self.num_restarts = 0

    @property
    def is_ours(self) -> bool:
        return self._process is not None

    async def start(self) -> Life:
        """The first life. Raises EngineUnavailable, or ConfigError where the server isn't what was asked for."""
        url = await self._process.start() if self._process is not None else str(self._url)
        return await self._begin(1, url)

    async def end(self, life: Life) -> None:
        """This life is over: calls that are under way break, and of a process of ours nothing is left. The channel
        stays, for what may still move through it."""
        await life.client.close()
        if self._process is not None:
            await self._process.stop()

    async def revive(self, life: Life, reason: str) -> Life:
        """The next life after `life`, which was ended.

        Raises OutOfLives when there have been too many; another EngineUnavailable when this start failed and the next
        one may succeed; ConfigError where the server isn't what was asked for.
        """
        await self._leave(life)
        if self._process is not None:
            if self.num_restarts >= self._max_restarts:
                raise OutOfLives(
                    f"engine {self._name} died {self.num_restarts + 1} times and is not started again: {reason}"
                )
            self.num_restarts += 1
            logger.warning("engine %s is started again: %s", self._name, reason)
            url = await self._process.restart()
        else:
            logger.warning("engine %s does not answer and is waited for: %s", self._name, reason)
            url = await self._wait_for_attached(str(self._url))
        return await self._begin(life.number + 1, url)

    async def wait_dead(self, life: Life) -> str:
        """Returns once this life is over: why."""
        if self._process is not None:
            return await self._process.watch(interval_s=self._health.interval_s, max_failures=self._health.max_failures)
        return await self._unanswered(life.client)

    async def account(self, otherwise: str) -> str:
        """What ended our process, with the end of its log, if it ends within moments; else `otherwise`."""
        if self._process is None:
            return otherwise
        try:
            async with asyncio.timeout(ACCOUNT_TIMEOUT_S):
                return await self._process.wait_dead()
        except TimeoutError:
            return otherwise

    def is_running(self) -> bool:
        """Whether our process is there at all; True for a server of somebody else's."""
        return self._process is None or self._process.is_running

    async def stop(self, life: Life | None) -> None:
        """The end: connections, channel, and the process if it is ours."""
        try:
            if life is not None:
                await self._leave(life)
        finally:
            if self._process is not None:
                await self._process.stop()

    async def _begin(self, number: int, url: str) -> Life:
        client, channel = self._connect(url), None
        try:
            await client.check_identity()
            channel = self._open_channel(url)
            await channel.open()
        except BaseException:
            if channel is not None:
                await self._close_channel(channel)
            await client.close()
            raise
        return Life(number=number, url=url, client=client, channel=channel)

    async def _leave(self, life: Life) -> None:
        await life.client.close()
        await self._close_channel(life.channel)

    async def _close_channel(self, channel: WeightChannel) -> None:
        try:
            await channel.close()
        except Exception as exc:  # the other end may be gone already; what counts is that ours is closed
            logger.warning("engine %s: closing its weight channel: %s", self._name, exc)

    async def _unanswered(self, client: ServerClient) -> str:
        failures, loop = 0, asyncio.get_running_loop()
        while failures < self._health.max_failures:
            due = loop.time() + self._health.interval_s
            await asyncio.sleep(self._health.interval_s)
            if await client.is_healthy():
                failures = 0
            elif loop.time() - due < LOOP_HELD_S:
                # Later than that a training step held the event loop: the check says nothing of the server.
                failures += 1
        return f"it did not answer {failures} health checks in a row, {self._health.interval_s:g} s apart"

    async def _wait_for_attached(self, url: str) -> str:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._health.attached_timeout_s
        client = self._connect(url)
        try:
            while not await client.is_healthy():
                if loop.time() > deadline:
                    raise OutOfLives(
                        f"engine {self._name} at {url} did not come back within {self._health.attached_timeout_s:g} s"
                    )
                await asyncio.sleep(min(self._health.interval_s, 1.0))
        finally:
            with contextlib.suppress(EngineUnavailable):
                await client.close()
        return url
