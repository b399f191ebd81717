"""The processes of a server without which it serves nobody, though its HTTP port still answers."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence

from skyrl_train.engines.server.guard import command_line, descendants


class VitalChildren:
    """Notices at once when one of them is gone: a pidfd becomes readable when its process ends.

    SGLang's main process lives 5 seconds and more after its scheduler was killed, vLLM's at times for good.
    `titles`: what the command line of such a process begins with. `on_loss` is called once, on the event loop.
    """

    def __init__(self, titles: Sequence[str], *, on_loss: Callable[[str], None]) -> None:
        self._titles = tuple(titles)
        self._on_loss = on_loss
        self._handles: dict[int, int] = {}

    def look(self, server_pid: int) -> None:
        """Watch those that are there now. On a kernel without pidfds none is: health checks remain."""
        for process in descendants(server_pid):
            if process.pid in self._handles or process.state == "Z":
                continue
            title = command_line(process.pid)
            if not title.startswith(self._titles):
                continue
            try:
                handle = os.pidfd_open(process.pid)
            except OSError:
                continue  # gone since it was listed: its parent says so in the log
            self._handles[process.pid] = handle
            name = title.split()[0]
            asyncio.get_running_loop().add_reader(handle, self._lost, f"its process {name} ({process.pid}) is gone")

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(self._handles)

    def close(self) -> None:
        loop = asyncio.get_running_loop()
        for handle in self._handles.values():
            loop.remove_reader(handle)
            os.close(handle)
        self._handles.clear()

    def _lost(self, what: str) -> None:
        self.close()
        self._on_loss(what)
