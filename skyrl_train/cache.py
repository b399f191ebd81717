"""Where what is made on this machine is kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """`SKYRL_TRAIN_CACHE`, or the user's cache folder."""
    root = os.environ.get("SKYRL_TRAIN_CACHE")
    return Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "skyrl_train"
