"""Free ports for servers that bind them seconds later, and whose port it is then."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Iterable
from pathlib import Path

HOST = "127.0.0.1"
LOWEST_PORT = 10240
_given: set[int] = set()
"""Ports that this process gave away: two servers that start at once must not get the same one."""


def free_port() -> int:
    """One that nothing listens on now, never given before by this process.

    Taken from below the range of which the kernel gives ports to outgoing connections: a server needs a minute to get
    to its bind, and any connection of anybody could take the port until then. It may still be lost to another server.
    """
    candidates = [port for port in range(LOWEST_PORT, _first_ephemeral()) if port not in _given]
    random.SystemRandom().shuffle(candidates)
    for port in candidates:
        if _can_bind(port):
            _given.add(port)
            return port
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _first_ephemeral() -> int:
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 32768


def _can_bind(port: int) -> bool:
    """Without SO_REUSEADDR, so that a port whose old connections linger counts as taken."""
    with socket.socket() as probe:
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


def only_listeners(port: int, pids: Iterable[int]) -> bool:
    """Whether all that listens on the port belongs to these processes.

    A server that sets SO_REUSEPORT (vLLM) binds a taken port without an error, and the kernel then deals connections
    out to both. True where the system doesn't tell.
    """
    listening = _listening_inodes(port)
    if not listening:
        return True
    ours = set[str]()
    for pid in pids:
        try:
            descriptors = os.listdir(f"/proc/{pid}/fd")
        except PermissionError:
            return True
        except FileNotFoundError:
            continue
        for descriptor in descriptors:
            try:
                ours.add(os.readlink(f"/proc/{pid}/fd/{descriptor}"))
            except OSError:
                continue  # closed since it was listed
    return all(f"socket:[{inode}]" in ours for inode in listening)


def _listening_inodes(port: int) -> set[str]:
    found = set[str]()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            address, state, inode = fields[1], fields[3], fields[9]
            if state == "0A" and int(address.rpartition(":")[2], 16) == port:
                found.add(inode)
    return found
