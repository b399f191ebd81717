"""Weights as a folder in Hugging Face's format, for a server that loads them from there.

    root/weights-3/      version 3: what the server has, and what a restarted server is given
    root/weights-4/      version 4: whole, or not there
    root/.writing-*/     being written; nobody looks at it

A folder that a killed run left half written is removed by the next write. On a RAM disk (/dev/shm) a folder costs
memory and no disk's time; the server must be on the same host then.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch

from skyrl_train.errors import WeightUpdateError
from skyrl_train.weight_sync.model_folder import DTYPE_NAMES, StoredTensor, stored_tensors, tied_names
from skyrl_train.weight_sync.plan import TensorSpec, WeightPlan

NUM_KEPT = 2
_COPY_BYTES = 16 * 2**20
_WEIGHT_FILES = re.compile(r".*\.(safetensors|bin|pt|pth|gguf|h5|msgpack)(\.index\.json)?$")


class WeightFolders:
    """The versions under `root`. `model_folder` gives config.json, tokenizer and what an update does not name."""

    def __init__(self, root: Path, *, model_folder: Path, max_file_bytes: int = 4 * 2**30) -> None:
        self._root = root
        self._model_folder = model_folder
        self._max_file_bytes = max_file_bytes
        self._newest: Path | None = None
        """Of this run: what another one left under the same root is no base for an update."""

    def path(self, version: int) -> Path:
        return self._root / f"weights-{version}"

    def write(self, plan: WeightPlan, tensors: Mapping[str, torch.Tensor], *, version: int) -> Path:
        """The folder of `version`: the plan's tensors, the others as in the version before or in the model's folder.

        One tensor at a time is cast and copied to the host. Raises WeightUpdateError, a full disk's included; the
        older folders are as they were then.
        """
        plan.check_tensors(tensors)
        target = self.path(version)
        temporary = self._root / f".writing-{version}-{os.getpid()}"
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            self._remove(*self._root.glob(".writing-*"))
            others = self._others(plan)
            self._make_room(plan.num_bytes + sum(stored.end - stored.start for stored in others))
            temporary.mkdir()
            self._write_tensors(temporary, plan, tensors, others)
            self._copy_small_files(temporary)
            _sync(temporary)
            self._remove(target)
            temporary.rename(target)
            _sync(self._root)
        except OSError as error:
            self._remove(temporary)
            why = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error)
            raise WeightUpdateError(
                f"weights {version} ({plan.num_bytes / 1e9:.2f} GB) can't be written to {self._root}: {why}. The "
                "engine keeps the version that it has; make room or choose another folder"
            ) from error
        except BaseException:
            self._remove(temporary)
            raise
        self._newest = target
        self._remove(*self._versions()[:-NUM_KEPT])
        return target

    def _versions(self) -> list[Path]:
        """Whole folders, the one written last at the end."""
        folders = [path for path in self._root.glob("weights-*") if path.is_dir()]
        return sorted(folders, key=lambda path: path.stat().st_mtime_ns)

    def _others(self, plan: WeightPlan) -> list[StoredTensor]:
        """What the plan leaves as it is: a server loads the folder as a whole model."""
        base = stored_tensors(self._newest or self._model_folder)
        leave = {spec.name for spec in plan.specs} | tied_names(self._model_folder)
        return [stored for name, stored in base.items() if name not in leave]

    def _make_room(self, num_bytes: int) -> None:
        """The oldest folder goes first if the new one would not fit beside it; the current one stays."""
        if shutil.disk_usage(self._root).free < num_bytes:
            self._remove(*self._versions()[:-1])
        free = shutil.disk_usage(self._root).free
        if free < num_bytes:
            raise OSError(errno.ENOSPC, f"{free / 1e9:.2f} GB are free")

    def _write_tensors(
        self, folder: Path, plan: WeightPlan, tensors: Mapping[str, torch.Tensor], others: list[StoredTensor]
    ) -> None:
        kept = {stored.spec.name: stored for stored in others}
        files = list(_files([*plan.specs, *(stored.spec for stored in others)], self._max_file_bytes))
        names = {}
        for number, specs in enumerate(files, start=1):
            name = f"model-{number:05d}-of-{len(files):05d}.safetensors" if len(files) > 1 else "model.safetensors"
            with (folder / name).open("wb") as out:
                _write_header(out, specs)
                for spec in specs:
                    names[spec.name] = name
                    if spec.name in kept:
                        _copy_bytes(out, kept[spec.name])
                    else:
                        _write_tensor(out, tensors[spec.name], spec.dtype)
                out.flush()
                os.fsync(out.fileno())
        if len(files) > 1:
            total = sum(spec.num_bytes for specs in files for spec in specs)
            index = {"metadata": {"total_size": total}, "weight_map": names}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")

    def _copy_small_files(self, folder: Path) -> None:
        for file in self._model_folder.iterdir():
            if file.is_file() and not _WEIGHT_FILES.match(file.name):
                shutil.copy(file, folder / file.name)

    def _remove(self, *folders: Path) -> None:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def _files(specs: list[TensorSpec], max_file_bytes: int) -> Iterator[list[TensorSpec]]:
    file: list[TensorSpec] = []
    size = 0
    for spec in specs:
        if file and size + spec.num_bytes > max_file_bytes:
            yield file
            file, size = [], 0
        file.append(spec)
        size += spec.num_bytes
    if file:
        yield file


def _write_header(out: BinaryIO, specs: list[TensorSpec]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in specs:
        start, end = end, end + spec.num_bytes
        header[spec.name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    out.write(struct.pack("<Q", len(text)) + text)


def _write_tensor(out: BinaryIO, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    held = tensor.detach().to(dtype=dtype).to(device="cpu").contiguous().reshape(-1)
    out.write(held.view(torch.uint8).numpy().data)


def _copy_bytes(out: BinaryIO, stored: StoredTensor) -> None:
    with stored.file.open("rb") as source:
        source.seek(stored.start)
        left = stored.end - stored.start
        while left:
            piece = source.read(min(left, _COPY_BYTES))
            if not piece:
                raise OSError(errno.EIO, f"{stored.file} ends before {stored.spec.name} does")
            out.write(piece)
            left -= len(piece)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
