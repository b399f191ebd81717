"""Writing a file so that a reader sees the old one or the new one, never a part."""

from __future__ import annotations

import os
from pathlib import Path


def replace_file(path: Path, content: bytes) -> None:
    """Write beside `path`, then rename over it. A kill in between leaves `path` as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The name is fixed, not random: what a kill left behind is overwritten by the next try.
    beside = path.with_name(f".{path.name}.partial")
    with beside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
