"""A folder in Hugging Face's format: which tensors are in it, and its bytes, without loading it."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from skyrl_train.errors import WeightUpdateError
from skyrl_train.weight_sync.plan import TensorSpec

DTYPE_NAMES: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""As the header of a safetensors file writes them."""

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Bytes [start, end) of `file`, row-major."""

    spec: TensorSpec
    file: Path
    start: int
    end: int


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of the folder's safetensors files by name; empty where it has none. Raises WeightUpdateError."""
    found: dict[str, StoredTensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with file.open("rb") as handle:
                (header_bytes,) = struct.unpack("<Q", handle.read(8))
                header = json.loads(handle.read(header_bytes))
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                start, end = (8 + header_bytes + offset for offset in entry["data_offsets"])
                spec = TensorSpec(name=name, shape=tuple(entry["shape"]), dtype=_DTYPES[entry["dtype"]])
                found[name] = StoredTensor(spec=spec, file=file, start=start, end=end)
        except (OSError, ValueError, KeyError, struct.error) as error:
            raise WeightUpdateError(f"{file} is no readable safetensors file: {error!r}") from error
    return found


def model_specs(folder: Path) -> dict[str, TensorSpec]:
    """What an engine that was started with this folder has, by name; empty where the folder has no weights."""
    return {name: stored.spec for name, stored in stored_tensors(folder).items()}


def tied_names(folder: Path) -> frozenset[str]:
    """Names of the model that its checkpoint may leave out: the output layer that is the embedding."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return frozenset()
    except (OSError, ValueError) as error:
        raise WeightUpdateError(f"{folder / 'config.json'} can't be read: {error}") from error
    return frozenset({"lm_head.weight"}) if config.get("tie_word_embeddings") else frozenset()
