"""The server's end of a group that a trainer forms. Runs inside a server's interpreter and knows torch alone."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed

dist: Any = torch.distributed


def join_group(
    *, host: str, port: int, name: str, backend: str, rank: int, world_size: int, timeout_s: float = 120.0
) -> Any:
    """Rank `rank` >= 1 of the group that listens at host:port; blocks until all are in.

    The arguments are those of the trainer's GroupAddress, with `rank` counted from its `first_worker_rank`. The
    result has `broadcast([tensor], options)`; see `receive`. Raises RuntimeError when the trainer isn't there.
    """
    timeout = timedelta(seconds=timeout_s)
    store = dist.TCPStore(host, port, world_size, is_master=False, timeout=timeout)
    for prefix in (name, f"{name}/", "cpu/" if backend == "gloo" else "cuda/"):
        store = dist.PrefixStore(prefix, store)
    if backend == "gloo":
        return dist.ProcessGroupGloo(store, rank, world_size, timeout)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(store, rank, world_size, options)


def receive(group: Any, tensor: Any, *, timeout_s: float = 120.0) -> None:
    """Fills `tensor` (contiguous, on the group's device) with what rank 0 broadcasts next. Raises RuntimeError."""
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    options.timeout = timedelta(seconds=timeout_s)
    group.broadcast([tensor], options).wait()
    if tensor.is_cuda:
        torch.cuda.current_stream(tensor.device).synchronize()
