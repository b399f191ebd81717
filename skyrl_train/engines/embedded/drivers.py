"""Who steps the core: the caller's event loop, or a thread of its own.

    inline   call(f): f() at once     a task of the running loop: step, sleep(0), step, ...
    thread   call(f): queued          worker: [commands] step [commands] step ...   the loop stays free

Either way the core is touched by one thread at a time, and never while a step runs. `inline` interleaves steps and
callers in a fixed order, so a run can be repeated to the bit; `thread` keeps a server responsive.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol, TypeVar

T = TypeVar("T")

Step = Callable[[], bool]
"""Does one step; False when there is nothing more to do until a command changes that. Never raises."""


class Driver(Protocol):
    def post(self, command: Callable[[], object]) -> None:
        """Run a command that can't fail, soon and in order, when no step runs."""
        ...

    async def call(self, command: Callable[[], T]) -> T:
        """Run a command when no step runs; its result or its exception."""
        ...

    async def read(self, command: Callable[[], T]) -> T:
        """As `call`, for a command that changes nothing: who looks at a run must not shift its steps."""
        ...

    async def close(self) -> None:
        """Stop stepping. Commands that are queued run first."""
        ...


class InlineDriver:
    def __init__(self, name: str, step: Step) -> None:
        self._name = name
        self._step = step
        self._task: asyncio.Task[None] | None = None

    def post(self, command: Callable[[], object]) -> None:
        command()
        self._wake()

    async def call(self, command: Callable[[], T]) -> T:
        result = command()
        self._wake()
        return result

    async def read(self, command: Callable[[], T]) -> T:
        return command()

    async def close(self) -> None:
        task, self._task = self._task, None
        if task is not None and not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def _wake(self) -> None:
        if self._task is None or self._task.done() or self._task.get_loop().is_closed():
            self._task = asyncio.get_running_loop().create_task(self._drive(), name=f"{self._name} driver")

    async def _drive(self) -> None:
        while self._step():
            # One turn of the loop: callers whose requests ended run now and may add requests to the next step.
            await asyncio.sleep(0)


class ThreadDriver:
    def __init__(self, name: str, step: Step) -> None:
        self._step = step
        self._commands: deque[Callable[[], object]] = deque()
        self._wanted = threading.Event()
        self._closing = False
        self._ended = False
        self._thread = threading.Thread(target=self._drive, name=f"{name} driver", daemon=True)
        self._thread.start()

    def post(self, command: Callable[[], object]) -> None:
        if self._ended:
            command()
            return
        self._commands.append(command)
        self._wanted.set()

    async def call(self, command: Callable[[], T]) -> T:
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(command())
            except Exception as exc:  # handed to the caller, who awaits it below
                future.set_exception(exc)

        self.post(run)
        # A cancelled caller does not cancel the command: it is in the queue and will run.
        return await asyncio.shield(asyncio.wrap_future(future))

    async def read(self, command: Callable[[], T]) -> T:
        return await self.call(command)

    async def close(self) -> None:
        self._closing = True
        self._wanted.set()
        await asyncio.to_thread(self._thread.join)
        self._ended = True
        while self._commands:  # came while the thread was leaving
            self._commands.popleft()()

    def _drive(self) -> None:
        while True:
            self._wanted.clear()
            while self._commands:
                self._commands.popleft()()
            if self._closing:
                return
            if not self._step():
                self._wanted.wait()
