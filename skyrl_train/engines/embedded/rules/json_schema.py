"""JSON schemas as xgrammar can hold an answer to them; what it would take and ignore is refused (0.2.8).

`oneOf` is held as `anyOf` where two of its schemas may both fit. Properties that no schema names are not written.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

_IGNORED = (
    *("not", "if", "then", "else", "dependentRequired", "dependentSchemas", "dependencies"),
    *("$dynamicRef", "$recursiveRef"),
)
_OF_TYPE = {
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    "string": ("minLength", "maxLength", "pattern", "format"),
    "array": ("minItems", "maxItems", "contains"),
    "object": ("minProperties", "maxProperties"),
}
_WHOLE = ("$ref", "enum", "const", "anyOf", "oneOf", "allOf")
"""A schema with one of these is held to it, and to nothing beside it."""
_BESIDE = (
    *("$defs", "definitions", "$schema", "$id", "$anchor", "$comment", "title", "description", "default", "examples"),
    *("deprecated", "readOnly", "writeOnly", "discriminator"),
)
"""What says nothing of the answer."""
_NOT_TOGETHER: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("pattern", "format"), ("minLength", "maxLength")),
    (("pattern",), ("format",)),
    (("multipleOf",), ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")),
    (("contains",), ("items", "prefixItems")),
)
_FORMATS = (
    *("email", "date", "time", "date-time", "duration", "ipv4", "ipv6", "hostname", "uuid", "uri", "uri-reference"),
    *("uri-template", "json-pointer", "relative-json-pointer"),
)
_UNWRITABLE = re.compile(r'["\x00-\x1f]|\\[\\nrtfv0xuc]')
"""In a pattern: what JSON writes with a backslash."""
_NAMED = ("properties", "patternProperties", "$defs", "definitions")
_LISTED = ("prefixItems", "anyOf", "oneOf", "allOf")
_SINGLE = ("items", "additionalProperties", "unevaluatedProperties", "unevaluatedItems", "propertyNames", "contains")


def unheld(schema: Any) -> str | None:
    """What the schema asks and an answer can't be held to, with its place; None if there is nothing."""
    for place, part in _parts(schema, "#"):
        if what := next(_unheld(part, is_name=place.endswith("/propertyNames")), None):
            return f"{what} ({place})"
    return None


def _parts(schema: Any, place: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The schema and all schemas in it, with their places."""
    if not isinstance(schema, dict):
        return
    yield place, schema
    for key in _NAMED:
        named = schema.get(key)
        for name, part in named.items() if isinstance(named, dict) else ():
            yield from _parts(part, f"{place}/{key}/{name}")
    for key in _LISTED:
        listed = schema.get(key)
        for index, part in enumerate(listed if isinstance(listed, list) else ()):
            yield from _parts(part, f"{place}/{key}/{index}")
    for key in _SINGLE:
        yield from _parts(schema.get(key), f"{place}/{key}")


def _unheld(schema: dict[str, Any], *, is_name: bool) -> Iterator[str]:
    """`is_name`: of a property's name, which is a string without saying so."""
    for key in _IGNORED:
        if key in schema:
            yield repr(key)
    if schema.get("uniqueItems"):
        yield "'uniqueItems'"
    for key in _WHOLE:
        if key not in schema:
            continue
        harmless = {key, *_BESIDE, *(("type",) if key in ("enum", "const") else ())}
        if beside := sorted(schema.keys() - harmless):
            yield f"{key!r} and beside it {beside[0]!r}"
    if len(schema.get("allOf") or ()) > 1:
        yield "'allOf' of more than one schema"
    if not str(schema.get("$ref", "#")).startswith("#"):
        yield f"'$ref' to another document, {schema['$ref']!r}"
    for keys, others in _NOT_TOGETHER:
        if (one := _first(keys, schema)) and (other := _first(others, schema)):
            yield f"{one!r} and {other!r} together"
    if "multipleOf" in schema and schema.get("type") != "integer":
        yield '\'multipleOf\' of anything but "type": "integer"'
    if "format" in schema and schema["format"] not in _FORMATS:
        yield f"'format' {schema['format']!r}"
    if found := _UNWRITABLE.search(str(schema.get("pattern", ""))):
        yield f"a 'pattern' with {found.group()!r}, which JSON writes otherwise,"
    if "type" not in schema and not is_name:
        for kind, keys in _OF_TYPE.items():
            if untyped := _first(keys, schema):
                yield f'{untyped!r} without "type": "{kind}"'
    required, declared = schema.get("required"), schema.get("properties")
    for name in required if isinstance(required, list) else ():
        if name not in (declared if isinstance(declared, dict) else {}):
            yield f"'required' {name!r}, which is none of its properties"


def _first(keys: tuple[str, ...], schema: dict[str, Any]) -> str | None:
    return next((key for key in keys if key in schema), None)
