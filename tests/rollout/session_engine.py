"""A real engine with sessions: the embedded one behind a session book, which gives it whole prompts."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from skyrl_train.engines.base import EngineInfo, EngineStats, Occupant, PauseMode
from skyrl_train.engines.embedded.engine import EmbeddedEngine
from skyrl_train.engines.server.sessions import Node, SessionBook
from skyrl_train.types import Completion, GenerateRequest, SessionRef, WeightUpdate


class SessionEngine:
    """Implements `Engine`. `sent` are the requests as they came; `opening` and `emptying` unset hold these
    calls up.
    """

    def __init__(self, engine: EmbeddedEngine, *, capabilities: Sequence[Any] = ("sessions", "priority")) -> None:
        self.engine = engine
        self.book = SessionBook("e")
        self.sent: list[GenerateRequest] = []
        self.opening = asyncio.Event()
        self.opening.set()
        self.emptying = asyncio.Event()
        self.emptying.set()
        self._info = replace(engine.info, capabilities=engine.info.capabilities | frozenset(capabilities))

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def prompts(self) -> dict[str, tuple[str | None, int]]:
        """By request: its parent, and how many tokens it brought along."""
        return {
            r.request_id: (None if r.session is None else r.session.parent_request_id, len(r.prompt_token_ids))
            for r in self.sent
        }

    async def start(self) -> None:
        await self.engine.start()

    async def generate(self, request: GenerateRequest) -> Completion:
        self.sent.append(request)
        if request.session is None:
            return await self.engine.generate(request)
        return await self._in_session(request, request.session)

    async def _in_session(self, request: GenerateRequest, ref: SessionRef) -> Completion:
        name, new = request.request_id, request.prompt_token_ids
        before = self.book.reserve(ref, name, len(new), request.sampling.max_new_tokens)
        node: Node | None = None
        try:
            completion = await self.engine.generate(replace(request, prompt_token_ids=before + new, session=None))
            node = Node(parent=ref.parent_request_id, token_ids=new + completion.token_ids)
        finally:
            self.book.settle(ref, name, node)
            self.book.check_integrity()
        return completion

    async def open_session(self, capacity: int) -> str:
        session_id = self.book.open(capacity)
        await self.opening.wait()
        return session_id

    async def clear_session(self, session_id: str) -> None:
        await self.emptying.wait()
        self.book.clear(session_id)

    async def close_session(self, session_id: str) -> None:
        self.book.close(session_id)

    async def stats(self) -> EngineStats:
        return replace(await self.engine.stats(), num_sessions=len(self.book))

    async def abort(self, request_ids: Sequence[str]) -> None:
        await self.engine.abort(request_ids)

    async def pause(self, mode: PauseMode = "keep") -> None:
        await self.engine.pause(mode)

    async def resume(self) -> None:
        await self.engine.resume()

    async def prepare_weights(self, update: WeightUpdate) -> None:
        await self.engine.prepare_weights(update)

    async def update_weights(self, update: WeightUpdate) -> None:
        await self.engine.update_weights(update)

    async def flush_cache(self) -> None:
        await self.engine.flush_cache()

    async def sleep(self, release: Sequence[Occupant]) -> None:
        await self.engine.sleep(release)

    async def wake(self, restore: Sequence[Occupant]) -> None:
        await self.engine.wake(restore)

    async def metrics_text(self) -> str:
        return ""

    async def close(self) -> None:
        await self.engine.close()
