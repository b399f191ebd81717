"""A session for each trajectory: a turn asks with its whole prompt, and what goes to the engine is what is new in it.

    the agent asks   [7 7 5]              [7 7 5 | 9 2 | 4 4]             [7 7 5 | 8 | 6]    9 2 was rewritten to 8
    the engine gets  [7 7 5] at the root  [4 4] after the first request   [7 7 5 8 6] at the root

A prompt goes on after the longest earlier prompt with its answer that it begins with, and starts at the root where
there is none. So agents, recorded answers and training know whole prompts only, and a request that comes from a
resumed run, whose session is new, simply starts at the root.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from skyrl_train.engines.base import Engine
from skyrl_train.errors import EngineError, RequestRejected
from skyrl_train.types import Completion, GenerateRequest, SessionRef

logger = logging.getLogger(__name__)


@dataclass(eq=False, kw_only=True)
class _Session:
    """One open session, of one trajectory at a time. `answered` is what its user can go on from, by request."""

    session_id: str
    answered: dict[str, tuple[int, ...]] = field(default_factory=dict)
    rejected: bool = False


class Sessions:
    """Owns the sessions that a run's trajectories have open in one engine. One event loop.

    With `max_idle` over 0 a session whose trajectory ended well is emptied and kept for another one, that many at most.
    Every other session is closed as soon as its trajectory ends, fails or is cancelled.
    """

    def __init__(self, engine: Engine, *, capacity: int, max_idle: int = 0) -> None:
        self._engine = engine
        self._capacity = capacity
        self._max_idle = max_idle
        self._in_use: dict[str, _Session] = {}
        self._idle: deque[str] = deque()
        self._emptying: set[str] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self._warned: set[str] = set()
        self.num_opened_total = 0
        """Sessions that the engine opened for us."""
        self.num_whole_total = 0
        """Requests that a session refused and that went out with their whole prompt."""

    @property
    def num_open(self) -> int:
        """In use, idle, and on the way from one to the other."""
        return len(self._in_use) + len(self._emptying) + len(self._idle)

    @asynccontextmanager
    async def one(self) -> AsyncIterator[SessionRef | None]:
        """A session for one trajectory, empty; None where the engine opens none: prompts then go out whole.

        A request that names it asks with its whole prompt, through `generate`.
        """
        session = await self._take()
        if session is None:
            yield None
            return
        ended_well = False
        try:
            yield SessionRef(session_id=session.session_id)
            ended_well = True
        finally:
            del self._in_use[session.session_id]
            keep = ended_well and len(self._idle) + len(self._emptying) < self._max_idle
            leave = self._empty if keep else self._close
            if keep:
                self._emptying.add(session.session_id)
            # Shielded: a trajectory that is cancelled twice must not leave its session behind.
            await asyncio.shield(self._in_background(leave(session.session_id)))

    async def generate(self, request: GenerateRequest) -> Completion:
        """A `GenerateFn`: the request's session, if it names one, gets what follows its longest answered history."""
        session = None if request.session is None else self._in_use.get(request.session.session_id)
        if session is None or session.rejected:
            return await self._engine.generate(replace(request, session=None))
        prompt = request.prompt_token_ids
        parent, num_known = _longest(session, prompt)
        ref = SessionRef(session_id=session.session_id, parent_request_id=parent)
        try:
            completion = await self._engine.generate(replace(request, prompt_token_ids=prompt[num_known:], session=ref))
        except RequestRejected as exc:
            return await self._whole(request, session, exc)
        if completion.finish_reason != "abort":
            session.answered[request.request_id] = prompt + completion.token_ids
        return completion

    async def close(self) -> None:
        """Close all that is open; trajectories have ended by now. Returns when the engine has answered."""
        self._max_idle = 0
        while self._closing:  # what is being emptied comes to be idle
            await asyncio.gather(*self._closing)
        idle, self._idle = self._idle, deque()
        await asyncio.gather(*(self._close(session_id) for session_id in (*idle, *self._in_use)))

    # -- opening and closing

    async def _take(self) -> _Session | None:
        session_id = self._idle.popleft() if self._idle else await self._open()
        if session_id is None:
            return None
        session = _Session(session_id=session_id)
        assert session.session_id not in self._in_use, (session.session_id, list(self._in_use))
        self._in_use[session.session_id] = session
        return session

    async def _open(self) -> str | None:
        info = self._engine.info
        if "sessions" not in info.capabilities:
            self._warn("open", f"engine {info.name} has no sessions; prompts go out whole, to the same tokens")
            return None
        opening = asyncio.ensure_future(self._engine.open_session(self._capacity))
        try:
            session_id = await asyncio.shield(opening)
        except RequestRejected as exc:
            self._warn("open", f"engine {info.name} opens no session, prompts go out whole, to the same tokens: {exc}")
            return None
        except asyncio.CancelledError:
            # The engine may have opened it all the same.
            self._in_background(self._close_when_open(opening))
            raise
        self.num_opened_total += 1
        return session_id

    async def _close_when_open(self, opening: asyncio.Future[str]) -> None:
        try:
            session_id = await opening
        except EngineError:
            return  # there is none
        await self._close(session_id)

    async def _empty(self, session_id: str) -> None:
        try:
            await self._engine.clear_session(session_id)
        except EngineError:  # a request of its user still runs in it, or the engine is gone
            await self._close(session_id)
        else:
            self._idle.append(session_id)
        finally:
            self._emptying.discard(session_id)

    async def _close(self, session_id: str) -> None:
        try:
            await self._engine.close_session(session_id)
        except EngineError as exc:
            # The engine is gone, and the session with it; whoever needs the engine meets the error himself.
            logger.warning("session %s could not be closed: %s", session_id, exc)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
        return task

    # -- requests that a session refuses

    async def _whole(self, request: GenerateRequest, session: _Session, refused: RequestRejected) -> Completion:
        """The request with its whole prompt; if the session alone was in the way, the trajectory goes on like this."""
        completion = await self._engine.generate(replace(request, session=None))
        session.rejected = True
        self.num_whole_total += 1
        self._warn("request", f"a session refused a request; its trajectory goes on with whole prompts: {refused}")
        return completion

    def _warn(self, about: str, message: str) -> None:
        """Once a run for each cause."""
        if about not in self._warned:
            self._warned.add(about)
            logger.warning("generator.sessions: %s", message)


def _longest(session: _Session, prompt: tuple[int, ...]) -> tuple[str | None, int]:
    """The answered request that the prompt goes on after, and how many tokens that covers; (None, 0) at the root.

    At least one token is left: a request needs a prompt.
    """
    best: tuple[str | None, int] = (None, 0)
    for request_id, history in session.answered.items():
        size = len(history)
        if best[1] < size < len(prompt) and prompt[:size] == history:
            best = (request_id, size)
    return best
