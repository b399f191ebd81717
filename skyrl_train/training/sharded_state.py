"""Tensors by name in torch's distributed checkpoint format, whatever number of processes saves or loads them.

    save on 1, 2, ... ranks  ->  shard-00001-....safetensors  shard-00002-...  ->  load on 1, 2, ... ranks

Every rank writes its shards with their place in the whole; a loader reads what its own tensors, plain or sharded
(DTensor), need of them. The files are safetensors: nothing in them is ever executed, and there is no pickled index.
Without an initialised process group this process is the only rank.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

MAX_NAMES_SHOWN = 3
MAX_FILE_BYTES = 2**30


def save_tensors(folder: Path, tensors: Mapping[str, torch.Tensor], *, max_file_bytes: int = MAX_FILE_BYTES) -> None:
    """Write them into `folder`, which holds no others. With a process group all ranks call this together.

    A file holds `max_file_bytes` of whole tensors, or one tensor that is larger: each is put together in memory.
    Raises OSError, on every rank, where one of them can't write.
    """
    files = _file_numbers(tensors, max_file_bytes)
    writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=files, save_distributed=True)
    with _alone_is_fine(), _plain_errors(folder):
        save(dict(tensors), storage_writer=writer, no_dist=not dist.is_initialized())


def stored_names(folder: Path) -> set[str]:
    """The names of the tensors in `folder`."""
    return set(_read_index(folder))


def load_tensors(folder: Path, targets: Mapping[str, torch.Tensor]) -> None:
    """Fill `targets` in place. With a process group all ranks call this together.

    Raises ValueError, with nothing filled, unless names, shapes and dtypes are the same.
    """
    stored = _read_index(folder)
    missing, unknown = sorted(targets.keys() - stored.keys()), sorted(stored.keys() - targets.keys())
    different = [
        f"{name} (here {tensor.dtype} {list(tensor.shape)}, stored {stored[name][1]} {list(stored[name][0])})"
        for name, tensor in targets.items()
        if name in stored and stored[name] != (tensor.shape, tensor.dtype)
    ]
    problems = [
        f"{len(names)} {what}: {', '.join(names[:MAX_NAMES_SHOWN])}"
        for what, names in (("missing", missing), ("not wanted here", unknown), ("different", different))
        if names
    ]
    if problems:
        raise ValueError(f"of the tensors in {folder} are {'; '.join(problems)}")
    with _alone_is_fine(), _plain_errors(folder):
        load(dict(targets), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=not dist.is_initialized())


def unique_tensors(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tied tensors once, under their first name."""
    seen: dict[int, str] = {}
    return {name: tensor for name, tensor in state.items() if seen.setdefault(_identity(tensor), name) == name}


def with_tied(loaded: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`loaded`, made for `unique_tensors(state)`, under all of the names in `state`."""
    first: dict[int, str] = {}
    return {name: loaded[first.setdefault(_identity(tensor), name)] for name, tensor in state.items()}


def _identity(tensor: torch.Tensor) -> int:
    # An empty tensor has no address; it is its own.
    return tensor.data_ptr() or -id(tensor)


def _read_index(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    with _plain_errors(folder):
        metadata = HuggingFaceStorageReader(str(folder)).read_metadata()
    index = {}
    for name, entry in metadata.state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata), (name, entry)
        index[name] = (entry.size, entry.properties.dtype)
    return index


def _file_numbers(tensors: Mapping[str, torch.Tensor], max_file_bytes: int) -> dict[str, int]:
    """Name -> file, from 1, in order: the same on every rank, because a sharded tensor's size is that of the whole."""
    number, filled, result = 1, 0, {}
    for name, tensor in tensors.items():
        num_bytes = tensor.numel() * tensor.element_size()
        if filled and filled + num_bytes > max_file_bytes:
            number, filled = number + 1, 0
        filled += num_bytes
        result[name] = number
    return result


@contextmanager
def _plain_errors(folder: Path) -> Iterator[None]:
    """torch wraps what goes wrong on some rank in a class that is no Exception: nobody would catch it."""
    try:
        yield
    except CheckpointException as exc:
        cause, _ = next(iter(exc.failures.values()))
        if isinstance(cause, SafetensorError):
            raise ValueError(f"{folder} holds a file that is not whole: {cause}") from exc
        raise cause from exc
    except SafetensorError as exc:
        raise ValueError(f"{folder} holds a file that is not whole: {exc}") from exc


@contextmanager
def _alone_is_fine() -> Iterator[None]:
    """torch warns when one process saves or loads; here that is the ordinary case."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
        yield
