"""Tables of keys for the documentation, made from the schema: `python -m skyrl_train.config.tables`.

Rewrites what stands between `<!-- keys: GROUP -->` (or `sglang: GROUP`, `aliases`, `unbuilt`) and `<!-- end -->` in
docs/*.md, and the full SGLang example. `--check` only compares.
"""

from __future__ import annotations

import re
import sys
import types
import typing
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from skyrl_train.config.aliases import ALIASES, GROUP_ALIASES
from skyrl_train.config.base import base_keys, default_of
from skyrl_train.config.defaults import BACKEND_DEFAULTS, DERIVED_DEFAULTS
from skyrl_train.config.example import full_example
from skyrl_train.config.keys import schema_groups, schema_keys
from skyrl_train.config.unbuilt import EVERY_BACKEND, UNBUILT
from skyrl_train.engines.sglang.args import ARGUMENTS, Argument

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
EXAMPLE = ROOT / "examples" / "sglang" / "sglang_full_config_example.yaml"
_BLOCK = re.compile(r"(<!-- (keys|sglang|aliases|unbuilt):? ?(\S*) -->\n).*?(<!-- end -->)", re.DOTALL)


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


def key_table(prefix: str, *, without: Collection[str] = ()) -> str:
    """A Markdown table of the keys at and below `prefix`, but those below a prefix in `without`."""
    lines = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for path in _under(prefix, without):
        name = path.removeprefix(f"{prefix}.")
        lines.append(f"| `{name}` | {_cell(type_text(path))} | {_cell(_default_text(path))} | {_meaning(path)} |")
    return "\n".join(lines) + "\n"


def sglang_table(prefix: str, *, without: Collection[str] = ()) -> str:
    """A Markdown table of the keys below `prefix` with the server argument that each writes."""
    lines = ["| key | argument | when null | releases | meaning |", "|---|---|---|---|---|"]
    rows_of: dict[str, list[Argument]] = {}
    for row in ARGUMENTS:
        rows_of.setdefault(row.key, []).append(row)
    for path in _under(prefix, without):
        for row in rows_of.get(path, ()):
            name = path.removeprefix(f"{prefix}.")
            lines.append(
                f"| `{name}` | `{row.field}` | {_cell(_when_null(path, row)) or '—'} | {_releases(row)} | "
                f"{_meaning(path)} |"
            )
    return "\n".join(lines) + "\n"


def alias_table() -> str:
    """A Markdown table of short names."""
    lines = ["| short | key |", "|---|---|"]
    lines += [f"| `{alias}` | `{key}` |" for alias, key in ALIASES.items()]
    lines += [f"| `{alias}.*` | `{key}.*` |" for alias, key in GROUP_ALIASES.items() if key in schema_groups()]
    return "\n".join(lines) + "\n"


def unbuilt_table() -> str:
    """A Markdown table of what is refused for now."""
    lines = ["| setting | backend | not built yet | meanwhile |", "|---|---|---|---|"]
    for row in UNBUILT:
        backends = "any" if len(row.backends) == len(EVERY_BACKEND) else ", ".join(row.backends)
        lines.append(f"| `{row.prefix}` | {backends} | {row.feature} | {_cell(row.instead)} |")
    return "\n".join(lines) + "\n"


def render(text: str) -> str:
    """A page with its tables made anew. A block leaves out what the page's other blocks of its kind show."""
    blocks = [(found[2], found[3]) for found in _BLOCK.finditer(text)]

    def table(kind: str, prefix: str) -> str:
        if kind == "aliases":
            return alias_table()
        if kind == "unbuilt":
            return unbuilt_table()
        others = [other for other_kind, other in blocks if other_kind == kind and other != prefix]
        inner = [other for other in others if other.startswith(f"{prefix}.")]
        return key_table(prefix, without=inner) if kind == "keys" else sglang_table(prefix, without=inner)

    return _BLOCK.sub(lambda found: found[1] + table(found[2], found[3]) + found[4], text)


def main(argv: Sequence[str]) -> int:
    fresh = {page: render(page.read_text(encoding="utf-8")) for page in sorted(DOCS.glob("*.md"))}
    fresh[EXAMPLE] = full_example()
    stale = [page for page, text in fresh.items() if not page.exists() or page.read_text(encoding="utf-8") != text]
    for page in stale:
        if "--check" not in argv:
            page.write_text(fresh[page], encoding="utf-8")
        print(f"{'stale' if '--check' in argv else 'written'}: {page.relative_to(ROOT)}")
    return int(bool(stale) and "--check" in argv)


def _under(prefix: str, without: Collection[str]) -> list[str]:
    assert prefix in schema_groups(), f"no group {prefix!r}; groups: {', '.join(schema_groups())}"
    return [
        path
        for path in schema_keys()
        if path.startswith(f"{prefix}.") and not any(path.startswith(f"{inner}.") for inner in without)
    ]


def _type(field: FieldInfo) -> str:
    options = _options(field.annotation)
    texts = list(dict.fromkeys(_one_type(option) for option in options if option is not type(None)))
    bounds = _bounds(field.metadata)
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


def _when_null(path: str, row: Argument) -> str:
    if default_of(path) is not None:
        return ""
    if path in DERIVED_DEFAULTS:
        return f"{DERIVED_DEFAULTS[path][0]}"
    return "this project's choice" if "sglang" in BACKEND_DEFAULTS.get(path, {}) else row.default


def _releases(row: Argument) -> str:
    since = f"since {row.since}" if row.since else ""
    until = f"before {row.until}" if row.until else ""
    instead = f"; then {_cell(row.instead)}" if row.until and row.instead else ""
    return (" ".join(filter(None, (since, until))) or "all") + instead


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
