"""Where environments run: threads of their own, at most so many, each call with a deadline.

    event loop   call ──► waits for a worker ──► waits for the result until the deadline ──► result | EnvironmentTimeout
    worker                                    └► init, step or close of one environment

A call that is over its deadline can't be stopped: its trajectory fails, its worker is stuck until the call returns, and
then its environment is closed. When every worker is stuck nobody will ever be served again: whoever waits, and whoever
comes, gets EnvironmentsStuck, which ends the run. Threads are daemons, so a stuck one doesn't keep the process alive.

Everything but `Call.run` happens on the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

from skyrl_train.errors import EnvironmentsStuck, EnvironmentTimeout

logger = logging.getLogger(__name__)

T = TypeVar("T")

DEFAULT_WORKERS = 32


class EnvironmentPool:
    """Owns the worker threads; they start as they are needed."""

    def __init__(self, *, num_workers: int = DEFAULT_WORKERS, step_timeout_s: float) -> None:
        if num_workers < 1 or step_timeout_s <= 0:
            raise ValueError(f"num_workers must be >= 1 and step_timeout_s > 0, found {num_workers}, {step_timeout_s}")
        self.num_workers = num_workers
        self.step_timeout_s = step_timeout_s
        self.num_stuck = 0
        """Workers whose call is over its deadline and goes on."""
        self._num_free = num_workers
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._calls: queue.SimpleQueue[Call[Any]] = queue.SimpleQueue()
        self._num_threads = 0

    async def call(self, function: Callable[[], T], *, what: str, started: Callable[[Call[T]], None]) -> T:
        """The function's result, or what it raises. `what` names it in errors; `started` gets the call.

        Raises EnvironmentTimeout, EnvironmentsStuck. A cancelled caller leaves the function running.
        """
        await self._take_worker(what)
        loop = asyncio.get_running_loop()
        call = Call(function, loop, self._ended)
        started(call)
        call.timer = loop.call_later(self.step_timeout_s, self._overdue, call, what)
        self._calls.put(call)
        if self._num_threads < self.num_workers - self._num_free:
            self._num_threads += 1
            threading.Thread(target=self._work, name=f"environment-{self._num_threads}", daemon=True).start()
        return await asyncio.shield(call.done)

    def check_integrity(self) -> None:
        """The counts fit each other."""
        assert 0 <= self.num_stuck <= self.num_workers - self._num_free <= self.num_workers
        assert not (self._num_free and any(not waiter.done() for waiter in self._waiting))

    def _work(self) -> None:
        while True:
            self._calls.get().run()

    async def _take_worker(self, what: str) -> None:
        if self.num_stuck == self.num_workers:
            raise self._stuck(what)
        if self._num_free:
            self._num_free -= 1
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self._give_back()  # it was given a worker and cancelled before it could use it
            raise
        except EnvironmentsStuck:
            raise self._stuck(what) from None

    def _give_back(self) -> None:
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return
        self._num_free += 1

    def _ended(self, call: Call[Any]) -> None:
        assert call.timer is not None
        call.timer.cancel()
        if call.is_overdue:
            self.num_stuck -= 1
        self._give_back()

    def _overdue(self, call: Call[Any], what: str) -> None:
        if call.has_ended:
            return  # its result is on the way to this loop
        call.is_overdue = True
        self.num_stuck += 1
        call.fail(
            EnvironmentTimeout(
                f"{what} took more than {self.step_timeout_s:g} s (environment.step_timeout_s) and is still running; "
                f"{self.num_stuck} of {self.num_workers} workers are stuck"
            )
        )
        if self.num_stuck == self.num_workers:
            waiting, self._waiting = self._waiting, deque()
            for waiter in waiting:
                if not waiter.done():
                    waiter.set_exception(self._stuck("an environment"))

    def _stuck(self, what: str) -> EnvironmentsStuck:
        return EnvironmentsStuck(
            f"{what} can't run: all {self.num_workers} workers (environment.num_workers) are stuck in calls that take "
            f"more than {self.step_timeout_s:g} s (environment.step_timeout_s); mend the environment, or raise these"
        )


class Call(Generic[T]):
    """One function on its way through a worker."""

    def __init__(
        self, function: Callable[[], T], loop: asyncio.AbstractEventLoop, ended: Callable[[Call[Any]], None]
    ) -> None:
        self._function = function
        self._loop = loop
        self._on_end = ended
        self._lock = threading.Lock()
        self._afterwards: Callable[[], None] | None = None
        self.has_ended = False
        self.is_overdue = False
        self.timer: asyncio.TimerHandle | None = None
        self.done: asyncio.Future[T] = loop.create_future()
        # A caller that was cancelled never asks how it ended.
        self.done.add_done_callback(lambda done: done.cancelled() or done.exception())

    def run(self) -> None:
        """In the worker."""
        result: T | None = None
        error: BaseException | None = None
        try:
            result = self._function()
        except BaseException as exc:  # handed to the caller; a worker outlives whatever an environment raises
            error = exc
        with self._lock:
            self.has_ended = True
            afterwards = self._afterwards
        if afterwards is not None:
            try:
                afterwards()
            except Exception:
                logger.exception("an environment that was given up could not be closed")
        # A closed loop raises: the run ended without waiting for this call.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._finish, result, error)

    def then(self, function: Callable[[], None]) -> bool:
        """Run `function` in the same worker after the call; False when the call has ended already."""
        with self._lock:
            if not self.has_ended:
                self._afterwards = function
            return not self.has_ended

    def fail(self, error: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(error)

    def _finish(self, result: T | None, error: BaseException | None) -> None:
        self._on_end(self)
        if self.done.done():
            return
        if error is None:
            self.done.set_result(cast(T, result))
        elif isinstance(error, Exception) and not isinstance(error, StopIteration):
            self.done.set_exception(error)
        else:
            self.done.set_exception(RuntimeError(f"an environment raised {error!r}"))
