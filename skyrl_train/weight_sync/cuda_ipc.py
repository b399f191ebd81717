"""A bucket handed to another process on the same host without a copy: a CUDA IPC handle, or a file in shared memory.

The bytes are a pickle that holds the handle, not the data. SGLang unpickles it with a list of allowed names
(SafeUnpickler; in 0.5.23 exact names, in 0.5.17 modules): what is written here needs torch's own rebuilding functions,
torch.Size, dtypes and types.SimpleNamespace, all of which both accept. Nothing of SGLang is imported.

The receiver is done with a handle when it dropped the tensor, for which it waits for its stream: its answer to the
call that carried the handle is the sign that the buffer may be filled again.

CUDA IPC works between processes that see the same GPU, and not with the allocator's expandable segments.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace
from typing import Any

import torch
import torch.multiprocessing.reductions

from skyrl_train.weight_sync.buckets import Bucket

reductions: Any = torch.multiprocessing.reductions
_DEVICE = 6
"""Where rebuild_cuda_tensor's arguments have the device."""


def allocate_shared(num_bytes: int, device: torch.device) -> torch.Tensor:
    """uint8 [num_bytes] that another process of this host can open: on a GPU any memory, else a shared file."""
    if device.type == "cuda":
        return torch.empty(num_bytes, dtype=torch.uint8, device=device)
    new: Callable[[int], Any] = torch.UntypedStorage._new_using_filename_cpu
    return torch.empty(0, dtype=torch.uint8).set_(new(max(num_bytes, 1)))[:num_bytes]


def handle_bytes(bucket: Bucket) -> bytes:
    """The pickle of {"flattened_tensor": uint8 [n], "metadata": [name, shape, dtype, start_idx, end_idx, numel]}.

    For one receiver, once: each counts as a holder of the memory until it let go. Indices count bytes.
    """
    metadata = [
        SimpleNamespace(
            name=place.spec.name,
            shape=torch.Size(place.spec.shape),
            dtype=place.spec.dtype,
            start_idx=place.start,
            end_idx=place.end,
            numel=place.end - place.start,
        )
        for place in bucket.places
    ]
    out = io.BytesIO()
    _HandlePickler(out).dump({"flattened_tensor": bucket.data, "metadata": metadata})
    return out.getvalue()


class _HandlePickler(ForkingPickler):
    """Names a GPU by its UUID: the receiver may number its GPUs differently. Shared memory goes by its file.

    torch's own way for CPU memory is a switch for the whole process (set_sharing_strategy), and its default, file
    descriptors, ends a receiver that is no child of ours.
    """

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, torch.UntypedStorage) and obj.device.type == "cpu":
            storage: Any = obj
            manager, handle, size = storage._share_filename_cpu_()
            storage._shared_incref()  # the receiver's, who takes it back when it has opened the file
            return reductions.rebuild_storage_filename, (torch.UntypedStorage, manager, handle, size)
        if isinstance(obj, torch.Tensor) and obj.is_cuda:
            rebuild, arguments = reductions.reduce_tensor(obj)
            uuid = str(torch.cuda.get_device_properties(obj.device).uuid)
            return rebuild, (*arguments[:_DEVICE], uuid, *arguments[_DEVICE + 1 :])
        return NotImplemented
