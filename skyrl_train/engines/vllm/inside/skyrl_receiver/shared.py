"""Opens a bucket that the trainer shares: a CUDA IPC handle or a file in shared memory (weight_sync/cuda_ipc.py).

The handle is a pickle. Only what rebuilds a tensor is taken out of it; any other name is refused.
"""

from __future__ import annotations

import base64
import io
import pickle
from types import SimpleNamespace
from typing import Any

import torch
import torch.multiprocessing.reductions

from .manifest import UpdateRefused

reductions: Any = torch.multiprocessing.reductions
_DEVICE = 6
"""Where rebuild_cuda_tensor's arguments have the device: the trainer writes the GPU's UUID there."""


def open_shared(handle: str) -> torch.Tensor:
    """uint8 [n] in the trainer's memory, valid until the trainer is answered. `handle` is base64.

    Raises UpdateRefused.
    """
    try:
        shared = _Unpickler(io.BytesIO(base64.b64decode(handle))).load()["flattened_tensor"]
    except (pickle.UnpicklingError, ValueError, KeyError, TypeError, EOFError, RuntimeError) as error:
        raise UpdateRefused(f"the shared bucket can't be opened: {error}") from error
    assert isinstance(shared, torch.Tensor), type(shared)
    return shared


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("types", "SimpleNamespace"):
            return SimpleNamespace
        if module == "torch.multiprocessing.reductions" and name in _REBUILDS:
            return _REBUILDS[name]
        if module in ("torch", "torch.storage") and (
            name in _TORCH or isinstance(getattr(torch, name, 0), torch.dtype)
        ):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not a part of a tensor")


def _rebuild_cuda_tensor(*arguments: Any) -> torch.Tensor:
    device = _device_of(arguments[_DEVICE])
    tensor: torch.Tensor = reductions.rebuild_cuda_tensor(*arguments[:_DEVICE], device, *arguments[_DEVICE + 1 :])
    return tensor


def _device_of(uuid: str) -> int:
    """The number that this process gives the GPU."""
    seen = [str(torch.cuda.get_device_properties(index).uuid) for index in range(torch.cuda.device_count())]
    if uuid not in seen:
        raise UpdateRefused(
            f"the bucket is in the memory of GPU {uuid}, this worker sees {', '.join(seen)}; engine and trainer must "
            "share a GPU for cuda_ipc"
        )
    return seen.index(uuid)


_REBUILDS = {
    "rebuild_cuda_tensor": _rebuild_cuda_tensor,
    "rebuild_tensor": reductions.rebuild_tensor,
    "rebuild_storage_filename": reductions.rebuild_storage_filename,
    "rebuild_typed_storage": reductions.rebuild_typed_storage,
}
_TORCH = ("Size", "Tensor", "TypedStorage", "UntypedStorage", "device")
