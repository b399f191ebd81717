"""Where a value came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

SourceKind = Literal["default", "base.yaml", "file", "override", "backend", "derived"]


@dataclass(frozen=True, kw_only=True)
class Source:
    """`where` is the file, the override as typed, the backend, or the key that the value follows from."""

    kind: SourceKind
    where: str = ""
    alias: str | None = None

    @property
    def by_user(self) -> bool:
        return self.kind in ("file", "override")

    def __str__(self) -> str:
        text = {
            "default": "default",
            "base.yaml": "base.yaml",
            "file": self.where,
            "override": f"override {self.where}",
            "backend": f"{self.where} default",
            "derived": f"from {self.where}",
        }[self.kind]
        return f"alias {self.alias} in {text}" if self.alias and self.kind == "file" else text


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One value that the user wrote, under the path that was written."""

    path: str
    value: Any
    source: Source


Sources = Mapping[str, Source]
