"""A tree of values against the schema; what pydantic finds becomes messages about keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from skyrl_train.config.aliases import canonical_path
from skyrl_train.config.keys import Tree, nearest, schema_groups, schema_keys, takes_mapping
from skyrl_train.config.schema import Config
from skyrl_train.config.sources import Setting, Source, Sources
from skyrl_train.errors import ConfigError


def refuse_unknown_keys(settings: Sequence[Setting]) -> None:
    """Raises ConfigError naming each unknown key, the nearest known one, and where it was written."""
    messages = []
    for setting in settings:
        path = canonical_path(setting.path)
        if path in schema_keys() or _inside_mapping(path):
            continue
        where = f" (written {setting.path})" if path != setting.path else ""
        if path in schema_groups():
            if setting.value in ({}, None):
                continue
            children = ", ".join(list(schema_groups()[path].model_fields)[:6])
            messages.append(
                f"{path}{where} is a group of keys ({children}, ...), "
                f"found the value {setting.value!r}; {setting.source}"
            )
            continue
        unknown = _first_unknown(path)
        suggestion = nearest(path)
        hint = f"did you mean {suggestion}?" if suggestion else "docs/CONFIGURATION.md lists all keys"
        messages.append(f"unknown key {unknown}{where}: {hint} ({setting.source})")
    if messages:
        raise ConfigError(_joined(messages))


def validate(tree: Tree, sources: Sources) -> Config:
    """The frozen configuration. Raises ConfigError with every key whose value is not what the schema wants."""
    try:
        return Config.model_validate(tree)
    except ValidationError as exc:
        # One key may offer several types: pydantic reports each, we report the key once.
        found: dict[str, list[Mapping[str, Any]]] = {}
        for error in exc.errors(include_url=False):
            found.setdefault(_key_of(error["loc"]), []).append(dict(error))
        raise ConfigError(_joined([_describe(path, errors, sources) for path, errors in found.items()])) from exc


def _describe(path: str, errors: Sequence[Mapping[str, Any]], sources: Sources) -> str:
    wanted = " or ".join(dict.fromkeys(_wanted(error) for error in errors))
    source = sources.get(path, Source(kind="default"))
    field = schema_keys().get(path)
    about = f". {field.description}" if field is not None and field.description else ""
    value = errors[0]["input"]
    return f"{path} must be {wanted}, found {value!r} ({source}){about}"


def _wanted(error: Mapping[str, Any]) -> str:
    context = error.get("ctx", {})
    match error["type"]:
        case "greater_than_equal":
            return f">= {context['ge']}"
        case "greater_than":
            return f"> {context['gt']}"
        case "less_than_equal":
            return f"<= {context['le']}"
        case "less_than":
            return f"< {context['lt']}"
        case "literal_error":
            return f"one of {context['expected']}"
        case "int_type":
            return "a whole number"
        case "float_type":
            return "a number"
        case "finite_number":
            return "a finite number"
        case "bool_type":
            return "true or false"
        case "string_type":
            return "text"
        case "tuple_type":
            return "a list, as in [a,b]"
        case "dict_type":
            return "keys and values, as in {a: 1}"
        case "string_pattern_mismatch":
            return f"text that matches {context['pattern']}"
        case "string_too_short":
            return "text that is not empty"
        case _:
            message = str(error["msg"])
            return message[0].lower() + message[1:]


def _key_of(location: Sequence[int | str]) -> str:
    """The key in pydantic's location, which goes on into list items and union members."""
    for end in range(len(location), 0, -1):
        path = ".".join(str(part) for part in location[:end])
        if path in schema_keys() or path in schema_groups():
            return path
    return ".".join(map(str, location))


def _inside_mapping(path: str) -> bool:
    parts = path.split(".")
    return any(takes_mapping(".".join(parts[:end])) for end in range(1, len(parts)))


def _first_unknown(path: str) -> str:
    """`generator.smpling.top_p` -> `generator.smpling`: what comes after the unknown level is not the mistake."""
    parts = path.split(".")
    for end in range(1, len(parts) + 1):
        prefix = ".".join(parts[:end])
        if prefix not in schema_groups() and prefix not in schema_keys():
            return prefix
    return path


def _joined(messages: Sequence[str]) -> str:
    unique = list(dict.fromkeys(messages))
    return unique[0] if len(unique) == 1 else f"{len(unique)} settings are wrong:\n  - " + "\n  - ".join(unique)
