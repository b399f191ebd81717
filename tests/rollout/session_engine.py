"""The embedded engine, which writes down what it is asked and can be slow to open and to empty a session."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from skyrl_train.engines.base import EngineInfo
from skyrl_train.engines.embedded.engine import EmbeddedEngine
from skyrl_train.engines.session_book import SessionBook
from skyrl_train.types import Completion, GenerateRequest


class SessionEngine(EmbeddedEngine):
    """`sent` are the requests as they came; `opening` and `emptying` unset hold these calls up. `without` are
    capabilities that it says it hasn't.
    """

    def __init__(self, *args: Any, without: Collection[str] = (), **options: Any) -> None:
        super().__init__(*args, **options)
        self.sent: list[GenerateRequest] = []
        self.opening = asyncio.Event()
        self.opening.set()
        self.emptying = asyncio.Event()
        self.emptying.set()
        self._info = replace(self.core.info, capabilities=self.core.info.capabilities - set(without))

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def book(self) -> SessionBook:
        return self.core.sessions.book

    @property
    def prompts(self) -> dict[str, tuple[str | None, int]]:
        """By request: its parent, and how many tokens it brought along."""
        return {
            r.request_id: (None if r.session is None else r.session.parent_request_id, len(r.prompt_token_ids))
            for r in self.sent
        }

    async def generate(self, request: GenerateRequest) -> Completion:
        self.sent.append(request)
        try:
            return await super().generate(request)
        finally:
            self.core.check_integrity()

    async def open_session(self, capacity: int) -> str:
        session_id = await super().open_session(capacity)
        await self.opening.wait()
        return session_id

    async def clear_session(self, session_id: str) -> None:
        await self.emptying.wait()
        await super().clear_session(session_id)
