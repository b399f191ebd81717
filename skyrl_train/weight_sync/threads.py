"""Blocking work beside the event loop, in a thread that nobody has to wait for at exit."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def in_thread(name: str, work: Callable[[], Result]) -> asyncio.Future[Result]:
    """Runs `work` in a new daemon thread called `name`; its result or exception as a future of the running loop.

    Cancelling the future leaves the thread alone: whoever cancels must also end what the thread waits for. Not a pool:
    a pool's threads are joined at exit, and one that is stuck in a collective would hold the process for good.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Result] = loop.create_future()

    def settle(result: Result | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except BaseException as raised:
            error = raised
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
