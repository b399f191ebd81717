"""What a check is given and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from skyrl_train.config.base import default_of
from skyrl_train.config.defaults import implied_values
from skyrl_train.config.keys import read
from skyrl_train.config.schema import Config
from skyrl_train.config.sources import Sources


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A contradiction (error) or something that is likely not meant (warning)."""

    message: str
    is_error: bool = True


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A validated configuration with its sources; `engine_release` is the server's version, installed or assumed."""

    config: Config
    sources: Sources
    engine_release: str

    def value(self, path: str) -> Any:
        return read(self.config, path)

    def is_set(self, path: str) -> bool:
        """Whether the user gave the key a value other than its default."""
        return is_set(path, self.config, self.sources)

    def show(self, path: str) -> str:
        """`key=value (where it came from)`."""
        value = self.value(path)
        text = str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)
        return f"{path}={text} ({self.sources[path]})"


Rule = Callable[[Checked], Iterator[Finding]]


def is_set(path: str, config: Config, sources: Sources) -> bool:
    """Whether the user gave the key a value that it would not have had anyway.

    So a run's own config.yaml, which writes every default out, asks for nothing new.
    """
    value = read(config, path)
    return sources[path].by_user and value != default_of(path) and value != implied_values(config).get(path, (None,))[0]


def error(message: str) -> Finding:
    return Finding(message=message)


def warning(message: str) -> Finding:
    return Finding(message=message, is_error=False)
