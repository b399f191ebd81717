"""One pool of connections to one SGLang server; every call ends in an answer, or in an error of ours."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from skyrl_train.engines.sglang.errors import message_of, refusal
from skyrl_train.errors import EngineUnavailable

CALL_TIMEOUT_S = 60.0
CONNECT_TIMEOUT_S = 10.0
IDLE_CONNECTION_S = 2.0
"""The server closes connections that were idle for 5 s; a request sent down one that it is closing is lost."""


class Wire:
    """Made before there is an event loop; the session is opened at the first call, in the loop that calls."""

    def __init__(self, url: str, *, name: str, api_key: str | None = None) -> None:
        self.url = url.rstrip("/") if "://" in url else f"http://{url.rstrip('/')}"
        self.name = name
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._session: aiohttp.ClientSession | None = None
        self._closed = False

    async def get(self, path: str, *, what: str, timeout_s: float = CALL_TIMEOUT_S) -> str:
        async with self.exchange("GET", path, None, what=what, timeout_s=timeout_s) as response:
            return await response.text()

    async def post(
        self,
        path: str,
        body: Mapping[str, Any],
        *,
        what: str,
        timeout_s: float | None = CALL_TIMEOUT_S,
        traceparent: str | None = None,
    ) -> str:
        """The answer's text. `timeout_s` None waits as long as the connection lives."""
        data = json.dumps(body, separators=(",", ":")).encode()
        async with self.exchange(
            "POST", path, data, what=what, timeout_s=timeout_s, traceparent=traceparent
        ) as response:
            return await response.text()

    @asynccontextmanager
    async def exchange(
        self,
        method: str,
        path: str,
        data: bytes | None,
        *,
        what: str,
        timeout_s: float | None,
        traceparent: str | None = None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """An answer of status 200, whose body is still to be read in the same context. `traceparent`: our span."""
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_TIMEOUT_S)
        headers = self._headers if traceparent is None else {**self._headers, "traceparent": traceparent}
        try:
            async with self._open().request(
                method, f"{self.url}{path}", data=data, headers=headers, timeout=timeout
            ) as response:
                if response.status != 200:
                    raise refusal(response.status, message_of(await response.text()), what=what)
                yield response
        except TimeoutError as exc:
            raise EngineUnavailable(f"{what}: no answer of {self.url}{path} within {timeout_s} s") from exc
        except (aiohttp.ClientError, OSError, asyncio.IncompleteReadError) as exc:
            raise EngineUnavailable(
                f"{what}: the connection to {self.url} broke ({type(exc).__name__}: {exc})"
            ) from exc

    async def close(self) -> None:
        """Calls that are under way break, and later ones are refused: nothing would close what they open."""
        self._closed = True
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    def _open(self) -> aiohttp.ClientSession:
        if self._closed:
            raise EngineUnavailable(f"{self.name}: the client of {self.url} was closed")
        if self._session is None:
            # The server bounds what runs at once, not the pool.
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_CONNECTION_S)
            )
        return self._session
