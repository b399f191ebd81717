"""What an answer can't be held to is refused: xgrammar takes each of these schemas, and answers that break it."""

from __future__ import annotations

from typing import Any

import pytest

from skyrl_train.engines.embedded.rules.json_schema import unheld

Schema = dict[str, Any]


@pytest.mark.parametrize(
    ("schema", "wanted"),
    [
        ({"type": "array", "uniqueItems": True}, "'uniqueItems' (#)"),
        ({"not": {"type": "string"}}, "'not' (#)"),
        ({"type": "string", "if": {}, "then": {}}, "'if' (#)"),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, "'dependentRequired' (#)"),
        ({"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 5}]}, "'allOf' of more than one schema (#)"),
        ({"type": "integer", "anyOf": [{"type": "integer"}]}, "'anyOf' and beside it 'type' (#)"),
        ({"$ref": "#/$defs/x", "minimum": 4, "$defs": {"x": {}}}, "'$ref' and beside it 'minimum' (#)"),
        ({"type": "integer", "enum": [1, 2], "minimum": 2}, "'enum' and beside it 'minimum' (#)"),
        ({"$ref": "https://example.org/x"}, "'$ref' to another document, 'https://example.org/x' (#)"),
        ({"type": "string", "pattern": "^a+$", "maxLength": 2}, "'pattern' and 'maxLength' together (#)"),
        ({"type": "string", "format": "date", "minLength": 2}, "'format' and 'minLength' together (#)"),
        ({"type": "string", "format": "iri"}, "'format' 'iri' (#)"),
        ({"type": "string", "pattern": 'a"b'}, "a 'pattern' with '\"', which JSON writes otherwise, (#)"),
        ({"type": "string", "pattern": "a\\nb"}, "a 'pattern' with '\\\\n', which JSON writes otherwise, (#)"),
        ({"type": "number", "multipleOf": 0.5}, '\'multipleOf\' of anything but "type": "integer" (#)'),
        ({"type": "integer", "multipleOf": 5, "minimum": 3}, "'multipleOf' and 'minimum' together (#)"),
        ({"minimum": 3}, '\'minimum\' without "type": "number" (#)'),
        ({"type": "object", "required": ["z"]}, "'required' 'z', which is none of its properties (#)"),
        ({"type": "array", "contains": {}, "items": {}}, "'contains' and 'items' together (#)"),
    ],
)
def test_what_an_answer_can_not_be_held_to_is_found(schema: Schema, wanted: str) -> None:
    assert unheld(schema) == wanted


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"type": "object", "properties": {"a": {"not": {}}}}, "#/properties/a"),
        ({"type": "array", "items": {"anyOf": [{}, {"not": {}}]}}, "#/items/anyOf/1"),
        (
            {"$defs": {"x": {"type": "array", "prefixItems": [{"not": {}}]}}, "$ref": "#/$defs/x"},
            "#/$defs/x/prefixItems/0",
        ),
    ],
)
def test_it_is_found_wherever_it_is(schema: Schema, place: str) -> None:
    assert unheld(schema) == f"'not' ({place})"


@pytest.mark.parametrize(
    "schema",
    [
        True,
        {},
        {"type": "object", "properties": {"not": {"type": "string", "maxLength": 3}, "if": {"enum": ["uniqueItems"]}}},
        {"$defs": {"x": {"type": "integer"}}, "title": "T", "description": "D", "$ref": "#/$defs/x"},
        {"type": "string", "enum": ["a"]},
        {"type": "object", "propertyNames": {"maxLength": 3}, "additionalProperties": {"type": "integer"}},
        {"type": ["string", "null"], "pattern": "^[a-z]{2}[0-9]$"},
    ],
)
def test_what_can_be_held_is_let_through(schema: Schema) -> None:
    assert unheld(schema) is None
