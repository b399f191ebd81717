"""A server under its guard, seen from the trainer: one start, one end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence

from skyrl_train.engines.server import guard
from skyrl_train.engines.server.guard import Process, all_processes, descendants, look_up, send

GUARD_MARGIN_S = guard.REST_GRACE_S + guard.TRACKER_GRACE_S + guard.KILL_DEADLINE_S + 5.0
"""How much longer than the server's own time a guard may take; after that the trainer ends the tree itself."""


class GuardedServer:
    """Starts `command` under a guard when made; stdout and stderr go to `log_descriptor`, which may be closed then.

    `on_exit` is called on the event loop as soon as the server is known to be dead; the rest of its tree is ended after
    that. Raises OSError when not even the guard could be started.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        log_descriptor: int,
        on_exit: Callable[[], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_exit = on_exit
        self._started: asyncio.Future[int] = self._loop.create_future()
        self._exited = False
        self._gone = asyncio.Event()
        self._server: Process | None = None
        self._received = b""
        self.exit_status: int | None = None
        """Negative is the signal. None: it still runs, or its guard was killed before it could tell."""
        self.left: tuple[int, ...] = ()
        """Processes that even SIGKILL did not end in time."""
        lifeline, self._lifeline = os.pipe()
        self._reports, reports = os.pipe()
        try:
            self._guard = subprocess.Popen(
                [sys.executable, "-I", "-S", guard.__file__, str(os.getpid()), "--", *command],
                stdin=lifeline,
                stdout=reports,
                stderr=log_descriptor,
                env=dict(environment),
                start_new_session=True,  # the terminal's Ctrl-C is for the trainer, which then decides
            )
        except OSError:
            os.close(self._lifeline)
            os.close(self._reports)
            raise
        finally:
            os.close(lifeline)
            os.close(reports)
        os.set_blocking(self._reports, False)
        self._loop.add_reader(self._reports, self._read)

    async def started(self) -> int:
        """The server's process id. Raises OSError when the program can't be run."""
        return await asyncio.shield(self._started)

    @property
    def is_running(self) -> bool:
        return not self._exited

    async def stop(self, grace_s: float) -> None:
        """SIGTERM to the server; after `grace_s`, SIGKILL to all. Returns when nothing is left. May be called again."""
        if self._gone.is_set():
            return
        with contextlib.suppress(BrokenPipeError):  # the guard is on its way out: the reports end in a moment
            os.write(self._lifeline, f"stop {grace_s}\n".encode())
        try:
            async with asyncio.timeout(grace_s + GUARD_MARGIN_S):
                await self._gone.wait()
        except TimeoutError:
            self._kill_all()
            self._guard.kill()
            await self._gone.wait()

    def _read(self) -> None:
        try:
            chunk = os.read(self._reports, 4096)
        except BlockingIOError:
            return
        self._received += chunk
        *lines, self._received = self._received.split(b"\n")
        for line in lines:
            word, *numbers = line.split()
            match word:
                case b"pid":
                    self._server = look_up(int(numbers[0]))
                    self._started.set_result(int(numbers[0]))
                case b"failed":
                    number = int(numbers[0])
                    self._started.set_exception(OSError(number, os.strerror(number)))
                    self._started.exception()  # seen: who starts a server may be gone already
                case b"left":
                    self.left = tuple(int(number) for number in numbers)
                case b"exit":
                    self.exit_status = int(numbers[0])
                    self._note_exit()
                case _:
                    raise AssertionError(f"the guard reports {line!r}")
        if not chunk:
            self._end()

    def _end(self) -> None:
        self._loop.remove_reader(self._reports)
        os.close(self._reports)
        os.close(self._lifeline)
        # It closed its end by exiting, or was killed: there is nothing to wait for.
        self._guard.wait()
        if self.exit_status is None:
            self._kill_all()
        if not self._started.done():
            self._started.set_exception(ChildProcessError("the guard process ended before it could start the server"))
            self._started.exception()
        self._note_exit()
        self._gone.set()

    def _note_exit(self) -> None:
        if not self._exited:
            self._exited = True
            self._on_exit()

    def _kill_all(self) -> None:
        """Without a guard: the server, which dies with its guard, and who is in its session or descends from it."""
        if self._server is None:
            return
        pid = self._server.pid
        found = {*descendants(self._guard.pid), *descendants(pid), self._server}
        found |= {process for process in all_processes() if process.session == pid}
        for process in found:
            send(process, signal.SIGKILL)
