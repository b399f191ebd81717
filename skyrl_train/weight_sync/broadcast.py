"""The trainer's end of a process group whose other ranks are a server's workers.

    trainer, rank 0                              server, ranks 1 .. num_workers
    TrainerGroup.form ──► a store listens        join(address): an HTTP call; each worker connects to the store
                      ◄── all are there          (join_group of worker_end, or what the server does itself)
    broadcast(tensor) ──► gloo or NCCL ────────► its own broadcast of a tensor of the same size and type
           and, at the same time, request: the HTTP call that makes the server receive

Both halves of a step run at once, and the first that fails ends the other. A group that failed is closed: make another.

The trainer's default process group is neither needed nor touched, and several groups can live side by side: the
backend is made directly on a store of its own, under the prefixes that torch's own helper would use on the other side.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, Protocol, TypeVar

import torch
import torch.distributed

from skyrl_train.errors import WeightUpdateError
from skyrl_train.weight_sync.nccl import NcclSender
from skyrl_train.weight_sync.threads import in_thread

dist: Any = torch.distributed
"""Untyped on purpose: stores and backends are in torch's documentation and not in its annotations."""

GroupBackend = Literal["gloo", "nccl"]
Answer = TypeVar("Answer")

_POLL_S = 0.01
_GRACE_S = 5.0
_LAST_WORDS_S = 3.0
"""How long the other half of a failed step may take to say what it knows."""


@dataclass(frozen=True, kw_only=True)
class GroupAddress:
    """What a server needs to join: ranks 1 .. num_workers are its workers, `world_size` is num_workers + 1."""

    host: str
    port: int
    name: str
    backend: GroupBackend
    world_size: int
    first_worker_rank: int = 1


class TrainerGroup:
    """Rank 0 of one group. Made by `form`; every failure closes it.

    `release` asks the server to let go of its end. Gloo has no abort: a sender whose receiver stays away ends when the
    receiver's sockets close, or else at the deadline of the broadcast.
    """

    def __init__(
        self,
        *,
        address: GroupAddress,
        store: Any,
        end: _End,
        release: Callable[[], Awaitable[None]] | None,
    ) -> None:
        self.address = address
        self._store = store  # what listens: others may still come to it
        self._end: _End | None = end
        self._release = release
        self._closed = threading.Event()

    @classmethod
    async def form(
        cls,
        *,
        backend: GroupBackend,
        name: str,
        num_workers: int,
        join: Callable[[GroupAddress], Coroutine[Any, Any, None]],
        host: str = "127.0.0.1",
        device: torch.device | None = None,
        release: Callable[[], Awaitable[None]] | None = None,
        deadline_s: float = 120.0,
    ) -> TrainerGroup:
        """Listens on `host`, runs `join` and becomes rank 0 while it runs; a group of `1 + num_workers`.

        `join` returns once the server says that all its workers are in. `name` must be new to the server. `device` is
        where the tensors are that will be broadcast (NCCL). Raises WeightUpdateError within `deadline_s`.
        """
        device = device or torch.device("cpu")
        if backend == "nccl" and device.type != "cuda":
            raise WeightUpdateError(f"group {name}: NCCL broadcasts tensors on a GPU, the trainer's are on {device}")
        world_size = num_workers + 1
        deadline = time.monotonic() + deadline_s
        store = _listen(host, world_size, timeout_s=deadline_s)
        address = GroupAddress(host=host, port=store.port, name=name, backend=backend, world_size=world_size)
        joining = asyncio.ensure_future(join(address))
        forming = asyncio.ensure_future(_become_rank_0(address, store, num_workers, device, deadline))
        try:
            await _both(joining, forming, deadline_s=deadline_s)
        except BaseException as error:
            joining.cancel()
            forming.cancel()
            await asyncio.wait({joining, forming}, timeout=_LAST_WORDS_S)
            if forming.done() and not forming.cancelled() and forming.exception() is None:
                forming.result().close()
            if isinstance(error, (asyncio.CancelledError, KeyboardInterrupt, SystemExit)):
                raise
            raise WeightUpdateError(
                f"group {name}: {num_workers} worker(s) were to join at {host}:{address.port} by {backend} within "
                f"{deadline_s:g} s: {_said(error)}"
            ) from error
        return cls(address=address, store=store, end=forming.result(), release=release)

    @property
    def closed(self) -> bool:
        return self._closed.is_set()

    async def broadcast(
        self, tensor: torch.Tensor, *, request: Coroutine[Any, Any, Answer], deadline_s: float
    ) -> Answer:
        """Sends a contiguous uint8 `tensor` on the group's device while `request` runs; what `request` returned.

        Raises WeightUpdateError when either half fails or `deadline_s` is over; the group is closed then, and no
        thread is left in the broadcast (gloo's may stay until the deadline, where the server can't be asked).
        """
        name = self.address.name
        if self.closed:
            request.close()
            raise WeightUpdateError(f"group {name} is closed: an earlier broadcast failed; form a new one")
        asking = asyncio.ensure_future(request)
        sending = in_thread(f"weight-broadcast-{name}", lambda: self._send(tensor, deadline_s))
        try:
            await _both(asking, sending, deadline_s=deadline_s)
        except BaseException as error:
            asking.cancel()
            await self._give_up(sending)
            if isinstance(error, (asyncio.CancelledError, KeyboardInterrupt, SystemExit)):
                raise
            raise WeightUpdateError(
                f"group {name}: a broadcast of {tensor.numel() * tensor.element_size()} bytes failed: {_said(error)}"
            ) from error
        return asking.result()

    def close(self) -> None:
        """Drops the group on this side. A second call does nothing. No broadcast may be running."""
        self._closed.set()
        end, self._end = self._end, None
        if end is not None:
            end.close()

    def _send(self, tensor: torch.Tensor, deadline_s: float) -> None:
        end = self._end
        assert end is not None
        end.send(tensor, timeout_s=deadline_s, given_up=self._closed.is_set)

    async def _give_up(self, sending: asyncio.Future[None]) -> None:
        """Ends the group and, with it, the thread that is in its broadcast."""
        self._closed.set()
        if self._release is not None and not sending.done():
            await _settle(asyncio.ensure_future(_quietly(self._release)))
        await _settle(sending)
        # With the last reference gloo's sockets close, which ends a server that is still in its receive.
        self._end = None


class _End(Protocol):
    """Rank 0 by one library."""

    def send(self, tensor: torch.Tensor, *, timeout_s: float, given_up: Callable[[], bool]) -> None:
        """Blocks until all have it. NCCL leaves soon after `given_up()` is True, gloo when it can."""
        ...

    def close(self) -> None: ...


class _GlooEnd:
    """Its sockets close when it is collected."""

    def __init__(self, store: Any, address: GroupAddress, *, timeout_s: float) -> None:
        options = dist.ProcessGroupGloo._Options()
        options._timeout = timedelta(seconds=timeout_s)
        options._threads = 2
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=address.host, lazy_init=False)]
        self._group: Any = dist.ProcessGroupGloo(store, 0, address.world_size, options)

    def send(self, tensor: torch.Tensor, *, timeout_s: float, given_up: Callable[[], bool]) -> None:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        options.timeout = timedelta(seconds=timeout_s)
        self._group.broadcast([tensor], options).wait()

    def close(self) -> None:
        self._group = None


async def _both(first: asyncio.Future[Any], second: asyncio.Future[Any], *, deadline_s: float) -> None:
    """Waits for both; raises what failed and leaves the other to the caller.

    When the group fails first, the server gets a moment to fail too: it knows the reason.
    """
    _, pending = await asyncio.wait({first, second}, timeout=deadline_s, return_when=asyncio.FIRST_EXCEPTION)
    if first in pending and second not in pending and second.exception() is not None:
        await asyncio.wait({first}, timeout=min(_LAST_WORDS_S, deadline_s))
    # The server's reason comes first.
    errors = [error for future in (first, second) if future.done() and (error := future.exception()) is not None]
    if errors:
        raise errors[0] if len(errors) == 1 else ExceptionGroup("both sides failed", _plain(errors))
    if pending:
        waiting = " and ".join("the server's answer" if future is first else "the group" for future in pending)
        raise TimeoutError(f"{waiting} did not come within {deadline_s:g} s")


def _plain(errors: list[BaseException]) -> list[Exception]:
    return [error if isinstance(error, Exception) else RuntimeError(repr(error)) for error in errors]


def _said(error: BaseException) -> str:
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(_said(inner) for inner in error.exceptions)
    return f"{type(error).__name__}: {str(error) or 'no message'}".splitlines()[0][:600]


async def _settle(future: asyncio.Future[Any]) -> None:
    """Waits a bounded time for a future whose outcome no longer matters."""
    done, _ = await asyncio.wait({future}, timeout=_LAST_WORDS_S)
    for one in done:
        if not one.cancelled():
            one.exception()


async def _quietly(release: Callable[[], Awaitable[None]]) -> None:
    # The server that is asked to let go may be the one that died: that failure is told already.
    with suppress(Exception):
        await release()


def _listen(host: str, world_size: int, *, timeout_s: float) -> Any:
    """A store on a free port of this address alone: torch would listen on all of the machine's."""
    try:
        listener = socket.create_server((host, 0))
        port = listener.getsockname()[1]
        return dist.TCPStore(
            host,
            port,
            world_size,
            is_master=True,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
    except (OSError, RuntimeError) as error:
        raise WeightUpdateError(f"no store for a process group can listen on {host}: {error}") from error


async def _become_rank_0(
    address: GroupAddress, store: Any, num_workers: int, device: torch.device, deadline: float
) -> _End:
    """Rank 0, once the workers are there."""
    if address.backend == "gloo":
        await _workers(store, num_workers, deadline)
    remaining_s = max(deadline - time.monotonic(), 1.0)
    return await in_thread(
        f"weight-group-{address.name}", lambda: _make_end(address, store, device, timeout_s=remaining_s)
    )


async def _workers(store: Any, num_workers: int, deadline: float) -> None:
    """Waits until the workers seem to be at the store. Looking can be cancelled; a backend under construction can't."""
    # One key is written by the first client, then one by each worker that looks for the others.
    came = None
    while (keys := store.num_keys()) < 1 + num_workers:
        now = time.monotonic()
        came = came or (now if keys else None)
        if came is not None and now - came > _GRACE_S:
            return  # a release of torch that writes fewer keys; the construction has a timeout of its own
        if now > deadline:
            raise TimeoutError(f"no worker of {num_workers} came to the store")
        await asyncio.sleep(_POLL_S)


def _make_end(address: GroupAddress, store: Any, device: torch.device, *, timeout_s: float) -> _End:
    # The prefixes of torch's init_process_group(group_name=...) on a prefixed store, as servers do it.
    for prefix in (address.name, f"{address.name}/", "cpu/" if address.backend == "gloo" else "cuda/"):
        store = dist.PrefixStore(prefix, store)
    if address.backend == "gloo":
        return _GlooEnd(store, address, timeout_s=timeout_s)
    return NcclSender(store, world_size=address.world_size, device=device)
