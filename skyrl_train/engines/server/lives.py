"""Which life of its server an engine is in, and how it gets from one to the next.

up ──► lost: its watch, a broken request or a broken call says so ──► ended ──► the next life begins, settles ──► up
                                                                        │ asleep: buried, until it is needed
                                                                        └ none is left: failed, for all who wait
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from skyrl_train.engines.server.client import ServerClient
from skyrl_train.engines.server.lifeline import Life, Lifeline, OutOfLives
from skyrl_train.errors import EngineError, EngineUnavailable, SkyRLError, WeightsTorn, WeightUpdateError

logger = logging.getLogger(__name__)

MAX_TRIES = 5
"""How often in a row a server that others run may fail while it settles."""
RETRY_S = 0.02
"""After one connection broke."""


class Lives:
    """Of one engine, which says what belongs to a life:

    `ended` is told when one is over: then nothing may be left of it. `settle` makes the next one fit for requests, or
    raises: EngineUnavailable and WeightsTorn, and one life more is tried; a WeightUpdateError of a server that
    answers goes to `refused`, which keeps that life or raises. `sleeps`: nobody needs a server now. `changed` is
    called whenever somebody may have waited for this.
    """

    def __init__(
        self,
        name: str,
        lifeline: Lifeline,
        *,
        ended: Callable[[Life], Awaitable[None]],
        settle: Callable[[Life], Awaitable[None]],
        refused: Callable[[WeightUpdateError], None],
        sleeps: Callable[[], bool],
        changed: Callable[[], None],
    ) -> None:
        self._name = name
        self._lifeline = lifeline
        self._ended = ended
        self._settle = settle
        self._refused = refused
        self._sleeps = sleeps
        self._changed = changed
        self._life: Life | None = None
        self._watch: asyncio.Task[None] | None = None
        self._revival: asyncio.Task[None] | None = None
        self._buried: str | None = None
        """Why a server ended that slept."""
        self._failure: Exception | None = None
        self._closed = False

    @property
    def life(self) -> Life:
        """The present one, or the last."""
        assert self._life is not None, f"engine {self._name} was not started"
        return self._life

    @property
    def is_up(self) -> bool:
        """As far as anybody has noticed."""
        return self._life is not None and not (self._revival or self._buried or self._failure or self._closed)

    @property
    def is_reviving(self) -> bool:
        return self._revival is not None

    @property
    def is_buried(self) -> bool:
        """It ended in its sleep; `unbury` begins the next life."""
        return self._buried is not None

    @property
    def is_over(self) -> bool:
        return self._failure is not None or self._closed

    def check_open(self) -> None:
        """Raises EngineUnavailable once there will be no life more."""
        if self._failure is not None:
            raise EngineUnavailable(f"engine {self._name} is lost: {self._failure}") from self._failure
        if self._closed:
            raise EngineUnavailable(f"engine {self._name} is closed")

    async def start(self) -> Life:
        """The first life, not watched yet. Raises EngineUnavailable or ConfigError."""
        self._life = await self._lifeline.start()
        return self._life

    def watch(self) -> None:
        self._watch = asyncio.create_task(self._look_after(self.life), name=f"watch {self._name}")

    async def answers(self, life: Life) -> bool:
        return self._lifeline.is_running() and await life.client.is_healthy()

    async def lost(self, life: Life, reason: str) -> bool:
        """An attempt or a call broke. False: the server answers, it was one connection. True, at once: this life is
        over, and the next one is on its way.
        """
        if self.is_up and self._life is life and await self.answers(life):
            return False
        self.lose(life, reason, is_ending=True)
        return True

    def lose(self, life: Life, reason: str, *, is_ending: bool = False) -> None:
        """This life is over, whatever its server says. `is_ending`: its end is on its way and will say more."""
        if not self.is_up or self._life is not life:
            return
        if self._watch is not None and self._watch is not asyncio.current_task():
            self._watch.cancel()
        self._watch = None
        self._revival = asyncio.create_task(self._revive(life, reason, is_ending), name=f"revive {self._name}")
        self._changed()

    async def revived(self) -> None:
        """Returns once nothing is on its way between two lives. Raises EngineUnavailable where none is left."""
        while self._revival is not None:
            await asyncio.wait({self._revival})
        self.check_open()

    async def unbury(self) -> None:
        """The next life after one that ended in its sleep. It is awake, all of it."""
        assert self._buried is not None
        reason, self._buried = self._buried, None
        self.lose(self.life, reason)
        await self.revived()

    async def call(self, call: Callable[[ServerClient], Awaitable[None]]) -> None:
        """A control call that may be repeated; a server that is lost meanwhile is brought up and asked again. One that
        ended in its sleep is asked nothing.
        """
        broke_in: Life | None = None
        while True:
            await self.revived()
            if self.is_buried:
                return
            life = self.life
            try:
                await call(life.client)
                return
            except EngineUnavailable as exc:
                if not await self.lost(life, str(exc)):
                    if broke_in is life:
                        raise
                    broke_in = life
                    await asyncio.sleep(RETRY_S)

    async def close(self) -> bool:
        """No more lives. Returns whether the present one was up; its server is still there."""
        was_up, self._closed = self.is_up, True
        self._changed()
        tasks = [task for task in (self._watch, self._revival) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return was_up

    async def _look_after(self, life: Life) -> None:
        """Until this life is over."""
        try:
            reason = await self._lifeline.wait_dead(life)
        except Exception as exc:  # the boundary of a task that nobody awaits: unwatched, an engine is lost
            self._fail(exc)
        else:
            self.lose(life, reason)

    async def _revive(self, life: Life, reason: str, is_ending: bool) -> None:
        try:
            if is_ending:
                reason = await self._lifeline.account(reason)
            await self._ended(life)
            if self._sleeps() and self._lifeline.is_ours:
                self._buried = reason
            else:
                await self._begin_next(life, reason)
        except Exception as exc:  # the one boundary: every caller gets it, chained
            self._fail(exc)
        finally:
            self._revival = None
            self._changed()

    async def _begin_next(self, life: Life, reason: str) -> None:
        """Raises what can't be helped by one life more."""
        tries = 0
        while True:
            tries += 1
            try:
                life = self._life = await self._lifeline.revive(life, reason)
            except OutOfLives:
                raise
            except (EngineUnavailable, WeightUpdateError) as exc:
                failure: EngineError = exc
            else:
                found = await self._settled(life)
                if found is None:
                    self.watch()
                    return
                failure = found
            if not self._lifeline.is_ours and tries == MAX_TRIES:
                raise failure
            reason = str(failure)
            await self._ended(life)

    async def _settled(self, life: Life) -> EngineError | None:
        """None, or why this life is over already."""
        try:
            await self._settle(life)
        except EngineUnavailable as exc:
            return EngineUnavailable(await self._lifeline.account(str(exc)))
        except WeightUpdateError as exc:
            if (self._lifeline.is_ours and isinstance(exc, WeightsTorn)) or not await self.answers(life):
                return exc
            self._refused(exc)
        return None

    def _fail(self, exc: Exception) -> None:
        self._failure = exc
        if not isinstance(exc, SkyRLError):
            logger.error("engine %s is lost", self._name, exc_info=exc)
        self._changed()
