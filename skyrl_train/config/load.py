"""From a command line to a checked, frozen configuration.

argv -> file + overrides (Hydra) -> aliases -> over the defaults -> schema -> backend defaults -> checks
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from skyrl_train.config.aliases import resolve_aliases
from skyrl_train.config.command_line import CommandLine, ExplainFormat, parse_command_line
from skyrl_train.config.compose import compose_settings, find_config_file, flatten
from skyrl_train.config.defaults import fill_defaults
from skyrl_train.config.keys import Tree, schema_defaults, schema_keys, set_path
from skyrl_train.config.schema import Config
from skyrl_train.config.sources import Setting, Source, Sources
from skyrl_train.config.validate import refuse_unknown_keys, validate
from skyrl_train.errors import ConfigError

BASE_FILE = Path(__file__).with_name("base.yaml")


@dataclass(frozen=True, kw_only=True)
class LoadedConfig:
    """A configuration that can run as far as it can be known here, and where each value came from."""

    config: Config
    sources: Sources
    explain: ExplainFormat | None
    help: bool
    warnings: tuple[str, ...]

    def to_yaml(self) -> str:
        """Every resolved key, as a file that `--config-name` reads back to the same configuration."""
        text: str = yaml.safe_dump(plain(self.config), sort_keys=False, allow_unicode=True, width=120)
        return text


def load_config(argv: Sequence[str] = ()) -> LoadedConfig:
    """Compose, validate and check. Raises ConfigError; touches no GPU and starts nothing."""
    line = parse_command_line(argv)
    settings = _user_settings(line)
    tree, sources = _defaults()
    for setting in settings:
        set_path(tree, setting.path, setting.value)
        sources[setting.path] = setting.source
    tree = _interpolate(tree)
    config = validate(tree, sources)
    for path, (value, source) in fill_defaults(config).items():
        set_path(tree, path, value)
        sources[path] = source
    config = validate(tree, sources)
    return LoadedConfig(config=config, sources=sources, explain=line.explain, help=line.help, warnings=())


def plain(config: Config) -> Tree:
    """The configuration as nested dicts, lists and scalars."""
    tree: Tree = config.model_dump(mode="json")
    return tree


def _user_settings(line: CommandLine) -> list[Setting]:
    file = find_config_file(line.config_path, line.config_name) if line.config_name else None
    settings = compose_settings(file, line.overrides)
    refuse_unknown_keys(settings)
    return [setting for setting in resolve_aliases(settings) if setting.path in schema_keys()]


def _defaults() -> tuple[Tree, dict[str, Source]]:
    tree, base = _default_tree()
    sources = {path: Source(kind="base.yaml" if path in base else "default") for path in schema_keys()}
    return copy.deepcopy(tree), sources


@functools.cache
def _default_tree() -> tuple[Tree, frozenset[str]]:
    base = yaml.safe_load(BASE_FILE.read_text(encoding="utf-8"))
    settings = [Setting(path=path, value=value, source=Source(kind="base.yaml")) for path, value in flatten(base)]
    refuse_unknown_keys(settings)
    tree = schema_defaults()
    for setting in settings:
        set_path(tree, setting.path, setting.value)
    return tree, frozenset(setting.path for setting in settings)


def _interpolate(tree: Tree) -> Tree:
    """Resolve `${trainer.seed}` and `${oc.env:HOME}` against the whole tree."""
    try:
        resolved: Any = OmegaConf.to_container(OmegaConf.create(tree), resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as exc:
        raise ConfigError(f"an interpolation can't be resolved: {str(exc).splitlines()[0]}") from exc
    assert isinstance(resolved, dict), type(resolved)
    return {str(key): value for key, value in resolved.items()}
