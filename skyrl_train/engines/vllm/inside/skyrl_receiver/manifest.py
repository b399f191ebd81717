"""What the served model's checkpoint holds, and whether an update fits it: decided before a tensor is touched."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

Shape = tuple[int, ...]

EXPERTS = "experts"
MAX_HEADER_BYTES = 100 * 2**20


class UpdateRefused(RuntimeError):
    """The update does not fit the model. Nothing was changed."""


@dataclass(frozen=True)
class Manifest:
    """`shapes` by name in the checkpoint. `files` says where a tensor's first values are, empty for random weights.

    `fused` is vLLM's table of modules that it makes from several: {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}.
    `tied`: the head is the embedding, and an update may name it or not.
    """

    shapes: Mapping[str, Shape]
    files: Mapping[str, str] = field(default_factory=dict)
    fused: Mapping[str, Iterable[str]] = field(default_factory=dict)
    tied: bool = False

    def check(self, tensors: Iterable[tuple[str, Shape]]) -> None:
        """Raises UpdateRefused for unknown names, other shapes and names that come twice; the message has the first
        few of each.
        """
        seen: set[str] = set()
        unknown, wrong, twice = [], [], []
        for name, shape in tensors:
            if name in seen:
                twice.append(name)
            seen.add(name)
            if not self.files and EXPERTS in name.split("."):
                # Known from a configuration only: transformers keeps experts in one tensor, checkpoints one by one.
                continue
            expected = self._expected(name)
            if expected is None:
                unknown.append(name)
            elif tuple(shape) != expected:
                wrong.append(f"{name} is {list(shape)}, the model has {list(expected)}")
        problems = []
        if not seen:
            problems.append("it names no tensor")
        for what, names in (("unknown to the model", unknown), ("of another shape", wrong), ("named twice", twice)):
            if names:
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                problems.append(f"{what}: {'; '.join(names[:3])}{more}")
        if problems:
            raise UpdateRefused("the update does not fit the model: " + "; ".join(problems))

    def missing_parts(self, names: Iterable[str]) -> list[str]:
        """Tensors that live in one vLLM layer with some of `names` and are not among them.

        A layer is loaded as a whole: what is not given would be left as whatever memory it got. Example: names
        ["l.q_proj.weight"]; missing ["l.k_proj.weight", "l.v_proj.weight"] and the biases, if the model has some.
        """
        given = set(names)
        touched = {self.layer_of(name) for name in given}
        return [name for name in self.shapes if name not in given and self.layer_of(name) in touched]

    def layer_of(self, name: str) -> str:
        """The vLLM layer that holds the tensor: its module, or the one that this is fused into."""
        parts = name.split(".")
        if EXPERTS in parts:
            return ".".join(parts[: parts.index(EXPERTS) + 1])
        module = parts[:-1]
        for whole, pieces in self.fused.items():
            if module and module[-1] in pieces:
                return ".".join([*module[:-1], whole])
        return ".".join(module)

    def _expected(self, name: str) -> Shape | None:
        if name in self.shapes:
            return self.shapes[name]
        if self.tied and name.endswith("lm_head.weight"):
            return next((shape for known, shape in self.shapes.items() if known.endswith("embed_tokens.weight")), None)
        return None


def read_headers(folder: str) -> tuple[dict[str, Shape], dict[str, str]]:
    """Shapes and files by tensor name, from the headers of a folder's safetensors files. ({}, {}) if it has none."""
    shapes: dict[str, Shape] = {}
    files: dict[str, str] = {}
    for path in sorted(Path(folder).glob("*.safetensors")) if os.path.isdir(folder) else []:
        for name, shape in file_shapes(str(path)).items():
            shapes[name], files[name] = shape, str(path)
    return shapes, files


def file_shapes(path: str) -> dict[str, Shape]:
    """Shapes by name in one safetensors file, which must be whole. Raises UpdateRefused."""
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > MAX_HEADER_BYTES or length + 8 > size:
                raise UpdateRefused(f"{path} is no safetensors file, or cut short")
            header = json.loads(file.read(length))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise UpdateRefused(f"{path} can't be read as a safetensors file: {error}") from error
    if 8 + length + end != size:
        raise UpdateRefused(f"{path} has {size} bytes, its header needs {8 + length + end}: it was not written whole")
    return shapes


def update_files(path: str) -> list[str]:
    """The safetensors files of an update: the file itself, or all of a folder. Raises UpdateRefused."""
    if os.path.isdir(path):
        files = sorted(str(file) for file in Path(path).glob("*.safetensors"))
        if not files:
            raise UpdateRefused(f"{path} holds no safetensors file")
        return files
    if not os.path.isfile(path):
        raise UpdateRefused(f"{path} does not exist on the server's side")
    return [path]
