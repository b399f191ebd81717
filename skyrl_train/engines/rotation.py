"""Which of several engines are in use: who says EngineUnavailable is out until it answers again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from skyrl_train.engines.base import Engine, EngineStats
from skyrl_train.errors import EngineError, EngineUnavailable
from skyrl_train.types import WeightUpdate

logger = logging.getLogger(__name__)


@dataclass(eq=False, kw_only=True)
class Place:
    """One engine. `lost` is why it is out of rotation, None while it is in; `given` the last update that it has whole;
    `stats` what it said last. `left_requests` and `left_sessions` are what it may still hold of us after a loss.
    """

    index: int
    engine: Engine
    num_in_flight: int = 0
    lost: str | None = None
    given: WeightUpdate | None = None
    stats: EngineStats | None = None
    left_requests: set[str] = field(default_factory=set)
    left_sessions: set[str] = field(default_factory=set)

    @property
    def name(self) -> str:
        return self.engine.info.name


class Rotation:
    """Owns the places. `on_loss` is called when one goes out. `bring_back`, tried every `check_interval_s` seconds,
    clears `lost` once the engine is fit for requests, or raises an EngineError that says why it isn't yet.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        *,
        name: str,
        check_interval_s: float,
        on_loss: Callable[[Place], None],
        bring_back: Callable[[Place], Awaitable[None]],
    ) -> None:
        self.places = [Place(index=index, engine=engine) for index, engine in enumerate(engines)]
        self._name = name
        self._check_interval_s = check_interval_s
        self._on_loss = on_loss
        self._bring_back = bring_back
        self._waiting: set[asyncio.Task[None]] = set()
        self._closed = False

    @property
    def remaining(self) -> list[Place]:
        """Those in use, maybe none."""
        return [place for place in self.places if place.lost is None]

    def live(self) -> list[Place]:
        """Those in use, at least one. Raises EngineUnavailable."""
        if self._closed:
            raise EngineUnavailable(f"engine {self._name} is closed")
        if live := self.remaining:
            return live
        reasons = "; ".join(f"{place.name}: {place.lost}" for place in self.places)
        raise EngineUnavailable(f"all {len(self.places)} engines are out of rotation: {reasons}")

    def take_out(self, place: Place, exc: EngineUnavailable) -> None:
        """Its engine is not there any more."""
        if place.lost is not None or self._closed:
            return
        place.lost = str(exc)
        logger.warning("engine %s is out of rotation, its requests go to others: %s", place.name, exc)
        self._on_loss(place)
        task = asyncio.create_task(self._wait_for(place), name=f"engine {place.name} out of rotation")
        self._waiting.add(task)
        task.add_done_callback(self._waiting.discard)

    async def call(self, places: Sequence[Place], call: Callable[[Place], Awaitable[None]]) -> None:
        """On all at once; returns when all have ended. Who is unavailable is taken out, any other error is raised.

        Raises EngineUnavailable when none is left. Cancelled, it cancels all calls and waits for their ends.
        """
        others = []
        for place, error in zip(places, await gather_all([call(place) for place in places]), strict=True):
            if isinstance(error, EngineUnavailable):
                self.take_out(place, error)
            elif error is not None:
                others.append(error)
        for error in others[1:]:
            logger.warning("engine %s: %s", self._name, error)
        if others:
            raise others[0]
        self.live()

    async def close(self) -> None:
        """No more comebacks, and all engines are closed, also those out of rotation."""
        self._closed = True
        tasks = list(self._waiting)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for error in await gather_all([place.engine.close() for place in self.places]):
            if error is not None:
                raise error

    async def _wait_for(self, place: Place) -> None:
        said = place.lost
        while place.lost is not None and not self._closed:
            await asyncio.sleep(self._check_interval_s)
            try:
                await self._bring_back(place)
            except (EngineError, TimeoutError) as exc:
                if str(exc) != said:
                    said = str(exc)
                    logger.warning("engine %s stays out of rotation: %s", place.name, exc)
            except Exception:  # the boundary of a task that nobody awaits: the other engines serve on
                logger.exception("engine %s stays out of rotation", place.name)
        logger.info("engine %s is back in the rotation", place.name)


async def gather_all(calls: Sequence[Awaitable[None]]) -> list[BaseException | None]:
    """Each call's error, None for none. Unlike asyncio.gather, a cancelled one returns after all calls have ended."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    if not tasks:
        return []
    try:
        await asyncio.wait(tasks)
    except asyncio.CancelledError:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
    return [task.exception() for task in tasks]
