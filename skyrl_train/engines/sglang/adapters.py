"""Adapters that come as tensors, as folders in peft's format that the server reads."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from safetensors.torch import save_file

from skyrl_train.types import AdapterWeights

_IN_MEMORY = Path("/dev/shm")
"""Where a file is memory: an adapter is written and read once."""


class AdapterFolders:
    """The folders of the adapters that are loaded from tensors, each for as long as its adapter is."""

    def __init__(self, parent: Path | None) -> None:
        self._parent = parent or (_IN_MEMORY if _IN_MEMORY.is_dir() else None)
        self._root: Path | None = None
        self._folders: dict[str, Path] = {}

    async def write(self, name: str, adapter: AdapterWeights) -> str:
        """The folder, whole."""
        folder = self._folder(name)
        await asyncio.to_thread(_write, folder, adapter.tensors, adapter.config)
        self._folders[name] = folder
        return str(folder)

    async def remove(self, name: str) -> None:
        """An adapter that has no folder of ours is fine."""
        folder = self._folders.pop(name, None)
        if folder is not None:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    async def close(self) -> None:
        root, self._root = self._root, None
        self._folders.clear()
        if root is not None:
            await asyncio.to_thread(shutil.rmtree, root, ignore_errors=True)

    def _folder(self, name: str) -> Path:
        if self._root is None:
            if self._parent is not None:
                self._parent.mkdir(parents=True, exist_ok=True)
            self._root = Path(tempfile.mkdtemp(prefix="skyrl-adapters-", dir=self._parent))
        return self._root / quote(name, safe="")


def _write(folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in tensors.items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    (folder / "adapter_config.json").write_text(json.dumps(dict(config)), encoding="utf-8")
