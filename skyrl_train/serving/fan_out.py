"""Many engine requests behind one HTTP request: all of them answer, or the rest is aborted.

HTTP request --> request 0 --> engine
                 request 1 --> engine     an error, a cancellation or a client that hangs up
                 ...                      ends all of them
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Iterable, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request

from skyrl_train.engines.base import Engine
from skyrl_train.serving.protocol import StreamingEngine, TokenPiece, WholeAnswer
from skyrl_train.types import Completion, GenerateRequest

T = TypeVar("T")


class ClientGone(Exception):
    """The client closed its connection: nobody waits for this answer any more."""


async def generate_all(engine: Engine, requests: Sequence[GenerateRequest]) -> list[Completion]:
    """The completions, in the order of the requests."""
    tasks = [asyncio.ensure_future(engine.generate(request)) for request in requests]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        await _cancelled(tasks)


async def stream_all(
    engine: Engine, requests: Sequence[GenerateRequest]
) -> AsyncGenerator[tuple[int, TokenPiece], None]:
    """(index of the request, piece) as they come. Close it when leaving early."""
    if len(requests) == 1:
        async with aclosing(_pieces(engine, requests[0])) as pieces:
            async for piece in pieces:
                yield 0, piece
        return
    arrived: asyncio.Queue[tuple[int, TokenPiece] | Exception] = asyncio.Queue()

    async def pump(index: int, request: GenerateRequest) -> None:
        try:
            async with aclosing(_pieces(engine, request)) as pieces:
                async for piece in pieces:
                    arrived.put_nowait((index, piece))
        except Exception as exc:  # handed to the reader below, who raises it
            arrived.put_nowait(exc)

    tasks = [asyncio.ensure_future(pump(index, request)) for index, request in enumerate(requests)]
    num_open = len(requests)
    try:
        while num_open:
            item = await arrived.get()
            if isinstance(item, Exception):
                raise item
            num_open -= item[1].completion is not None
            yield item
    finally:
        await _cancelled(tasks)


async def unless_client_goes(http: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; if the client hangs up first, `work` is cancelled and ClientGone is raised.

    Valid once the request's body has been read: from then on the connection has only its end to say.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_until_disconnect(http))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        await _cancelled([task, gone])


async def _until_disconnect(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _pieces(engine: Engine, request: GenerateRequest) -> AsyncGenerator[TokenPiece, None]:
    if not isinstance(engine, StreamingEngine):
        yield WholeAnswer(completion=await engine.generate(request))
        return
    async with aclosing(engine.stream(request)) as pieces:
        async for piece in pieces:
            yield piece


async def _cancelled(tasks: Iterable[asyncio.Future[Any]]) -> None:
    """Ends what is still running and waits until it has ended."""
    open_tasks = [task for task in tasks if not task.done()]
    for task in open_tasks:
        task.cancel()
    await asyncio.gather(*open_tasks, return_exceptions=True)
