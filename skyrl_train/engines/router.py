"""Several engines as one: each holds a copy of the policy.

    generate ──► affinity: prefix, else load ──► engine 0     live
                                             ├─► engine 1     live
                                             └─✗ engine 2     out of rotation: it said EngineUnavailable
                                                  └─ asked every few seconds; answers ──► current weights ──► live

A request of an engine that goes out of rotation is sent to another one and comes back once, from whichever answers.
Control calls go to all live engines at once; `_control` keeps them and a returning engine apart.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from skyrl_train.engines.affinity import Affinity
from skyrl_train.engines.base import Engine, EngineInfo, EngineStats, Occupant, PauseMode
from skyrl_train.engines.deadline import Deadline
from skyrl_train.engines.joined import joined_info, joined_metrics, joined_stats
from skyrl_train.engines.rotation import Place, Rotation, gather_all
from skyrl_train.engines.routed_sessions import RoutedSessions
from skyrl_train.errors import EngineUnavailable, RequestRejected, WeightUpdateError
from skyrl_train.types import AdapterWeights, Completion, GenerateRequest, NamedWeights, WeightUpdate

logger = logging.getLogger(__name__)

CHECK_TIMEOUT_S = 30.0


@dataclass(eq=False, kw_only=True)
class _Running:
    """A request on its way. `aborted` is read between two engines: it then ends before it goes to the next one."""

    place: Place | None = None
    aborted: bool = False


class RoutedEngine:
    """Implements `engines.base.Engine` over engines that serve the same model. Owns them: `close` closes all.

    Raises ConfigError for engines that differ in model or log-probability space.
    """

    def __init__(
        self, engines: Sequence[Engine], *, check_interval_s: float = 10.0, affinity: Affinity | None = None
    ) -> None:
        self._info = joined_info([engine.info for engine in engines])
        self._affinity = affinity or Affinity()
        self._rotation = Rotation(
            engines,
            name=self._info.name,
            check_interval_s=check_interval_s,
            on_loss=lambda place: self._sessions.lose(place),
            bring_back=self._bring_back,
        )
        self._sessions = RoutedSessions(self._info.name, self._rotation, self._choose)
        self._running: dict[str, _Running] = {}
        self._num_resent = 0
        self._control = asyncio.Lock()
        self._paused = False
        self._asleep: set[Occupant] = set()
        self._update: WeightUpdate | None = None
        """The last one that is whole."""
        self._torn: str | None = None
        self._version_before: int | None = None
        """While an update is under way: the version that all had."""
        self._closed = False

    @property
    def info(self) -> EngineInfo:
        """Model and space of all, the capabilities that each has, the shortest context; the names joined by +."""
        return self._info

    @property
    def out_of_rotation(self) -> dict[str, str]:
        """Why, by the engine's name."""
        return {place.name: place.lost for place in self._rotation.places if place.lost is not None}

    async def start(self) -> None:
        """All at once. If one can't start, all are closed and its error is raised."""
        try:
            for error in await gather_all([place.engine.start() for place in self._rotation.places]):
                if error is not None:
                    raise error
        except BaseException:
            await self.close()
            raise

    # -- requests

    async def generate(self, request: GenerateRequest) -> Completion:
        name = request.request_id
        if name in self._running:
            raise RequestRejected(f"request {name}: engine {self._info.name} has a running request of this id")
        async with Deadline(request, self.abort) as deadline:
            # The time goes on while the request moves from an engine to another.
            return deadline.marked(await self._serve(replace(request, deadline_s=None)))

    async def _serve(self, request: GenerateRequest) -> Completion:
        name = request.request_id
        running = self._running[name] = _Running()
        try:
            while True:
                place, routed = await self._route(request)
                if running.aborted:
                    return _ended_early(request)
                running.place = place
                place.num_in_flight += 1
                try:
                    return await place.engine.generate(routed)
                except EngineUnavailable as exc:
                    place.left_requests.add(name)
                    self._rotation.take_out(place, exc)
                finally:
                    place.num_in_flight -= 1
                    running.place = None
                self._rotation.live()
                self._num_resent += 1
        finally:
            del self._running[name]

    async def abort(self, request_ids: Sequence[str]) -> None:
        found: dict[Place, list[str]] = {}
        for name in request_ids:
            running = self._running.get(name)
            if running is None:
                continue
            running.aborted = True
            if running.place is not None:
                found.setdefault(running.place, []).append(name)
        if found:
            await self._rotation.call(list(found), lambda place: place.engine.abort(found[place]))

    async def _route(self, request: GenerateRequest) -> tuple[Place, GenerateRequest]:
        """Where it goes now, in that engine's own words."""
        if request.session is None:
            return self._choose(request), request
        place, ref = await self._sessions.place_of(request, request.session)
        return place, replace(request, session=ref)

    def _choose(self, request: GenerateRequest) -> Place:
        loads = {place.index: place.num_in_flight for place in self._rotation.live()}
        return self._rotation.places[self._affinity.choose(request.request_id, loads)]

    # -- sessions

    async def open_session(self, capacity: int) -> str:
        """Its engine is chosen by its first request. If that engine goes out of rotation, what was in it is lost: a
        request that goes on after it is rejected, and one with a whole prompt starts it anew.
        """
        self._rotation.live()
        if "sessions" not in self._info.capabilities:
            raise RequestRejected(f"engine {self._info.name} has no sessions; send whole prompts")
        return self._sessions.open(capacity)

    async def clear_session(self, session_id: str) -> None:
        await self._sessions.clear(session_id)

    async def close_session(self, session_id: str) -> None:
        await self._sessions.close(session_id)

    # -- control

    async def pause(self, mode: PauseMode = "keep") -> None:
        """All or none: when one refuses, or the caller is cancelled, the engines go on if they ran before."""
        async with self._control:
            try:
                await self._rotation.call(self._rotation.live(), lambda place: place.engine.pause(mode))
            except BaseException:
                if not self._paused:
                    await asyncio.shield(gather_all([place.engine.resume() for place in self._rotation.remaining]))
                raise
            self._paused = True

    async def resume(self) -> None:
        async with self._control:
            if self._torn is not None:
                raise WeightUpdateError(f"{self._torn}; repeat the update before resume")
            await self._rotation.call(self._rotation.live(), lambda place: place.engine.resume())
            self._paused = False

    async def prepare_weights(self, update: WeightUpdate) -> None:
        """By each live engine; one that fails ends the update before it began."""
        async with self._control:
            await self._rotation.call(self._rotation.live(), lambda place: place.engine.prepare_weights(update))

    async def update_weights(self, update: WeightUpdate) -> None:
        """Whole when all live engines have it; one that is out of rotation gets it before it comes back.

        If one fails, all stay paused until a whole update: engines must not serve different versions.
        """
        async with self._control:
            if not self._paused:
                raise WeightUpdateError(f"engine {self._info.name} must be paused for a weight update")
            self._version_before = max(await self._versions())

            async def give(place: Place) -> None:
                place.given = None
                await place.engine.update_weights(update)
                place.given = update

            self._torn = f"version {update.version} is not in all engines, they stay paused"
            try:
                await self._rotation.call(self._rotation.live(), give)
            except WeightUpdateError as exc:
                missing = [place.name for place in self._rotation.remaining if place.given is not update]
                self._torn = f"version {update.version} did not reach {', '.join(missing)}; all engines stay paused"
                raise type(exc)(f"{self._torn}: {exc}") from exc
            finally:
                self._version_before = None
            self._update, self._torn = update, None
            self._affinity.forget()

    async def flush_cache(self) -> None:
        async with self._control:
            await self._rotation.call(self._rotation.live(), lambda place: place.engine.flush_cache())
            self._affinity.forget()

    async def sleep(self, release: Sequence[Occupant]) -> None:
        async with self._control:
            await self._rotation.call(self._rotation.live(), lambda place: place.engine.sleep(release))
            self._asleep |= set(release)
            self._affinity.forget()

    async def wake(self, restore: Sequence[Occupant]) -> None:
        async with self._control:
            await self._rotation.call(self._rotation.live(), lambda place: place.engine.wake(restore))
            self._asleep -= set(restore)

    async def close(self) -> None:
        """Open requests fail with EngineUnavailable. A second call does nothing."""
        if not self._closed:
            self._closed = True
            await self._rotation.close()

    # -- figures

    async def stats(self) -> EngineStats:
        """See `joined_stats`; sessions that no engine knows of yet count too. `policy_version` is that of all live
        engines, while an update is under way the one before. Raises WeightUpdateError when they differ.
        """

        async def read(place: Place) -> None:
            place.stats = await place.engine.stats()

        asked = self._rotation.live()
        await self._rotation.call(asked, read)
        known = {place.name: place.stats for place in asked if place.lost is None and place.stats is not None}
        gone = [place.stats for place in self._rotation.places if place.name not in known and place.stats is not None]
        version = self._version_before
        if version is None:
            versions = {name: stats.policy_version for name, stats in known.items()}
            version = next(iter(versions.values()))
            if self._torn is not None or set(versions.values()) != {version}:
                raise WeightUpdateError(f"{self._torn or 'engines serve different versions'}: {versions}")
        joined = joined_stats(list(known.values()), gone, policy_version=version)
        return replace(
            joined,
            num_sessions=joined.num_sessions + self._sessions.num_unbound,
            num_resent_total=joined.num_resent_total + self._num_resent,
        )

    async def metrics_text(self) -> str:
        """Of all live engines, each series with the label `engine`."""
        texts: dict[str, str] = {}

        async def read(place: Place) -> None:
            texts[place.name] = await place.engine.metrics_text()

        await self._rotation.call(self._rotation.live(), read)
        return joined_metrics(dict(sorted(texts.items())))

    async def _versions(self) -> list[int]:
        """Of the live engines."""
        found: list[int] = []

        async def read(place: Place) -> None:
            found.append((await place.engine.stats()).policy_version)

        await self._rotation.call(self._rotation.live(), read)
        return found

    def check_integrity(self) -> None:
        """For tests, while no session is being opened: load is what is under way."""
        for place in self._rotation.places:
            under_way = [name for name, running in self._running.items() if running.place is place]
            assert place.num_in_flight == len(under_way), (place.name, place.num_in_flight, under_way)

    # -- coming back

    async def _bring_back(self, place: Place) -> None:
        """Into the rotation, with the current weights and nothing of the past; or an EngineError: why not yet."""
        async with self._control:
            engine = place.engine
            # Not wait_for: in Python 3.11 it may lose a cancellation, and `close` would wait for ever.
            async with asyncio.timeout(CHECK_TIMEOUT_S):
                stats = await engine.stats()
            if self._asleep or self._torn is not None:
                raise EngineUnavailable("it answers; the others sleep or wait for a whole update")
            await engine.abort(sorted(place.left_requests))
            for session_id in sorted(place.left_sessions):
                await engine.close_session(session_id)
            await engine.pause("abort")
            if self._update is not None:
                await self._give_missed(place, self._update, served=stats.policy_version)
            elif self._rotation.remaining and set(await self._versions()) != {stats.policy_version}:
                raise WeightUpdateError(f"it serves version {stats.policy_version}, the others another one")
            if not self._paused:
                await engine.resume()
            place.left_requests.clear()
            place.left_sessions.clear()
            place.lost = None

    async def _give_missed(self, place: Place, update: WeightUpdate, *, served: int) -> None:
        """The trainer may be changing the tensors by now: then the engine waits for the next update."""
        if place.given is update and served == update.version:
            return
        place.given = None
        if _still_valid(update):
            await place.engine.update_weights(update)
            if _still_valid(update):
                place.given = update
                return
        raise WeightUpdateError(f"the trainer no longer has the weights of version {update.version} to give")


def _still_valid(update: WeightUpdate) -> bool:
    source = update.source
    return not isinstance(source, NamedWeights | AdapterWeights) or source.still_valid()


def _ended_early(request: GenerateRequest) -> Completion:
    """An abort that came while the request was between two engines: what it brought along is its answer."""
    if request.partial is not None:
        return replace(request.partial, request_id=request.request_id, finish_reason="abort", stop_reason=None)
    return Completion(request_id=request.request_id, token_ids=(), logprobs=(), finish_reason="abort", versions=())
