"""The environment variables of a process that runs in another Python environment than ours."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from skyrl_train.errors import ConfigError


def engine_python(configured: str | None) -> str:
    """generator.engine_python as a path: symbolic links are kept, they are what makes a virtual environment."""
    return str(Path(configured).expanduser()) if configured else sys.executable


def engine_environment(python: str, extra: Mapping[str, str]) -> dict[str, str | None]:
    """What differs from our own; None takes a variable out. `extra` is generator.engine_environment and wins.

    Our PYTHONPATH and PYTHONHOME would put our packages before the engine's own. What the engine starts by name, as
    ninja, is beside its interpreter.
    """
    folder = Path(python).parent
    path = os.environ.get("PATH", os.defpath)
    own = {"PATH": f"{folder}{os.pathsep}{path}"} if folder != Path() else {}
    return {"PYTHONPATH": None, "PYTHONHOME": None, **own, **extra}


def engine_api_key(variable: str | None) -> str | None:
    """generator.engine_api_key_env's value. Raises ConfigError where there is no such variable."""
    if variable is None:
        return None
    key = os.environ.get(variable)
    if not key:
        raise ConfigError(f"generator.engine_api_key_env={variable}: no such environment variable, or it is empty")
    return key


def as_process_environment(changes: Mapping[str, str | None]) -> dict[str, str]:
    """Ours with the changes made: what a new process is given."""
    merged = {**os.environ, **changes}
    return {name: value for name, value in merged.items() if value is not None}
