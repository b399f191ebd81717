"""Tables of keys for the documentation, made from the schema: `python -m skyrl_train.config.tables`.

Rewrites what stands between `<!-- keys: PREFIX -->` and `<!-- end -->` in docs/*.md; `--check` only compares.
"""

from __future__ import annotations

import re
import sys
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from skyrl_train.config.base import base_keys, default_of
from skyrl_train.config.defaults import BACKEND_DEFAULTS, DERIVED_DEFAULTS
from skyrl_train.config.keys import schema_groups, schema_keys
from skyrl_train.engines.sglang.args import ARGUMENTS

DOCS = Path(__file__).parents[2] / "docs"
_BLOCK = re.compile(r"(<!-- (keys|sglang): (\S*) -->\n).*?(<!-- end -->)", re.DOTALL)


def value_text(value: Any) -> str:
    """A value as YAML writes it, on one line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(value_text(item) for item in value)}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {value_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, float):
        return f"{value:g}" if value != int(value) or abs(value) >= 1e6 else str(value)
    return str(value)


def type_text(path: str) -> str:
    """What a key takes: its type, choices and range."""
    return _type(schema_keys()[path])


def key_table(prefix: str) -> str:
    """A Markdown table of the keys directly under `prefix` and in its groups."""
    lines = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for path in _under(prefix):
        name = path.removeprefix(f"{prefix}.")
        lines.append(f"| `{name}` | {_cell(type_text(path))} | {_cell(_default_text(path))} | {_meaning(path)} |")
    return "\n".join(lines) + "\n"


def sglang_table(prefix: str) -> str:
    """A Markdown table of the keys under `prefix` with the server argument that each writes."""
    lines = ["| key | ServerArgs field | SGLang's default | releases | meaning |", "|---|---|---|---|---|"]
    for argument in ARGUMENTS:
        if argument.key == prefix or argument.key.startswith(f"{prefix}."):
            name = argument.key.removeprefix(f"{prefix}.")
            lines.append(
                f"| `{name}` | `{argument.field}` | {_cell(argument.default) or '—'} | "
                f"{_releases(argument.since, argument.until)} | {_meaning(argument.key)} |"
            )
    return "\n".join(lines) + "\n"


def render(text: str) -> str:
    """A page with its tables made anew."""
    makers = {"keys": key_table, "sglang": sglang_table}
    return _BLOCK.sub(lambda found: found[1] + makers[found[2]](found[3]) + found[4], text)


def main(argv: Sequence[str]) -> int:
    stale = []
    for page in sorted(DOCS.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        if (fresh := render(text)) != text:
            stale.append(page.name)
            if "--check" not in argv:
                page.write_text(fresh, encoding="utf-8")
    if stale:
        print(f"{'stale' if '--check' in argv else 'rewritten'}: {', '.join(stale)}")
    return int(bool(stale) and "--check" in argv)


def _under(prefix: str) -> Iterable[str]:
    """Keys of one group; of a group with large groups inside, only those that stand in it directly."""
    groups = schema_groups()
    assert prefix in groups, f"no group {prefix!r}; groups: {', '.join(groups)}"
    return [path for path in schema_keys() if path.startswith(f"{prefix}.")]


def _type(field: FieldInfo) -> str:
    options = _options(field.annotation)
    texts = list(dict.fromkeys(_one_type(option) for option in options if option is not type(None)))
    bounds = _bounds(field.metadata) or _bounds(
        bound for option in options for bound in getattr(option, "__metadata__", ())
    )
    return " or ".join(texts) + (f" {bounds}" if bounds else "")


def _one_type(annotation: Any) -> str:
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        inner, *metadata = typing.get_args(annotation)
        bounds = _bounds(metadata)
        return _one_type(inner) + (f" {bounds}" if bounds else "")
    if origin is typing.Literal:
        return ", ".join(map(str, typing.get_args(annotation)))
    if origin is dict:
        return "mapping"
    if origin is tuple:
        return f"list of {_one_type(typing.get_args(annotation)[0])}"
    names = {int: "whole number", float: "number", bool: "true or false", str: "text"}
    return names.get(annotation, str(annotation))


def _options(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _bounds(metadata: Iterable[Any]) -> str:
    signs: list[str] = []
    for item in metadata:
        for bound in getattr(item, "metadata", [item]):
            match bound:
                case Ge(ge=value):
                    signs.append(f"≥ {value}")
                case Gt(gt=value):
                    signs.append(f"> {value}")
                case Le(le=value):
                    signs.append(f"≤ {value}")
                case Lt(lt=value):
                    signs.append(f"< {value}")
    return ", ".join(dict.fromkeys(signs))


def _default_text(path: str) -> str:
    text = value_text(default_of(path))
    if path in BACKEND_DEFAULTS:
        return f"{text}: by backend ({', '.join(BACKEND_DEFAULTS[path])})"
    if path in DERIVED_DEFAULTS:
        return f"{text}: from {DERIVED_DEFAULTS[path][0]}"
    return f"{text} (base.yaml)" if path in base_keys() else text


def _meaning(path: str) -> str:
    return _cell(schema_keys()[path].description or "")


def _releases(since: str | None, until: str | None) -> str:
    return " ".join(filter(None, (f"since {since}" if since else "", f"before {until}" if until else ""))) or "all"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
