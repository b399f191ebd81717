"""A recipe reads some of the main job's keys; setting another is refused, so that none is ignored."""

from __future__ import annotations

from collections.abc import Sequence

from skyrl_train.config.findings import is_set
from skyrl_train.config.keys import read, schema_keys
from skyrl_train.config.load import LoadedConfig
from skyrl_train.errors import ConfigError


def refuse_other_keys(loaded: LoadedConfig, applies: Sequence[str], recipe: str) -> None:
    """Raises ConfigError naming every key that is set and is neither in `applies` nor under one of its groups."""
    others = [
        path for path in schema_keys() if is_set(path, loaded.config, loaded.sources) and not _applies(path, applies)
    ]
    if others:
        found = ", ".join(f"{path}={read(loaded.config, path)} ({loaded.sources[path]})" for path in others)
        raise ConfigError(f"{recipe} has no use for {found}; leave it out. It reads {', '.join(applies)}")


def explained(loaded: LoadedConfig, applies: Sequence[str]) -> str:
    """The keys that are read, with their values and sources."""
    return "\n".join(
        f"{path}={read(loaded.config, path)}    ({loaded.sources[path]})"
        for path in schema_keys()
        if _applies(path, applies)
    )


def _applies(path: str, applies: Sequence[str]) -> bool:
    return any(path == key or path.startswith(f"{key}.") for key in applies)
