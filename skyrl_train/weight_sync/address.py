"""Where a server can reach the trainer."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

from skyrl_train.errors import WeightUpdateError


def own_address(url: str) -> str:
    """This machine's address on the way to `url`. Raises WeightUpdateError."""
    parts = urlsplit(url if "://" in url else f"http://{url}")
    try:
        family, _, _, _, target = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)  # sends nothing: it only asks which way the packets would go
            return str(probe.getsockname()[0])
    except OSError as error:
        raise WeightUpdateError(f"no way from this machine to the server at {url}: {error}") from error
