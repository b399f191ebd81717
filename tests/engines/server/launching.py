"""How the small server is started, and who of its processes is alive."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

from skyrl_train.engines.server.guard import look_up
from skyrl_train.engines.server.process import LaunchSpec

PROGRAM = Path(__file__).with_name("small_server.py")


def small_server(folder: Path, *options: str, **spec: Any) -> LaunchSpec:
    """Its log is `folder`/logs/small-0.log, the ids of its processes are in `folder`/pids."""
    (folder / "pids").mkdir(exist_ok=True)
    command = (sys.executable, "-S", str(PROGRAM), "--pids", str(folder / "pids"), *options)
    settings = {"startup_timeout_s": 60.0, "stop_timeout_s": 60.0, "log_path": folder / "logs" / "small-0.log"}
    return LaunchSpec(name="small-0", command=command, **{**settings, **spec})


def pid_of(folder: Path, name: str) -> int:
    return int((folder / "pids" / name).read_text())


def living(folder: Path) -> list[str]:
    """The names of those that noted their ids and run."""
    return sorted(path.name for path in (folder / "pids").iterdir() if is_alive(int(path.read_text())))


def is_alive(pid: int) -> bool:
    """A process that nobody reaped yet is dead."""
    process = look_up(pid)
    return process is not None and process.state != "Z"


async def until_exists(path: Path) -> None:
    while not path.exists():
        await asyncio.sleep(0.02)


async def until_none_lives(folder: Path) -> None:
    while living(folder):
        await asyncio.sleep(0.02)
