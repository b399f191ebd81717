"""Processor seconds of an engine's processes, by what they are. Linux only: elsewhere there is nothing to read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

ROLES = (
    ("scheduler", "scheduler"),
    ("detokenizer", "detokenizer"),
    ("EngineCore", "engine core"),
    ("Worker", "worker"),
    ("launch_server", "HTTP server"),
    ("cli.main serve", "HTTP server"),
    ("own_engine", "own Engine's process"),
)
"""A word of a command line -> the role; all other processes are "other"."""


def cpu_seconds(pid: int | None = None, *, leave_out: str | None = None) -> dict[str, float]:
    """Since their start, of all that descend from `pid` (this process), itself left out, as is a child whose command
    line has `leave_out`, with all that it started.
    """
    ticks = os.sysconf("SC_CLK_TCK")
    seconds: dict[str, float] = {}
    root = os.getpid() if pid is None else pid
    left_out: set[int] = set()
    for child in descendants(root) if leave_out else ():
        if child not in left_out and leave_out in _command(child):
            left_out |= {child, *descendants(child)}
    for child in descendants(root):
        if child in left_out:
            continue
        try:
            fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended meanwhile
        role = role_of(_command(child))
        seconds[role] = seconds.get(role, 0.0) + (int(fields[11]) + int(fields[12])) / ticks
    return seconds


def _command(pid: int) -> str:
    """Empty for one that ended meanwhile."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def role_of(command: str) -> str:
    return next((role for word, role in ROLES if word in command), "other")


def between(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """What each role used."""
    return {role: seconds - before.get(role, 0.0) for role, seconds in after.items()}


def descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, waiting = [], [pid]
    while waiting:
        next_ones = children.get(waiting.pop(), [])
        found += next_ones
        waiting += next_ones
    return found
