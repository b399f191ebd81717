"""The end of a server's log, and what is known about it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

TAIL_BYTES = 64 * 1024
MAX_LINES = 20
MAX_LINE_CHARS = 300


@dataclass(frozen=True, kw_only=True)
class LogTail:
    """The last lines of a log file since a server's start, each cut to a bearable length."""

    path: Path
    lines: tuple[str, ...]

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    @property
    def bind_was_lost(self) -> bool:
        """A port that the server was to listen on is somebody else's."""
        return _BIND_LOST.search(self.text) is not None

    def hint(self) -> str | None:
        """What to do, where the cause is known."""
        for pattern, advice in _CAUSES:
            if match := pattern.search(self.text):
                return match.expand(advice)
        if _disk_is_full(self.path):
            return f"the disk that holds {self.path} is full"
        return None

    def quoted(self) -> str:
        """For an error: where the log is and its last lines."""
        shown = [line for line in self.lines if line.strip()][-MAX_LINES:]
        if not shown:
            return f"its log {self.path} is empty"
        return f"the last lines of its log {self.path}:\n" + "\n".join(f"  | {line}" for line in shown)


def read_tail(path: Path, *, since: int = 0) -> LogTail:
    """What was written after byte `since`, the last 64 KiB of it. A log that is gone is an empty one."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            first = file.seek(max(since, size - TAIL_BYTES))
            data = file.read()
    except OSError:
        return LogTail(path=path, lines=())
    lines = data.decode(errors="replace").splitlines()
    if first > since and lines:
        del lines[0]  # a piece of one
    return LogTail(path=path, lines=tuple(_cut(line) for line in lines))


def _cut(line: str) -> str:
    line = line.rstrip()
    return line if len(line) <= MAX_LINE_CHARS else line[: MAX_LINE_CHARS - 1] + "…"


def _disk_is_full(path: Path) -> bool:
    try:
        return os.statvfs(path.parent).f_bavail == 0
    except OSError:
        return False


_BIND_LOST = re.compile(r"address already in use|\[Errno 98\]|EADDRINUSE", re.IGNORECASE)
_CAUSES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), advice)
    for pattern, advice in (
        (
            r"No module named '(sglang|vllm)'",
            r"generator.engine_python must name an interpreter that has \1 installed",
        ),
        (
            r"unrecognized arguments?: (.{1,200})",
            r"the installed release does not know \1; "
            "look at generator.engine_init_kwargs, or install the release that has it",
        ),
        (
            r"FileNotFoundError.*'ninja'|ninja: (?:command )?not found|[Nn]inja is required",
            "ninja is missing: the server compiles a part of itself at its first start; "
            "install it into the server's environment or put it on PATH",
        ),
        (
            r"FileNotFoundError.*'(?:g\+\+|c\+\+|gcc|cc)'|(?:g\+\+|c\+\+|gcc): (?:command )?not found"
            r"|InvalidCxxCompiler|No working C\+\+ compiler|Failed to find C compiler",
            "a C++ compiler is missing: the server compiles a part of itself; install g++ and put it on PATH",
        ),
        (
            r"CUDA out of memory|torch\.(?:cuda\.)?OutOfMemoryError|CUDA error: out of memory|NCCL.*out of memory"
            r"|increase --mem-fraction-static|No available memory for the cache blocks"
            r"|less than desired GPU memory utilization|larger than the available KV cache memory",
            "the GPU has too little free memory: change generator.gpu_memory_utilization, "
            "see who else uses the GPU, or give the engine more GPUs",
        ),
        (
            r"\bMemoryError\b|DefaultCPUAllocator: (?:can't|not enough memory)|Cannot allocate memory",
            "the machine has too little free memory",
        ),
        (r"No space left on device", "a disk is full"),
        (
            r"Found no NVIDIA driver|No CUDA GPUs are available|libcuda\.so\.1: cannot open",
            "the server sees no GPU: look at CUDA_VISIBLE_DEVICES and at the driver",
        ),
        (
            r"is not a local folder and is not a valid model identifier|Repository Not Found|LocalEntryNotFoundError"
            r"|Can't load the configuration of|does not appear to have a file named config\.json",
            "the model can't be loaded: look at trainer.policy.model.path, which the server must see too",
        ),
        (_BIND_LOST.pattern, "a port is taken by another process"),
    )
)
