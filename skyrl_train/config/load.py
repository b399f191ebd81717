"""From a command line to a checked, frozen configuration.

argv -> file + overrides (Hydra) -> aliases -> over the defaults -> schema -> backend defaults -> checks
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from skyrl_train.config.aliases import resolve_aliases
from skyrl_train.config.base import default_sources, default_tree
from skyrl_train.config.check import check
from skyrl_train.config.command_line import CommandLine, ExplainFormat, parse_command_line
from skyrl_train.config.compose import compose_settings, find_config_file
from skyrl_train.config.defaults import fill_defaults
from skyrl_train.config.findings import Checked
from skyrl_train.config.keys import Tree, schema_keys, set_path
from skyrl_train.config.machine import engine_release
from skyrl_train.config.schema import Config
from skyrl_train.config.sources import Setting, Sources
from skyrl_train.config.unbuilt import refuse_unbuilt
from skyrl_train.config.validate import refuse_unknown_keys, validate
from skyrl_train.engines.sglang.releases import ASSUMED_RELEASE
from skyrl_train.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LoadedConfig:
    """A configuration without contradictions, and where each value came from.

    `engine_release` is the installed version of the configured server, None for the embedded engine or where none is.
    """

    config: Config
    sources: Sources
    explain: ExplainFormat | None
    help: bool
    warnings: tuple[str, ...]
    engine_release: str | None

    def by_user(self, path: str) -> bool:
        """Whether the user set this key. In a mapping, as generator.engine_init_kwargs, the user set what is there."""
        if path in self.sources:
            return self.sources[path].by_user
        mapping, _, name = path.rpartition(".")
        inside = attrgetter(mapping)(self.config)
        return name in {str(key).lstrip("-").replace("-", "_") for key in inside}

    def render_explain(self) -> str:
        """What `--explain` prints; the usage for `--help`."""
        from skyrl_train.config.explain import render_explain

        return render_explain(self)

    def to_yaml(self) -> str:
        """Every resolved key, as a file that `--config-name` reads back to the same configuration."""
        text: str = yaml.safe_dump(plain(self.config), sort_keys=False, allow_unicode=True, width=120)
        return text


def load_config(argv: Sequence[str] = ()) -> LoadedConfig:
    """Compose, validate and check. Raises ConfigError; touches no GPU and starts nothing."""
    line = parse_command_line(argv)
    settings = _user_settings(line)
    tree, sources = default_tree(), default_sources()
    for setting in settings:
        set_path(tree, setting.path, setting.value)
        sources[setting.path] = setting.source
    tree = _interpolate(tree)
    config = validate(tree, sources)
    for path, (value, source) in fill_defaults(config).items():
        set_path(tree, path, value)
        sources[path] = source
    config = validate(tree, sources)
    refuse_unbuilt(config, sources)
    release = engine_release(config)
    warnings = check(Checked(config=config, sources=sources, engine_release=release or ASSUMED_RELEASE))
    return LoadedConfig(
        config=config,
        sources=sources,
        explain=line.explain,
        help=line.help,
        warnings=warnings,
        engine_release=release,
    )


def plain(config: Config) -> Tree:
    """The configuration as nested dicts, lists and scalars."""
    tree: Tree = config.model_dump(mode="json")
    return tree


def _user_settings(line: CommandLine) -> list[Setting]:
    file = find_config_file(line.config_path, line.config_name) if line.config_name else None
    settings = compose_settings(file, line.overrides)
    refuse_unknown_keys(settings)
    return [setting for setting in resolve_aliases(settings) if setting.path in schema_keys()]


def _interpolate(tree: Tree) -> Tree:
    """Resolve `${trainer.seed}` and `${oc.env:HOME}` against the whole tree."""
    try:
        resolved: Any = OmegaConf.to_container(OmegaConf.create(tree), resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as exc:
        raise ConfigError(f"an interpolation can't be resolved: {str(exc).splitlines()[0]}") from exc
    assert isinstance(resolved, dict), type(resolved)
    return {str(key): value for key, value in resolved.items()}
