"""Adapters as folders in peft's format, for a server that reads them from a path."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from skyrl_train.types import AdapterWeights


class AdapterFolders:
    """Temporary folders by adapter name: they stay while the adapter is loaded, because the server reads an adapter
    again after it was pushed out of its slot.
    """

    def __init__(self) -> None:
        self._paths: dict[str, Path] = {}

    async def write(self, name: str, adapter: AdapterWeights) -> str:
        """The new folder's path. Its tensors are copies, in their own type."""
        path = Path(tempfile.mkdtemp(prefix="skyrl-adapter-"))
        try:
            await asyncio.to_thread(write_adapter, path, adapter)
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            raise
        await self.remove(name)
        self._paths[name] = path
        return str(path)

    async def remove(self, name: str) -> None:
        """An unknown name is fine."""
        if (path := self._paths.pop(name, None)) is not None:
            await asyncio.to_thread(shutil.rmtree, path, ignore_errors=True)

    async def remove_all(self) -> None:
        for name in list(self._paths):
            await self.remove(name)


def write_adapter(folder: Path, adapter: AdapterWeights) -> None:
    """adapter_model.safetensors and adapter_config.json."""
    tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in adapter.tensors.items()}
    save_file(tensors, str(folder / "adapter_model.safetensors"))
    (folder / "adapter_config.json").write_text(json.dumps(plain(adapter.config), sort_keys=True))


def plain(config: Mapping[str, object]) -> dict[str, object]:
    """The configuration in JSON's types: peft writes some as sets and enums."""
    return {key: _plain(value) for key, value in config.items()}


def _plain(value: object) -> object:
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return str(getattr(value, "value", value))
