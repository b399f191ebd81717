"""Grammars of requests: OpenAI's `response_format`, and `regex` and `ebnf` as SGLang names them."""

from __future__ import annotations

import json
from typing import Any

from pydantic_core import PydanticCustomError

from skyrl_train.types import Grammar

_FORMS = '{"type": "text"}, {"type": "json_object"} or {"type": "json_schema", "json_schema": {"schema": …}}'
_SCHEMA_FIELDS = {"name", "description", "schema", "strict"}


def usable_format(value: dict[str, Any] | None) -> dict[str, Any] | None:
    """A validator of `response_format`."""
    if value is None:
        return None
    kind = value.get("type")
    known = {"type", "json_schema"} if kind == "json_schema" else {"type"}
    if kind not in ("text", "json_object", "json_schema") or set(value) != known:
        raise PydanticCustomError("refused", "must be {forms}", {"forms": _FORMS})
    if kind == "json_schema":
        inner = value["json_schema"]
        if not isinstance(inner, dict) or not isinstance(inner.get("schema"), dict) or set(inner) - _SCHEMA_FIELDS:
            raise PydanticCustomError(
                "refused", "json_schema must have a schema, and beside it name, description or strict at most"
            )
    return value


def asked_grammar(*, response_format: dict[str, Any] | None, regex: str | None, ebnf: str | None) -> Grammar | None:
    """What the answer must follow; one of them at most is given."""
    if regex is not None:
        return Grammar(kind="regex", text=regex)
    if ebnf is not None:
        return Grammar(kind="ebnf", text=ebnf)
    if response_format is None or response_format["type"] == "text":
        return None
    is_any = response_format["type"] == "json_object"
    schema = {"type": "object"} if is_any else response_format["json_schema"]["schema"]
    return Grammar(kind="json_schema", text=json.dumps(schema))
