"""What every group of the schema is built from."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Group(BaseModel):
    """A level of the key tree: frozen, no unknown keys, no silent conversions ("7" is not 7, true is not 1)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _as_words(value: Any) -> Any:
    """Numbers among words, as in [custom, 10, 50], are words: they are the server's to read."""
    items = _as_tuple(value)
    if not isinstance(items, tuple):
        return items
    return tuple(str(item) if type(item) in (int, float) else item for item in items)


Strings = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
Words = Annotated[tuple[str, ...], BeforeValidator(_as_words)]
Ints = Annotated[tuple[int, ...], BeforeValidator(_as_tuple)]
Floats = Annotated[tuple[float, ...], BeforeValidator(_as_tuple)]

Dtype = Literal["float32", "bfloat16", "float16"]
Backend = Literal["embedded", "sglang", "vllm"]
