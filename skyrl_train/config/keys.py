"""The key tree as flat paths: `trainer.policy.optimizer_config.lr` -> its field."""

from __future__ import annotations

import copy
import difflib
import functools
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic.fields import FieldInfo

from skyrl_train.config.fields import Group
from skyrl_train.config.schema import Config

Tree = dict[str, Any]


@functools.cache
def schema_keys() -> Mapping[str, FieldInfo]:
    """Every key that takes a value, in the order of the schema."""
    return dict(_walk(Config, ""))


@functools.cache
def schema_groups() -> Mapping[str, type[Group]]:
    """Every level of the tree that is not a value; the root is the empty path."""
    groups: dict[str, type[Group]] = {"": Config}
    pending: list[tuple[str, type[Group]]] = [("", Config)]
    while pending:
        prefix, group = pending.pop(0)
        for name, field in group.model_fields.items():
            if (child := _as_group(field)) is not None:
                path = _join(prefix, name)
                groups[path] = child
                pending.append((path, child))
    return groups


def takes_mapping(path: str) -> bool:
    """Whether the key's value is itself a mapping with free keys, as engine_init_kwargs is."""
    field = schema_keys().get(path)
    return field is not None and any(typing.get_origin(option) is dict for option in _options(field.annotation))


def schema_defaults() -> Tree:
    """The tree of the schema's own defaults; keys that only base.yaml knows are missing."""
    tree: Tree = {}
    for path, field in schema_keys().items():
        if not field.is_required():
            set_path(tree, path, copy.deepcopy(field.get_default(call_default_factory=True)))
    return tree


def nearest(path: str) -> str | None:
    """The key or group that an unknown path most likely means."""
    known = [*schema_keys(), *(group for group in schema_groups() if group)]
    # First a typo beside its siblings, then the right name in the wrong place, then anything alike.
    if near := _near_sibling(path, cutoff=0.75):
        return near
    if same_name := [key for key in known if key.rpartition(".")[2] == path.rpartition(".")[2]]:
        return difflib.get_close_matches(path, same_name, n=1, cutoff=0.0)[0]
    if near := _near_sibling(path, cutoff=0.6):
        return near
    close = difflib.get_close_matches(path, known, n=1, cutoff=0.6)
    return close[0] if close else None


def _near_sibling(path: str, *, cutoff: float) -> str | None:
    """The path up to its first unknown name, with that name corrected from the group that it stands in."""
    parts = path.split(".")
    for depth, name in enumerate(parts):
        parent = ".".join(parts[:depth])
        if parent not in schema_groups():
            return None
        siblings = list(schema_groups()[parent].model_fields)
        if name not in siblings:
            close = difflib.get_close_matches(name, siblings, n=1, cutoff=cutoff)
            return _join(parent, close[0]) if close else None
    return None


def get_path(tree: Mapping[str, Any], path: str) -> Any:
    value: Any = tree
    for part in path.split("."):
        value = value[part]
    return value


def set_path(tree: Tree, path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for part in parents:
        tree = tree.setdefault(part, {})
    tree[last] = value


def read(config: Group, path: str) -> Any:
    """The value of a key of a validated configuration."""
    value: Any = config
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _walk(group: type[Group], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in group.model_fields.items():
        path = _join(prefix, name)
        child = _as_group(field)
        if child is None:
            yield path, field
        else:
            yield from _walk(child, path)


def _as_group(field: FieldInfo) -> type[Group] | None:
    annotation = field.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, Group) else None


def _options(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the annotation alone."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
