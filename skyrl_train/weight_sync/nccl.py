"""Rank 0 of an NCCL communicator whose other ranks are torch's: made and left without waiting inside NCCL.

torch's own ProcessGroupNCCL makes its communicator at the first broadcast and waits in it for the others, under a lock
that its abort needs too: a server that refuses the first update would leave a thread there for good (seen with torch
2.11). Here nothing blocks: NCCL works in the background, this thread looks and aborts, and no other thread calls NCCL.

The other ranks read the communicator's id from the store under the key "0", as ProcessGroupNCCL does for its first.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from skyrl_train.errors import WeightUpdateError

cuda: Any = torch.cuda

_SUCCESS, _IN_PROGRESS, _UINT8 = 0, 7, 1
_ID_BYTES = 128
_POLL_S = 0.0002


class _UniqueId(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_char * _ID_BYTES),)


class _Config(ctypes.Structure):
    """NCCL's configuration as of 2.14, which every later release takes: what came since gets its default."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("magic", ctypes.c_uint),
        ("version", ctypes.c_uint),
        ("blocking", ctypes.c_int),
    )


class NcclSender:
    """Broadcasts from one GPU. One `send` at a time, from whichever thread; `close` only while none runs."""

    def __init__(self, store: Any, *, world_size: int, device: torch.device) -> None:
        self._store = store
        self._world_size = world_size
        self._device = device
        self._stream = cuda.Stream(device)
        self._comm: ctypes.c_void_p | None = None

    def send(self, tensor: torch.Tensor, *, timeout_s: float, given_up: Callable[[], bool]) -> None:
        """`tensor` is contiguous uint8 on this GPU. Raises WeightUpdateError when NCCL fails, after `timeout_s`, or
        soon after `given_up` says so; the communicator is gone then.
        """
        deadline = time.monotonic() + timeout_s

        def check() -> None:
            if given_up():
                raise WeightUpdateError("the broadcast was given up")
            if time.monotonic() > deadline:
                raise WeightUpdateError(f"NCCL was not done after {timeout_s:g} s")

        try:
            with cuda.device(self._device):
                if self._comm is None:
                    self._connect(check)
                self._broadcast(tensor, check)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends what the communicator is doing. A second call does nothing."""
        comm, self._comm = self._comm, None
        if comm is not None:
            with cuda.device(self._device):
                _library().ncclCommAbort(comm)

    def _connect(self, check: Callable[[], None]) -> None:
        library, unique_id, comm = _library(), _UniqueId(), ctypes.c_void_p()
        _expect(library.ncclGetUniqueId(ctypes.byref(unique_id)), "a communicator's id")
        config = _Config(size=ctypes.sizeof(_Config), magic=0xCAFEBEEF, version=21400, blocking=0)
        started = library.ncclCommInitRankConfig(
            ctypes.byref(comm), self._world_size, unique_id, 0, ctypes.byref(config)
        )
        self._comm = comm
        _expect(started, "a communicator", also=_IN_PROGRESS)
        self._store.set("0", bytes(bytearray(unique_id)))
        self._until_ready(check, "a communicator with the server")

    def _broadcast(self, tensor: torch.Tensor, check: Callable[[], None]) -> None:
        assert tensor.dtype == torch.uint8 and tensor.is_contiguous() and tensor.device == self._device, tensor.device
        self._stream.wait_stream(cuda.current_stream())
        place = ctypes.c_void_p(tensor.data_ptr())
        started = _library().ncclBroadcast(
            place,
            place,
            ctypes.c_size_t(tensor.numel()),
            _UINT8,
            0,
            self._comm,
            ctypes.c_void_p(self._stream.cuda_stream),
        )
        _expect(started, "a broadcast", also=_IN_PROGRESS)
        self._until_ready(check, "a broadcast")
        sent = cuda.Event()
        sent.record(self._stream)
        while not sent.query():
            check()
            self._look("a broadcast")
            time.sleep(_POLL_S)

    def _until_ready(self, check: Callable[[], None], what: str) -> None:
        while self._look(what) == _IN_PROGRESS:
            check()
            time.sleep(_POLL_S)

    def _look(self, what: str) -> int:
        state = ctypes.c_int()
        _expect(_library().ncclCommGetAsyncError(self._comm, ctypes.byref(state)), what)
        return _expect(state.value, what, also=_IN_PROGRESS)


def _expect(result: int, what: str, *, also: int = _SUCCESS) -> int:
    if result in (_SUCCESS, also):
        return result
    raise WeightUpdateError(f"NCCL could not make {what}: {_library().ncclGetErrorString(result).decode()}")


@cache
def _library() -> Any:
    """The NCCL that torch has loaded, or has in it. Raises WeightUpdateError."""
    torch_cuda = Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"
    for name in ("libnccl.so.2", str(torch_cuda)):
        try:
            library: Any = ctypes.CDLL(name)
            library.ncclGetErrorString.restype = ctypes.c_char_p
            library.ncclCommInitRankConfig.argtypes = (
                ctypes.c_void_p,
                ctypes.c_int,
                _UniqueId,
                ctypes.c_int,
                ctypes.c_void_p,
            )
        except (OSError, AttributeError):
            continue
        return library
    raise WeightUpdateError("this torch has no NCCL (libnccl.so.2); choose another generator.weight_sync_backend")
