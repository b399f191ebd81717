"""Which sessions are open in a server that keeps sessions itself.

    first request of a session ──► opened, once a life, whoever asks first ──► closed when the book's session is

What was begun is ended, whoever went away meanwhile: no session stays behind in a server that goes on.
"""

from __future__ import annotations

import asyncio

from skyrl_train.engines.server.client import ServerClient
from skyrl_train.errors import EngineError

NO_LIMIT = 2**31 - 1
"""The book on our side holds the capacity."""


class NativeSessions:
    """The sessions of one engine in the server's present life."""

    def __init__(self) -> None:
        self._open: dict[str, asyncio.Task[EngineError | None]] = {}
        self._closing: dict[str, asyncio.Task[None]] = {}
        self._unclosed: set[str] = set()
        """Nobody knows whether the server has them: a call broke, whose answer would have told."""

    async def open(self, session_id: str, client: ServerClient) -> bool:
        """Returns whether that took a moment. Raises what the server said."""
        opening = self._open.get(session_id)
        if opening is None:
            opening = self._open[session_id] = asyncio.create_task(self._open_there(session_id, client))
        elif opening.done():
            return False
        await asyncio.wait({opening})
        if not opening.cancelled() and (error := opening.result()) is not None:
            raise error
        return True

    async def close(self, session_id: str, client: ServerClient) -> None:
        """One that isn't open is fine."""
        opening = self._open.pop(session_id, None)
        if opening is None and session_id not in self._unclosed:
            return
        closing = asyncio.create_task(self._close_there(session_id, client, opening))
        self._closing[session_id] = closing
        closing.add_done_callback(lambda done: self._closed(session_id, done))
        await asyncio.wait({closing})

    def forget(self) -> set[str]:
        """The life is over. Returns what a server that lives on all the same may still have open."""
        left = {*self._open, *self._closing, *self._unclosed}
        for task in (*self._open.values(), *self._closing.values()):
            task.cancel()
        self._open.clear()
        self._closing.clear()
        self._unclosed.clear()
        return left

    async def _open_there(self, session_id: str, client: ServerClient) -> EngineError | None:
        is_open = False
        try:
            if (closing := self._closing.get(session_id)) is not None:
                await asyncio.wait({closing})
            if session_id in self._unclosed:
                await client.close_session(session_id)
                self._unclosed.discard(session_id)
            await client.open_session(session_id, NO_LIMIT)
            is_open = True
        except EngineError as exc:
            return exc
        finally:
            if not is_open and self._open.get(session_id) is asyncio.current_task():
                del self._open[session_id]
                self._unclosed.add(session_id)
        return None

    async def _close_there(
        self, session_id: str, client: ServerClient, opening: asyncio.Task[EngineError | None] | None
    ) -> None:
        if opening is not None:
            await asyncio.wait({opening})
        try:
            await client.close_session(session_id)
        except EngineError:  # a server that is lost has closed it
            self._unclosed.add(session_id)
        else:
            self._unclosed.discard(session_id)

    def _closed(self, session_id: str, closing: asyncio.Task[None]) -> None:
        if self._closing.get(session_id) is closing:
            del self._closing[session_id]
