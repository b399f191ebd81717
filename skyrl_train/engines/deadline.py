"""A request's time: when it is over, the request is aborted and says why. The clock is the event loop's."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from types import TracebackType

from skyrl_train.types import DEADLINE, Completion, GenerateRequest


class Deadline:
    """While it is open, `abort` is called once when the request's `deadline_s` have passed; never without one.

        async with Deadline(request, engine.abort) as deadline:
            return deadline.marked(await ...)

    A request that waits at a paused engine ends too, if its engine's `abort` ends it there.
    """

    def __init__(self, request: GenerateRequest, abort: Callable[[Sequence[str]], Awaitable[None]]) -> None:
        self._request = request
        self._abort = abort
        self._timer: asyncio.TimerHandle | None = None
        self._aborting: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Deadline:
        if self._request.deadline_s is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._request.deadline_s, self._over)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._aborting is not None:
            # What an abort that failed has to say, the request's own error says: the engine is gone.
            await asyncio.gather(self._aborting, return_exceptions=True)

    def marked(self, completion: Completion) -> Completion:
        """With the reason, if it ended for that."""
        if self._aborting is None or completion.finish_reason != "abort":
            return completion
        return replace(completion, stop_reason=DEADLINE)

    def _over(self) -> None:
        async def end() -> None:
            await self._abort([self._request.request_id])

        self._aborting = asyncio.get_running_loop().create_task(end())
