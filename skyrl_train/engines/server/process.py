"""One engine server in an environment of its own: started, watched, ended with all that it started.

    start: free port ──► guard ──► server ──► GET /health until 200 ──► base url
                           ▲          └─ dies, loses a vital child, or its port: noticed at once, with its log
    stop:  SIGTERM to the server ──► deadline ──► SIGKILL to every process of the tree, by id

guard.py says how the tree ends also when the trainer was killed.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import shutil
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from skyrl_train.engines.server.children import VitalChildren
from skyrl_train.engines.server.guard import descendants
from skyrl_train.engines.server.guarded import GuardedServer
from skyrl_train.engines.server.log_tail import LogTail, read_tail
from skyrl_train.engines.server.ports import HOST, free_port, only_listeners
from skyrl_train.errors import ConfigError, EngineUnavailable

logger = logging.getLogger(__name__)

MAX_BINDS = 3
"""Ports that are tried in one start."""
START_POLL_S = 0.25
HEALTH_TIMEOUT_S = 30.0
"""Longer than SGLang takes to find out that its scheduler doesn't answer: 20 s."""
LOOP_HELD_S = 5.0
"""A check this much later than its deadline says that our own event loop stood still, not the server."""
EXIT_NOTICE_S = 1.0
"""From the first refused connection until the exit of the process is told."""
GIVE_UP_GRACE_S = 2.0
"""For a server whose start failed, and for one that counts as dead: it has nothing to finish."""
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, kw_only=True)
class LaunchSpec:
    """What to start. `command` is without host and port: they are appended as `--host 127.0.0.1 --port N`.

    `environment` is added to ours; None takes a variable out. `log_path` is appended to. `vital_children` is what
    command lines begin with of those descendants whose end is the server's end.
    """

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str | None] = field(default_factory=dict)
    log_path: Path
    startup_timeout_s: float
    stop_timeout_s: float = 20.0
    health_path: str = "/health"
    vital_children: tuple[str, ...] = ("sglang::", "VLLM::")


class ServerProcess:
    """Owns at most one running server. All calls are made from one event loop."""

    def __init__(self, spec: LaunchSpec) -> None:
        self.spec = spec
        self._life: _Life | None = None

    @property
    def url(self) -> str:
        """Of the running server, `http://127.0.0.1:PORT`; another one after a restart."""
        if self._life is None:
            raise EngineUnavailable(f"engine {self.spec.name} was not started")
        return self._life.url

    @property
    def pid(self) -> int | None:
        """The server's own process; None when none was started."""
        return self._life.pid if self._life is not None else None

    @property
    def is_running(self) -> bool:
        """Its process is there and nothing says that it can't serve. True also while it starts."""
        return self._life is not None and not self._life.died.is_set()

    async def start(self) -> str:
        """Until the server is healthy; its base url.

        Raises ConfigError (no such program, log can't be written) and EngineUnavailable (it died, or was not ready in
        time): then nothing of it is left.
        """
        assert not self.is_running, f"engine {self.spec.name} is running already, process {self.pid}"
        if self._life is not None:
            await self._life.stop(0)  # the rest of one that died by itself
        end = asyncio.get_running_loop().time() + self.spec.startup_timeout_s
        for _ in range(MAX_BINDS):
            life = self._life = _Life(self.spec)
            try:
                await life.begin()
                await life.until_ready(end)
            except _BindLost:
                logger.warning("engine %s: port %d went to another process, trying another one", life.name, life.port)
                await life.stop(GIVE_UP_GRACE_S)
                continue
            except BaseException:
                await life.stop(GIVE_UP_GRACE_S)
                raise
            logger.info("engine %s: process %d is ready at %s, log %s", life.name, life.pid, life.url, life.log_path)
            return life.url
        raise EngineUnavailable(f"engine {self.spec.name} lost {MAX_BINDS} ports in a row to other processes")

    async def wait_dead(self) -> str:
        """Until the server can't serve any more: its process ended or lost a vital child, or `watch` gave it up.

        Returns at once when there is none. The text says what happened, with the end of the log.
        """
        if self._life is None:
            return f"engine {self.spec.name} was not started"
        life = self._life
        await life.died.wait()
        return life.account("died")

    async def watch(
        self,
        *,
        interval_s: float,
        max_failures: int,
        check_timeout_s: float = HEALTH_TIMEOUT_S,
        suspended: Callable[[], bool] = lambda: False,
    ) -> str:
        """Like `wait_dead`, and a server that fails `max_failures` health checks in a row counts as dead too.

        `suspended`: True while the server can't answer for a good reason. SGLang's health check samples a token, which
        a paused or sleeping server does not; a check that began or ended in such a time doesn't count.
        """
        dead = asyncio.create_task(self.wait_dead())
        try:
            failures = 0
            while True:
                await asyncio.wait({dead}, timeout=interval_s)
                if not dead.done() and not suspended():
                    failure = await self._failed_check(dead, check_timeout_s)
                    if failure is None:
                        failures = 0
                    elif not suspended() and failure is not _UNKNOWN:
                        failures += 1
                        logger.warning("engine %s: %s, %d in a row", self.spec.name, failure, failures)
                        if failures >= max_failures:
                            # A process that is just ending refuses connections first; its exit status says more.
                            await asyncio.wait({dead}, timeout=EXIT_NOTICE_S)
                        if failures >= max_failures and self._life is not None:
                            self._life.lose(f"it failed {failures} health checks in a row, the last one: {failure}")
                if dead.done() or not self.is_running:
                    return await dead
        finally:
            dead.cancel()

    async def stop(self) -> None:
        """Ends the server and all that it started; returns when nothing is left. A second call does nothing."""
        if self._life is not None:
            grace_s = self.spec.stop_timeout_s
            await self._life.stop(grace_s if self.is_running else min(grace_s, GIVE_UP_GRACE_S))

    async def restart(self) -> str:
        """Stop, if it runs, and start; the new base url."""
        await self.stop()
        return await self.start()

    async def _failed_check(self, dead: asyncio.Task[str], timeout_s: float) -> str | None:
        """What a health check found: None is healthy; `_UNKNOWN` when nothing can be said."""
        assert self._life is not None
        loop = asyncio.get_running_loop()
        began = loop.time()
        check = asyncio.create_task(self._life.failed_check(timeout_s))
        try:
            await asyncio.wait({dead, check}, return_when=asyncio.FIRST_COMPLETED)
            if not check.done() or (check.result() and loop.time() - began > timeout_s + LOOP_HELD_S):
                return _UNKNOWN
            return check.result()
        finally:
            check.cancel()


_UNKNOWN = "unknown"


class _BindLost(Exception):
    """The server's port is another process's."""


class _Life:
    """One server process from its start to its end. `died` is set when it can't serve any more."""

    def __init__(self, spec: LaunchSpec) -> None:
        self.name, self.log_path = spec.name, spec.log_path
        self.port = free_port()
        self.url = f"http://{HOST}:{self.port}"
        self.pid: int | None = None
        self.died = asyncio.Event()
        self._spec = spec
        self._server: GuardedServer | None = None
        self._children = VitalChildren(spec.vital_children, on_loss=self.lose)
        self._log_start = 0
        self._loss: str | None = None
        self._stopped = False

    async def begin(self) -> None:
        """The process exists. Raises ConfigError or EngineUnavailable."""
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **self._spec.environment}
        given = {name: value for name, value in environment.items() if value is not None}
        program = self._spec.command[0]
        if shutil.which(program, path=given.get("PATH")) is None:
            raise ConfigError(
                f"engine {self.name}: {program} is no program that can be run here; "
                "generator.engine_python must name the Python interpreter of the engine's environment"
            )
        descriptor = self._open_log()
        try:
            self._server = GuardedServer(
                (*self._spec.command, "--host", HOST, "--port", str(self.port)),
                environment=given,
                log_descriptor=descriptor,
                on_exit=self.died.set,
            )
            self.pid = await self._server.started()
        except OSError as exc:
            message = f"engine {self.name}: {program} could not be started: {exc.strerror or exc}"
            if exc.errno in (errno.ENOENT, errno.EACCES, errno.ENOEXEC, errno.ENOTDIR):
                raise ConfigError(f"{message}; look at generator.engine_python") from exc
            raise EngineUnavailable(message) from exc
        finally:
            os.close(descriptor)

    def _open_log(self) -> int:
        try:
            self.log_path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                self._log_start = os.fstat(descriptor).st_size
                # Not the command: it may hold an API key. That this line can be written says that the disk has room.
                os.write(descriptor, f"=== engine {self.name} starts on port {self.port}\n".encode())
            except BaseException:
                os.close(descriptor)
                raise
        except OSError as exc:
            message = f"engine {self.name}: its log {self.log_path} can't be written: {exc.strerror}"
            if exc.errno in DISK_ERRORS:
                raise EngineUnavailable(f"{message}; make room on that disk") from exc
            raise ConfigError(f"{message}; choose a log folder that this user may write to") from exc
        return descriptor

    async def until_ready(self, end: float) -> None:
        """Returns when it is healthy. Raises EngineUnavailable or _BindLost."""
        assert self.pid is not None
        loop = asyncio.get_running_loop()
        dead = asyncio.create_task(self.died.wait())
        try:
            last = "no health check was answered"
            while (remaining := end - loop.time()) > 0:
                self._children.look(self.pid)
                check = asyncio.create_task(self.failed_check(min(HEALTH_TIMEOUT_S, remaining)))
                try:
                    await asyncio.wait({dead, check}, return_when=asyncio.FIRST_COMPLETED)
                    if self.died.is_set():
                        if not self._stopped and self._loss is None and self._tail().bind_was_lost:
                            raise _BindLost
                        raise EngineUnavailable(self.account("died while it started"))
                    failure = check.result()
                finally:
                    check.cancel()
                if failure is None:
                    self._children.look(self.pid)
                    if not only_listeners(self.port, [self.pid, *(one.pid for one in descendants(self.pid))]):
                        raise _BindLost
                    return
                last = failure
                await asyncio.wait({dead}, timeout=min(START_POLL_S, max(0.0, end - loop.time())))
            raise EngineUnavailable(
                f"engine {self.name} was not ready after {self._spec.startup_timeout_s:g} s ({last}); if it was still "
                f"loading, raise generator.health_checks.startup_timeout_s; {self._findings()}"
            )
        finally:
            dead.cancel()

    async def failed_check(self, timeout_s: float) -> str | None:
        """None for an answer of 200 in time."""
        path = self._spec.health_path
        try:
            async with (
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=timeout_s)) as session,
                session.get(self.url + path) as answer,
            ):
                return None if answer.status == 200 else f"{path} answers {answer.status}"
        except TimeoutError:
            return f"{path} gave no answer in {timeout_s:.0f} s"
        except aiohttp.ClientError as exc:
            return f"{path}: {exc}"

    def lose(self, why: str) -> None:
        """It counts as dead from now on, though its process may be there. Of several reasons the first stays."""
        if not self.died.is_set():
            self._loss = why
            self.died.set()

    async def stop(self, grace_s: float) -> None:
        if not self.died.is_set():
            self._stopped = True
        self._children.close()
        if self._server is not None:
            await self._server.stop(grace_s)
            if self._server.left:
                logger.error("engine %s: processes %s did not end, not even by SIGKILL", self.name, self._server.left)
        self.died.set()

    def account(self, what: str) -> str:
        """What became of it, for people."""
        if self._stopped:
            return f"engine {self.name} was stopped by us"
        status = self._server.exit_status if self._server is not None else None
        causes = [cause for cause in (self._loss, _ended(status)) if cause is not None]
        return f"engine {self.name} {what}: {', '.join(causes) or 'its guard process was killed'}; {self._findings()}"

    def _findings(self) -> str:
        tail = self._tail()
        hint = tail.hint()
        return f"{hint}; {tail.quoted()}" if hint else tail.quoted()

    def _tail(self) -> LogTail:
        return read_tail(self.log_path, since=self._log_start)


def _ended(status: int | None) -> str | None:
    if status is None:
        return None
    if status >= 0:
        return f"exit status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    return f"killed by {name}" + (" (by the kernel, if the machine ran out of memory)" if name == "SIGKILL" else "")
