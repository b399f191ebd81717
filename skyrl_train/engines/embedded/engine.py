"""The embedded engine: the core behind asyncio.

    generate(request) --add--> core --step--> Finished --> the caller's future

All that touches the core goes through the driver (see drivers), so steps and commands never overlap. An exception
in a step fails every open request and closes the engine for good.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from skyrl_train.engines.base import EngineInfo, EngineStats, Occupant, PauseMode
from skyrl_train.engines.deadline import Deadline
from skyrl_train.engines.embedded.config import EmbeddedConfig
from skyrl_train.engines.embedded.core import EngineCore, Finished
from skyrl_train.engines.embedded.drafts.base import DraftSource
from skyrl_train.engines.embedded.drivers import Driver, InlineDriver, ThreadDriver
from skyrl_train.engines.embedded.request import RequestState
from skyrl_train.errors import EngineError, EngineUnavailable, RequestRejected, WeightUpdateError
from skyrl_train.types import AdapterWeights, Completion, GenerateRequest, WeightUpdate

DriverName = Literal["inline", "thread"]


@dataclass(frozen=True, kw_only=True)
class StreamedTokens:
    """What a request gained since the last piece; the last piece carries the whole completion."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    completion: Completion | None = None

    def joined(self, following: StreamedTokens) -> StreamedTokens:
        """This piece and the next one as one."""
        return StreamedTokens(
            token_ids=self.token_ids + following.token_ids,
            logprobs=self.logprobs + following.logprobs,
            completion=following.completion,
        )


@dataclass(eq=False, kw_only=True)
class _Caller:
    """Somebody who waits for a request: `done` for the completion, `pieces` for what a stream gains on the way."""

    loop: asyncio.AbstractEventLoop
    done: asyncio.Future[Completion]
    state: RequestState | None = None
    pieces: _Pieces | None = None
    num_sent: int = 0


_Pieces = asyncio.Queue[StreamedTokens | EngineError]


class EmbeddedEngine:
    """Implements `engines.base.Engine`. `driver` "inline" is deterministic, "thread" keeps the event loop free."""

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: Any,
        *,
        config: EmbeddedConfig,
        name: str = "embedded-0",
        policy_version: int = 0,
        driver: DriverName = "inline",
        drafts: DraftSource | None = None,
    ) -> None:
        self.core = EngineCore(model, tokenizer, config=config, name=name, policy_version=policy_version, drafts=drafts)
        self._callers: dict[str, _Caller] = {}
        self._streams: dict[str, _Caller] = {}
        self._outbox: dict[asyncio.AbstractEventLoop, list[tuple[_Pieces, StreamedTokens]]] = {}
        """Pieces of this step, by the loop that reads them: a loop is woken once a step, not once a piece."""
        self._drained: list[asyncio.Future[None]] = []
        self._failure: BaseException | None = None
        self._closed = False
        kind: type[InlineDriver] | type[ThreadDriver] = InlineDriver if driver == "inline" else ThreadDriver
        self._driver: Driver = kind(name, self._step)

    @property
    def info(self) -> EngineInfo:
        return self.core.info

    async def start(self) -> None:
        """Nothing to wait for: it was ready when it was made."""
        self._check_open()

    async def stats(self) -> EngineStats:
        def read() -> EngineStats:
            self._check_open()
            return self.core.stats()

        return await self._driver.read(read)

    async def metrics_text(self) -> str:
        """None beside what `stats` says."""
        return ""

    # -- requests

    async def generate(self, request: GenerateRequest) -> Completion:
        async with Deadline(request, self.abort) as deadline:
            caller = await self._submit(request, streams=False)
            try:
                return deadline.marked(await caller.done)
            finally:
                self._leave(request.request_id, caller)

    async def stream(self, request: GenerateRequest) -> AsyncGenerator[StreamedTokens, None]:
        """Like `generate`, in pieces as they are sampled; leaving the iteration aborts the request.

        Steps that were made while the reader was busy come as one piece: a slow reader has less to do, not more.
        """
        async with Deadline(request, self.abort) as deadline, aclosing(self._pieces_of(request)) as pieces:
            async for piece in pieces:
                whole = piece.completion
                yield piece if whole is None else replace(piece, completion=deadline.marked(whole))

    async def _pieces_of(self, request: GenerateRequest) -> AsyncGenerator[StreamedTokens, None]:
        caller = await self._submit(request, streams=True)
        pieces = caller.pieces
        assert pieces is not None
        try:
            while True:
                piece = await pieces.get()
                while isinstance(piece, StreamedTokens) and not pieces.empty():
                    following = pieces.get_nowait()
                    if isinstance(following, EngineError):
                        yield piece
                        piece = following
                    else:
                        piece = piece.joined(following)
                if isinstance(piece, EngineError):
                    raise piece
                yield piece
                if piece.completion is not None:
                    return
        finally:
            self._leave(request.request_id, caller)

    async def abort(self, request_ids: Sequence[str]) -> None:
        ids = tuple(request_ids)
        await self._driver.call(lambda: self._deliver(self.core.abort(ids)))

    async def _submit(self, request: GenerateRequest, *, streams: bool) -> _Caller:
        loop = asyncio.get_running_loop()
        caller = _Caller(loop=loop, done=loop.create_future(), pieces=asyncio.Queue() if streams else None)

        def add() -> None:
            self._check_open()
            caller.state = self.core.add(request)
            self._callers[request.request_id] = caller
            if streams:
                self._streams[request.request_id] = caller

        if isinstance(self._driver, ThreadDriver) and request.sampling.grammar is not None:
            # Others are served while it is compiled.
            await asyncio.to_thread(self.core.rules.prepare, request)
        try:
            await self._driver.call(add)
        except asyncio.CancelledError:
            self._leave(request.request_id, caller)
            raise
        return caller

    def _leave(self, request_id: str, caller: _Caller) -> None:
        """The caller goes: end its request if it still runs."""

        def drop() -> None:
            if self._callers.get(request_id) is caller:
                self._forget(request_id)
                self._deliver(self.core.drop(request_id))

        if caller.done.cancelled() or not caller.done.done():
            self._driver.post(drop)

    # -- control

    async def pause(self, mode: PauseMode = "keep") -> None:
        drained: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def begin() -> bool:
            self._check_open()
            self._deliver(self.core.pause(mode))
            if self.core.pause_state == "draining":
                self._drained.append(drained)
                return True
            return False

        if not await self._driver.call(begin):
            return
        try:
            await drained
        except asyncio.CancelledError:
            self._driver.post(self.core.cancel_drain)
            raise

    async def resume(self) -> None:
        await self._driver.call(self._guarded(self.core.resume))

    async def prepare_weights(self, update: WeightUpdate) -> None:
        """Nothing: its update is a copy in memory, or not even that."""

    async def update_weights(self, update: WeightUpdate) -> None:
        await self._driver.call(self._guarded(lambda: self.core.update_weights(update)))

    async def open_session(self, capacity: int) -> str:
        def open_one() -> str:
            self._check_open()
            return self.core.sessions.open(capacity)

        return await self._driver.call(open_one)

    async def clear_session(self, session_id: str) -> None:
        await self._driver.call(self._guarded(lambda: self.core.sessions.clear(session_id)))

    async def close_session(self, session_id: str) -> None:
        await self._driver.call(lambda: self._deliver(self.core.close_session(session_id)))

    async def load_adapter(self, name: str, source: AdapterWeights | str) -> None:
        """Serve these tensors, or a folder in peft's format, to requests that name them; see `ServedAdapters.load`.

        Raises WeightUpdateError, with nothing changed.
        """

        def load() -> None:
            if self.core.adapters is None:
                raise WeightUpdateError(f"engine {self.info.name} was started without adapters")
            self.core.adapters.load(name, source, paused=self.core.pause_state == "paused")

        await self._driver.call(self._guarded(load))

    async def unload_adapter(self, name: str) -> None:
        """Raises RequestRejected for one that is unknown, or that an open request uses."""

        def unload() -> None:
            if self.core.adapters is None:
                raise RequestRejected(f"engine {self.info.name} was started without adapters")
            self.core.adapters.unload(name)

        await self._driver.call(self._guarded(unload))

    async def flush_cache(self) -> None:
        await self._driver.call(self.core.flush_cache)

    async def sleep(self, release: Sequence[Occupant]) -> None:
        names = tuple(release)
        await self._driver.call(self._guarded(lambda: self.core.sleep(names)))

    async def wake(self, restore: Sequence[Occupant]) -> None:
        names = tuple(restore)
        await self._driver.call(self._guarded(lambda: self.core.rest.end(names)))

    async def close(self) -> None:
        """Open requests fail with EngineUnavailable. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self._driver.post(lambda: self._fail_all(f"engine {self.info.name} was closed", None))
        await self._driver.close()

    # -- inside the driver

    def _step(self) -> bool:
        core = self.core
        if self._failure is not None or self._closed:
            return False
        if self._drained and core.pause_state != "draining":
            self._end_drain()  # another pause or a resume came in between
        if not core.has_work:
            return False
        try:
            finished = core.step()
        except Exception as exc:  # the one boundary: every caller gets it, chained
            self._failure = exc
            self._fail_all(f"engine {self.info.name} failed: {exc}", exc)
            return False
        self._deliver(finished)
        if self._streams:
            self._send_pieces()
        if self._drained and core.pause_state != "draining":
            self._end_drain()
        return core.has_work

    def _deliver(self, finished: Sequence[Finished]) -> None:
        for item in finished:
            caller = self._forget(item.completion.request_id)
            if caller is None:
                continue
            failure = item.failure
            if caller.pieces is not None and failure is not None:
                caller.loop.call_soon_threadsafe(caller.pieces.put_nowait, failure)
            elif caller.pieces is not None:
                completion, sent = item.completion, caller.num_sent
                self._send(caller, completion.token_ids[sent:], completion.logprobs[sent:], completion)
            # Nobody awaits a stream's future, and an error in it would be called lost.
            outcome = item.completion if caller.pieces is not None else failure or item.completion
            _on_loop(caller.loop, caller.done, outcome)
        self._flush_outbox()

    def _send_pieces(self) -> None:
        for caller in self._streams.values():
            assert caller.state is not None
            tokens, logprobs = self.core.answer_so_far(caller.state, caller.num_sent)
            if tokens:
                self._send(caller, tokens, logprobs, None)
        self._flush_outbox()

    def _send(
        self, caller: _Caller, tokens: tuple[int, ...], logprobs: tuple[float, ...], completion: Completion | None
    ) -> None:
        """tokens and logprobs: those after the first `num_sent`."""
        assert caller.pieces is not None
        caller.num_sent += len(tokens)
        piece = StreamedTokens(token_ids=tokens, logprobs=logprobs, completion=completion)
        self._outbox.setdefault(caller.loop, []).append((caller.pieces, piece))

    def _flush_outbox(self) -> None:
        outbox, self._outbox = self._outbox, {}
        for loop, pieces in outbox.items():
            if not loop.is_closed():
                loop.call_soon_threadsafe(_put_all, pieces)

    def _forget(self, request_id: str) -> _Caller | None:
        self._streams.pop(request_id, None)
        return self._callers.pop(request_id, None)

    def _end_drain(self) -> None:
        waiters, self._drained = self._drained, []
        for waiter in waiters:
            _on_loop(waiter.get_loop(), waiter, None)

    def _fail_all(self, message: str, cause: BaseException | None) -> None:
        """Each waiter gets an error object of its own: a shared one would collect all their tracebacks."""

        def error() -> EngineUnavailable:
            result = EngineUnavailable(message)
            result.__cause__ = cause
            return result

        for caller in self._callers.values():
            if caller.pieces is not None:
                caller.loop.call_soon_threadsafe(caller.pieces.put_nowait, error())
            else:
                _on_loop(caller.loop, caller.done, error())
        for waiter in self._drained:
            _on_loop(waiter.get_loop(), waiter, error())
        self._callers.clear()
        self._streams.clear()
        self._drained.clear()

    def _check_open(self) -> None:
        if self._failure is not None:
            raise EngineUnavailable(f"engine {self.info.name} failed: {self._failure}") from self._failure
        if self._closed:
            raise EngineUnavailable(f"engine {self.info.name} is closed")

    def _guarded(self, command: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            self._check_open()
            command()

        return run


def _put_all(pieces: list[tuple[_Pieces, StreamedTokens]]) -> None:
    for queue, piece in pieces:
        queue.put_nowait(piece)


def _on_loop(loop: asyncio.AbstractEventLoop, future: asyncio.Future[Any], outcome: object) -> None:
    """Settle a future on its own loop, unless its owner went away."""

    def settle() -> None:
        if future.done():
            return
        if isinstance(outcome, BaseException):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)

    try:
        running = asyncio.get_running_loop()
    except RuntimeError:
        running = None
    if running is loop:
        settle()
    elif not loop.is_closed():
        loop.call_soon_threadsafe(settle)
