"""A client that is closed with its server's life: its calls break at once, and open no connection again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from skyrl_train.engines.sglang.wire import Wire
from skyrl_train.engines.vllm.connection import Connection
from skyrl_train.errors import EngineUnavailable

Call = Callable[[str], tuple[Callable[[], Awaitable[Any]], Callable[[], Awaitable[None]]]]


@pytest.fixture
async def silent_server() -> AsyncIterator[str]:
    """Takes a call and never answers."""
    leave = asyncio.Event()

    async def wait(request: web.Request) -> web.Response:
        await leave.wait()
        return web.Response()

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", wait)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    leave.set()
    await runner.cleanup()


def wire(url: str) -> Any:
    one = Wire(url, name="sglang")
    return lambda: one.post("/generate", {}, what="a request", timeout_s=None), one.close


def connection(url: str) -> Any:
    one = Connection(url)
    return lambda: one.post("/v1/completions", {}, timeout_s=None), one.close


def pooled(url: str) -> Any:
    one = Connection(url)
    return lambda: one.post("/v1/completions", {}, timeout_s=None, pooled=True), one.close


@pytest.mark.parametrize("make", [wire, connection, pooled])
async def test_closing_breaks_what_is_under_way_and_refuses_what_comes_after(silent_server: str, make: Call) -> None:
    call, close = make(silent_server)
    under_way = asyncio.ensure_future(call())
    await asyncio.sleep(0.1)
    assert not under_way.done()
    await close()
    with pytest.raises(EngineUnavailable):
        async with asyncio.timeout(10):
            await under_way
    with pytest.raises(EngineUnavailable, match="was closed"):
        await call()
    await close()
