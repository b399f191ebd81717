"""Requests to one vLLM server: one pool of connections, deadlines, and errors mapped once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import aiohttp

from skyrl_train.engines.vllm.answers import refusal
from skyrl_train.errors import EngineUnavailable

CALL_TIMEOUT_S = 60.0
CONNECT_TIMEOUT_S = 10.0
KEEP_ALIVE_S = 2.0
"""vLLM closes idle connections after 5 s. One that both sides end at once would lose a request, so ours end first."""


class Connection:
    """`base_url` has no slash at its end. Connections open at the first call, in the loop that makes it."""

    def __init__(self, base_url: str, *, api_key: str | None = None) -> None:
        self.base_url = base_url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._sessions: dict[bool, aiohttp.ClientSession] = {}
        self._closed = False

    async def post(
        self,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        timeout_s: float | None = CALL_TIMEOUT_S,
        pooled: bool = False,
        traceparent: str | None = None,
    ) -> Any:
        """The answer's JSON, or its text where it isn't JSON. `timeout_s` None waits as long as the server lives.

        `pooled` keeps the connection for the next such call. Others get one of their own: vLLM ends a connection after
        an error of its own (500) without saying so, and the call that came next on it would be lost. Raises what
        `answers.refusal` says for any status but 200, EngineUnavailable when nobody answers. `traceparent`: our span.
        """
        return await self._call("POST", path, {} if body is None else body, timeout_s, pooled, traceparent)

    async def get(self, path: str, *, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        return await self._call("GET", path, None, timeout_s, False)

    async def close(self) -> None:
        """Calls that are under way break, and later ones are refused: nothing would close what they open."""
        self._closed = True
        sessions, self._sessions = self._sessions, {}
        for session in sessions.values():
            await session.close()

    async def _call(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        timeout_s: float | None,
        pooled: bool,
        traceparent: str | None = None,
    ) -> Any:
        what = f"{method} {self.base_url}{path}"
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_TIMEOUT_S)
        data = None if body is None else json.dumps(body).encode()
        headers = {} if data is None else {"Content-Type": "application/json"}
        if traceparent is not None:
            headers["traceparent"] = traceparent
        try:
            async with self._open(pooled).request(
                method, self.base_url + path, data=data, headers=headers, timeout=timeout
            ) as response:
                text = await response.text()
        except (TimeoutError, aiohttp.ClientError, OSError) as exc:
            why = f"no answer in {timeout_s:g} s" if isinstance(exc, asyncio.TimeoutError) and timeout_s else repr(exc)
            raise EngineUnavailable(f"{what}: {why}") from exc
        if response.status != 200:
            raise refusal(response.status, text, what=what)
        if "json" not in response.headers.get("Content-Type", ""):
            return text
        try:
            return json.loads(text)
        except ValueError as exc:
            raise EngineUnavailable(f"{what}: the answer is no JSON: {text[:200]!r}") from exc

    def _open(self, pooled: bool) -> aiohttp.ClientSession:
        if self._closed:
            raise EngineUnavailable(f"the client of {self.base_url} was closed")
        session = self._sessions.get(pooled)
        if session is None or session.closed:
            connector = (
                aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S)
                if pooled
                else aiohttp.TCPConnector(limit=0, force_close=True)
            )
            session = self._sessions[pooled] = aiohttp.ClientSession(connector=connector, headers=self._headers)
        return session
