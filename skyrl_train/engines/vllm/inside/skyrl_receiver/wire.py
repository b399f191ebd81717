"""The trainer's messages, and the group that its tensors come by."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch


@dataclass(frozen=True)
class Piece:
    """One tensor of a flat bucket: `count` numbers of `dtype`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def pieces(described: list[list[Any]]) -> list[Piece]:
    """From `[[name, "float32", [2, 3]], ...]`, as JSON carries it."""
    return [Piece(name, getattr(torch, dtype), tuple(shape)) for name, dtype, shape in described]


def cut(bucket: torch.Tensor, parts: list[Piece]) -> list[tuple[str, torch.Tensor]]:
    """Views of a flat tensor of bytes, one after the other in the order of `parts`."""
    found, end = [], 0
    for part in parts:
        begin, end = end, end + part.num_bytes
        found.append((part.name, bucket[begin:end].view(part.dtype).view(part.shape)))
    return found


def num_bytes(parts: list[Piece]) -> int:
    """Of the flat bucket."""
    return sum(part.num_bytes for part in parts)


@lru_cache(maxsize=1)
def worker_end() -> ModuleType:
    """skyrl_train/weight_sync/worker_end.py, loaded as a file: the package around it is not for this interpreter."""
    path = Path(__file__).resolve().parents[4] / "weight_sync" / "worker_end.py"
    spec = importlib.util.spec_from_file_location("skyrl_worker_end", path)
    assert spec is not None and spec.loader is not None, f"{path} is missing beside {__file__}"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
