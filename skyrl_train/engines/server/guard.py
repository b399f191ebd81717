"""The parent of one engine server: its only work is that nothing of the server outlives the trainer.

    trainer ──lifeline (stdin)──► guard ──fork, exec──► server ──► schedulers, workers, whatever they start
            ◄──reports (stdout)──   ▲                                             │
                                    └────────── orphans come here (subreaper) ────┘

Run as a program, `guard.py TRAINER_PID -- COMMAND...`, by our own interpreter with -I -S: it imports the standard
library alone and starts in milliseconds. Lines on the lifeline: `stop SECONDS`. Lines of the reports: `pid N`, or
`failed ERRNO`, then `exit STATUS` (negative: the signal that ended the server) as soon as it is known, `left PID...`
for what even SIGKILL did not end, and the end of the pipe when all is done. The server writes to the guard's stderr,
which is the log file.

The guard ends the tree when the server exits, when it is told to stop, when the lifeline's other end closes, and when
the trainer's process is gone while a forked copy of it still holds the lifeline. The whole tree is found by walking
from the guard: as subreaper it inherits every process whose parent died, also one in a session of its own. A process
is signalled through a pidfd after its start time was compared: an id that somebody else got meanwhile is left alone.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import time
from typing import NamedTuple, NoReturn

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
ORPHAN_GRACE_S = 2.0
"""The server's time to leave by itself when nobody is there any more who waits for it."""
REST_GRACE_S = 2.0
"""After the server: for processes that it left behind and that were sent SIGTERM."""
TRACKER_GRACE_S = 1.0
"""For Python's resource trackers: they remove shared memory once those who used it are gone, and ignore SIGTERM."""
KILL_DEADLINE_S = 30.0
"""A process inside a driver's call leaves only when that call returns."""
POLL_S = 0.02


class Process(NamedTuple):
    """A line of the process table; `start` (clock ticks since boot) tells apart two owners of one id."""

    pid: int
    parent: int
    session: int
    state: str
    start: int


def look_up(pid: int) -> Process | None:
    """None when there is no such process, or none that we may see."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            line = file.read()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    # The name stands in parentheses and may hold any character, parentheses too.
    fields = line[line.rindex(b")") + 2 :].split()
    return Process(
        pid=pid, parent=int(fields[1]), session=int(fields[3]), state=fields[0].decode(), start=int(fields[19])
    )


def all_processes() -> list[Process]:
    found = (look_up(int(name)) for name in os.listdir("/proc") if name.isdigit())
    return [process for process in found if process is not None]


def descendants(pid: int) -> list[Process]:
    """Children of `pid` and theirs, from one look at the process table; parents stand before their children."""
    children: dict[int, list[Process]] = {}
    for process in all_processes():
        children.setdefault(process.parent, []).append(process)
    found, next_pids = list[Process](), [pid]
    while next_pids:
        generation = [child for parent in next_pids for child in children.get(parent, ())]
        found += generation
        next_pids = [child.pid for child in generation]
    return found


def command_line(pid: int) -> str:
    """As the process shows it; empty for a zombie and for one that is gone."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().replace(b"\0", b" ").decode(errors="replace").strip()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return ""


def send(process: Process, number: int) -> None:
    """Signal this process and no other that got its id since it was looked up. One that is gone is fine."""
    try:
        handle = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return
    except OSError:  # a kernel without pidfds: what is left is a short moment between the look and the signal
        if _is_same(process):
            os.kill(process.pid, number)
        return
    try:
        if _is_same(process):
            signal.pidfd_send_signal(handle, number)
    except ProcessLookupError:
        pass
    finally:
        os.close(handle)


def _is_same(process: Process) -> bool:
    found = look_up(process.pid)
    return found is not None and found.start == process.start


class _Guard:
    def __init__(self, trainer_pid: int, command: list[str]) -> None:
        self._command = command
        self._libc = ctypes.CDLL(None, use_errno=True)
        if self._libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")
        self._wake, wake_writer = os.pipe()
        os.set_blocking(self._wake, False)
        os.set_blocking(wake_writer, False)
        signal.set_wakeup_fd(wake_writer, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._told = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, self._tell)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        self._trainer_pid = trainer_pid
        self._poll = select.poll()
        self._poll.register(0, select.POLLIN)
        self._poll.register(self._wake, select.POLLIN)
        try:
            self._trainer = os.pidfd_open(trainer_pid)
            self._poll.register(self._trainer, select.POLLIN)
        except OSError:
            self._trainer = -1  # gone already, or no pidfds: os.getppid() tells within a second
        self._received = b""
        self._server: Process | None = None
        self._status: int | None = None
        self._deadline = float("inf")

    def run(self) -> None:
        try:
            pid = self._spawn()
        except OSError as exc:
            _report(f"failed {exc.errno}")
            return
        self._server = look_up(pid)
        _report(f"pid {pid}")
        while self._status is None and time.monotonic() < self._deadline:
            self._listen()
            self._reap()
        told = self._status
        if told is not None:
            _report(f"exit {told}")  # at once: ending the rest may take seconds
        left = self._end_tree()
        if left:
            _report("left " + " ".join(str(process.pid) for process in left))
        if told is None:
            _report(f"exit {-signal.SIGKILL if self._status is None else self._status}")

    def _spawn(self) -> int:
        """The server's id. Raises OSError when the program can't be started."""
        guard_pid = os.getpid()
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            self._become_server(guard_pid, writer)
        os.close(writer)
        with os.fdopen(reader, "rb") as file:
            failed = file.read()
        if failed:
            os.waitpid(pid, 0)
            raise OSError(int(failed), os.strerror(int(failed)))
        return pid

    def _become_server(self, guard_pid: int, failure: int) -> NoReturn:
        try:
            os.setsid()
            self._libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != guard_pid:
                os._exit(1)
            for number in (signal.SIGPIPE, signal.SIGXFSZ):
                signal.signal(number, signal.SIG_DFL)  # Python ignores them, and what is ignored survives exec
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(2, 1)
            os.execvp(self._command[0], self._command)
        except OSError as exc:
            os.write(failure, str(exc.errno).encode())
        finally:
            os._exit(127)

    def _tell(self, *_: object) -> None:
        self._told = True

    def _listen(self) -> None:
        """Wait for something to happen, a second at most, and do what it asks for."""
        wait_s = min(1.0, max(0.0, self._deadline - time.monotonic()))
        ready = {number for number, _ in self._poll.poll(wait_s * 1000)}
        if self._wake in ready:
            os.read(self._wake, 4096)
        if self._trainer in ready:
            self._poll.unregister(self._trainer)
        gone = os.getppid() != self._trainer_pid
        if 0 in ready:
            chunk = os.read(0, 4096)
            if not chunk:
                gone = True
                self._poll.unregister(0)
            self._received += chunk
            *lines, self._received = self._received.split(b"\n")
            for line in lines:
                word, seconds = line.split()
                assert word == b"stop", line
                self._stop(float(seconds))
        if gone or self._told:
            self._stop(ORPHAN_GRACE_S)

    def _stop(self, grace_s: float) -> None:
        if self._deadline == float("inf") and self._server is not None:
            send(self._server, signal.SIGTERM)
        self._deadline = min(self._deadline, time.monotonic() + grace_s)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if self._server is not None and pid == self._server.pid:
                self._status = os.waitstatus_to_exitcode(status)

    def _end_tree(self) -> list[Process]:
        """What could not be ended."""
        if self._status is not None and (rest := descendants(os.getpid())):
            for process in rest:
                send(process, signal.SIGTERM)
            self._wait_alone(REST_GRACE_S)
        self._kill(TRACKER_GRACE_S, spare="multiprocessing.resource_tracker")
        return self._kill(KILL_DEADLINE_S)

    def _kill(self, deadline_s: float, *, spare: str | None = None) -> list[Process]:
        """SIGKILL again and again, as long as somebody is there: who is killed may just have forked."""
        end = time.monotonic() + deadline_s
        while True:
            self._reap()
            left = descendants(os.getpid())
            if not left or time.monotonic() >= end:
                return left
            for process in left:
                if process.state != "Z" and (spare is None or spare not in command_line(process.pid)):
                    send(process, signal.SIGKILL)
            time.sleep(POLL_S)

    def _wait_alone(self, deadline_s: float) -> None:
        end = time.monotonic() + deadline_s
        while time.monotonic() < end:
            self._reap()
            if not descendants(os.getpid()):
                return
            time.sleep(POLL_S)


def _report(line: str) -> None:
    try:
        os.write(1, f"{line}\n".encode())
    except BrokenPipeError:
        return  # the trainer is gone; the tree is ended all the same


if __name__ == "__main__":
    assert sys.argv[2] == "--", sys.argv
    _Guard(int(sys.argv[1]), sys.argv[3:]).run()
