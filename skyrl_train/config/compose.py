"""Hydra's part: one YAML file (with its defaults list and interpolations) and overrides, as flat settings.

The file is not composed over the schema but read alone, so that what the user wrote is known apart from what
the defaults are: unknown keys, aliases and sources all need that difference.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from skyrl_train.config.keys import Tree, schema_keys
from skyrl_train.config.sources import Setting, Source
from skyrl_train.errors import ConfigError

_HOME = re.compile(r"^([^=]+=)(~[^\s\"'\\,=\[\]{}()]*)$")


@dataclass(frozen=True, kw_only=True)
class ConfigFile:
    """The file named on the command line; `shown` is how messages call it."""

    path: Path
    shown: str


def find_config_file(config_path: str | None, config_name: str) -> ConfigFile:
    """`config_path` is relative to the current directory. Raises ConfigError with what is there instead."""
    folder = Path(config_path or ".").expanduser()
    name = config_name.removesuffix(".yaml").removesuffix(".yml")
    if not folder.is_dir():
        raise ConfigError(f"--config-path {config_path}: no such folder (looked in {Path.cwd()})")
    path = folder / f"{name}.yaml"
    if not path.is_file():
        here = sorted(p.stem for p in folder.glob("*.yaml"))
        found = f"the folder has {', '.join(here)}" if here else "the folder has no YAML file"
        raise ConfigError(f"--config-name {config_name}: {path} does not exist; {found}")
    return ConfigFile(path=path.resolve(), shown=str(path))


def compose_settings(file: ConfigFile | None, overrides: Sequence[str]) -> list[Setting]:
    """What the user wrote, in the file and on the command line, one entry a value; later overrides win."""
    words = [_quoted_home(text) for text in overrides]
    parsed = _parse_overrides(words)
    tree = _compose(file, [_forced(override, text) for override, text in zip(parsed, words, strict=True)])
    inherited = _inherited_paths(file, tree) if file else frozenset()
    settings = []
    for path, value in flatten(tree):
        source = _override_source(path, parsed, overrides)
        if source is None:
            assert file is not None, (path, overrides)
            where = f"the defaults of {file.shown}" if path in inherited else file.shown
            source = Source(kind="file", where=where)
        settings.append(Setting(path=path, value=value, source=source))
    return settings


def flatten(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of a nested mapping. Keys of the schema are never descended into, so mappings stay whole."""
    for name, value in tree.items():
        path = f"{prefix}.{name}" if prefix else str(name)
        if isinstance(value, dict) and value and path not in schema_keys():
            yield from flatten(value, path)
        else:
            yield path, value


def _compose(file: ConfigFile | None, overrides: list[str]) -> Tree:
    folder = file.path.parent if file else Path(__file__).parent
    try:
        with hydra.initialize_config_dir(config_dir=str(folder), version_base="1.3"):
            config = hydra.compose(config_name=file.path.stem if file else None, overrides=overrides)
        tree = OmegaConf.to_container(config, resolve=False)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as exc:
        where = file.shown if file else "the command line"
        raise ConfigError(f"{where}: {_first_lines(exc)}") from exc
    if not isinstance(tree, dict):
        raise ConfigError(f"{file.shown if file else 'configuration'}: wanted keys and values, found a list")
    return {str(key): value for key, value in tree.items()}


def _parse_overrides(overrides: Sequence[str]) -> list[Override]:
    parser = OverridesParser.create()
    parsed = []
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException as exc:
            raise ConfigError(
                f"override {text!r} is not key=value in Hydra's grammar: {_first_lines(exc)}; "
                "quote values with special characters, as in 'generator.sampling_params.stop=[\"</a>\"]'"
            ) from exc
        if override.is_sweep_override():
            raise ConfigError(f"override {text!r} names several values; one run takes one (write [a,b] for a list)")
        parsed.append(override)
    return parsed


def _quoted_home(text: str) -> str:
    """`key=~/folder` with its value in quotes: no shell expands that ~, and Hydra's grammar has none."""
    return _HOME.sub(r'\1"\2"', text)


def _forced(override: Override, text: str) -> str:
    """Hydra refuses a key that its file lacks; which keys exist is for our schema to say."""
    return text if override.is_delete() or text.startswith("+") else f"++{text}"


def _override_source(path: str, parsed: Sequence[Override], texts: Sequence[str]) -> Source | None:
    for override, text in reversed(list(zip(parsed, texts, strict=True))):
        key = override.key_or_group
        if not override.is_delete() and (path == key or path.startswith(f"{key}.") or key.startswith(f"{path}.")):
            return Source(kind="override", where=text)
    return None


def _inherited_paths(file: ConfigFile, tree: Tree) -> frozenset[str]:
    """The paths that come from files of its defaults list."""
    if not re.search(r"^defaults\s*:", file.path.read_text(encoding="utf-8"), re.MULTILINE):
        return frozenset()
    raw = OmegaConf.to_container(OmegaConf.load(file.path), resolve=False)
    assert isinstance(raw, dict), file
    own = {path for path, _ in flatten({str(key): value for key, value in raw.items()})}
    return frozenset(path for path, _ in flatten(tree) if path not in own)


def _first_lines(exc: Exception) -> str:
    """Hydra's messages go on for pages; the start says it."""
    return " ".join(line.strip() for line in str(exc).splitlines()[:4] if line.strip())
