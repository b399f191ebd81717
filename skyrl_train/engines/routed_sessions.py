"""Sessions over several engines: each lives in one of them, from its first request on.

    open ──► unbound ──first request: its prompt says which engine──► bound ──► closed
                ▲                                                       │
                └────────────── its engine goes out of rotation ────────┘   what was in it is lost

A session that is bound only by its first request lies where the other samples of that prompt are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from skyrl_train.engines.rotation import Place, Rotation
from skyrl_train.errors import EngineUnavailable, RequestRejected
from skyrl_train.types import GenerateRequest, SessionRef


@dataclass(eq=False, kw_only=True)
class _Session:
    """`inner_id` is the engine's name for it. `fresh`: nothing is in it yet. `turn` orders what binds and unbinds."""

    capacity: int
    place: Place | None = None
    inner_id: str = ""
    fresh: bool = True
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)


class RoutedSessions:
    """All open sessions of a router. `choose` says where a request goes that no session holds."""

    def __init__(self, name: str, rotation: Rotation, choose: Callable[[GenerateRequest], Place]) -> None:
        self._name = name
        self._rotation = rotation
        self._choose = choose
        self._sessions: dict[str, _Session] = {}
        self._num_opened = 0

    @property
    def num_unbound(self) -> int:
        """Open ones that no engine knows of."""
        return sum(session.place is None for session in self._sessions.values())

    def open(self, capacity: int) -> str:
        """What an engine objects to is its first request's RequestRejected."""
        if capacity < 1:
            raise RequestRejected(f"engine {self._name}: a session of {capacity} tokens holds nothing; ask for more")
        self._num_opened += 1
        session_id = f"routed-session-{self._num_opened}"
        self._sessions[session_id] = _Session(capacity=capacity)
        return session_id

    async def place_of(self, request: GenerateRequest, ref: SessionRef) -> tuple[Place, SessionRef]:
        """The engine that has the request's session, and its own words for it; opened there if none has it.

        Raises RequestRejected when what the request goes on after is lost: its whole prompt is needed.
        """
        session = self._find(ref.session_id)
        async with session.turn:
            if session.place is not None and session.fresh and self._choose(request) is not session.place:
                await self._unbind(session)  # cleared; its next user's prompt is elsewhere
            if session.place is None:
                if ref.parent_request_id is not None:
                    raise RequestRejected(
                        f"request {request.request_id}: session {ref.session_id} has lost {ref.parent_request_id}, "
                        "its engine went out of rotation; send the whole prompt"
                    )
                await self._bind(session, request)
            place = session.place
            if self._sessions.get(ref.session_id) is not session or place is None:
                await self._unbind(session)
                raise RequestRejected(f"request {request.request_id}: session {ref.session_id} was closed meanwhile")
            session.fresh = False
        return place, SessionRef(session_id=session.inner_id, parent_request_id=ref.parent_request_id)

    async def clear(self, session_id: str) -> None:
        session = self._find(session_id)
        async with session.turn:
            if session.place is not None:
                try:
                    await session.place.engine.clear_session(session.inner_id)
                except EngineUnavailable as exc:
                    self._rotation.take_out(session.place, exc)
            session.fresh = True

    async def close(self, session_id: str) -> None:
        """An unknown id is fine."""
        session = self._sessions.pop(session_id, None)
        if session is not None:
            async with session.turn:
                await self._unbind(session)

    def lose(self, place: Place) -> None:
        """The engine is out of rotation: its sessions hold nothing any more."""
        for session in self._sessions.values():
            if session.place is place:
                session.place, session.fresh = None, True
                place.left_sessions.add(session.inner_id)

    async def _bind(self, session: _Session, request: GenerateRequest) -> None:
        while session.place is None:
            place = self._choose(request)
            # Counted as load from here on: many sessions may be opened at once, each for a prompt of its own.
            place.num_in_flight += 1
            try:
                session.inner_id = await place.engine.open_session(session.capacity)
                session.place = place
            except EngineUnavailable as exc:
                self._rotation.take_out(place, exc)
            finally:
                place.num_in_flight -= 1

    async def _unbind(self, session: _Session) -> None:
        place, session.place = session.place, None
        if place is None:
            return
        try:
            await place.engine.close_session(session.inner_id)
        except EngineUnavailable as exc:
            place.left_sessions.add(session.inner_id)
            self._rotation.take_out(place, exc)

    def _find(self, session_id: str) -> _Session:
        session = self._sessions.get(session_id)
        if session is None:
            raise RequestRejected(f"engine {self._name} has no session {session_id}; it was closed or never opened")
        return session
