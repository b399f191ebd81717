"""Who may use the endpoint: anybody who reaches it, or only who has the key."""

from __future__ import annotations

import hmac
import ipaddress
import socket

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from skyrl_train.serving.errors import error_response

OPEN_PATHS = frozenset({"/health"})
"""Probes have no key, and learn no more than whether the engine serves."""


class RequireKey:
    """ASGI middleware: refuses a request without `Authorization: Bearer <key>` before its body is read."""

    def __init__(self, app: ASGIApp, *, api_key: str) -> None:
        self._app = app
        self._key = api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS and not self._has_key(Headers(scope=scope)):
            refusal = error_response(
                401,
                "a valid key is required: send it as 'Authorization: Bearer <key>'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await refusal(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, found = headers.get("authorization", "").partition(" ")
        # Compared in constant time: how long a refusal takes must not tell how much of a key was right.
        return scheme.lower() == "bearer" and hmac.compare_digest(found.strip().encode(), self._key)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the interface. Raises OSError for a host that doesn't resolve."""
    addresses = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return all(ipaddress.ip_address(str(address[4][0]).partition("%")[0]).is_loopback for address in addresses)
