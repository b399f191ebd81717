"""The defaults: the schema's, with the tuned numbers of base.yaml over them."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import yaml

from skyrl_train.config.compose import flatten
from skyrl_train.config.keys import Tree, get_path, schema_defaults, schema_keys, set_path
from skyrl_train.config.sources import Setting, Source
from skyrl_train.config.validate import refuse_unknown_keys

BASE_FILE = Path(__file__).with_name("base.yaml")


def default_tree() -> Tree:
    """Every key with its default; a fresh copy."""
    return copy.deepcopy(_read_base()[0])


def base_keys() -> frozenset[str]:
    """The keys whose default is in base.yaml."""
    return _read_base()[1]


def default_sources() -> dict[str, Source]:
    """Where each key's default stands."""
    return {path: Source(kind="base.yaml" if path in base_keys() else "default") for path in schema_keys()}


def default_of(path: str) -> Any:
    """A key's default, as the schema would hold it: lists are tuples."""
    value = get_path(_read_base()[0], path)
    return tuple(value) if isinstance(value, list) else value


@functools.cache
def _read_base() -> tuple[Tree, frozenset[str]]:
    base = yaml.safe_load(BASE_FILE.read_text(encoding="utf-8"))
    settings = [Setting(path=path, value=value, source=Source(kind="base.yaml")) for path, value in flatten(base)]
    refuse_unknown_keys(settings)
    tree = schema_defaults()
    for setting in settings:
        set_path(tree, setting.path, setting.value)
    return tree, frozenset(setting.path for setting in settings)
