"""The requests of one server: who is at the gate, who is in the server, and what each has so far.

    generate ─► gate ─► attempt ─► client ─► server ─► done
                 ▲                    │
                 └── again, with what it has ◄── ended by a pause, or the server was lost

The engine opens and shuts the gate, and says which life of the server, which version and which adapter are served.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from skyrl_train.engines.base import EngineInfo
from skyrl_train.engines.server.client import Attempt, AttemptResult, ServerBusy, ServerTraits, WireSession
from skyrl_train.engines.server.flight import Flight
from skyrl_train.engines.server.lifeline import Life
from skyrl_train.engines.session_book import Node, SessionBook
from skyrl_train.errors import EngineUnavailable, RequestRejected
from skyrl_train.types import Completion, GenerateRequest

END_ATTEMPTS_TIMEOUT_S = 60.0
FIRST_BUSY_WAIT_S, LAST_BUSY_WAIT_S = 0.02, 1.0
MAX_FRUITLESS_ATTEMPTS = 20

_Wire = tuple[int, str]


@dataclass(frozen=True, kw_only=True)
class Serving:
    """What a request is sent to. `adapter` is the policy's, None where the policy is the base model."""

    life: Life
    version: int
    adapter: str | None = None


@dataclass(kw_only=True)
class Totals:
    """Counters over all lives of the server."""

    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_generated_tokens: int = 0
    num_resent: int = 0


class Traffic:
    """`lost` is told of a broken attempt and returns when it may be made again; `check_open` raises once it is over."""

    def __init__(
        self,
        info: EngineInfo,
        traits: ServerTraits,
        *,
        lost: Callable[[Life, str], Awaitable[None]],
        check_open: Callable[[], None],
    ) -> None:
        self._info = info
        self._traits = traits
        self._lost = lost
        self._check_open = check_open
        self.serving: Serving | None = None
        self.book = SessionBook(info.name)
        self.totals = Totals()
        self._flights: dict[str, Flight] = {}
        self._gate = asyncio.Event()
        self._left = asyncio.Event()
        """Set whenever an attempt returned."""
        self._native_since: dict[str, int] = {}
        """Session -> the life of the server in which it is open there."""
        self._num_wires = 0

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._flights

    def __len__(self) -> int:
        return len(self._flights)

    @property
    def num_in_server(self) -> int:
        return len(self._in_server())

    # -- the gate

    def open_gate(self) -> None:
        self._gate.set()

    def shut_gate(self) -> None:
        self._gate.clear()

    def look_again(self) -> None:
        """Whoever waits here finds out by itself that the engine is closed or lost."""
        self._left.set()
        for flight in self._flights.values():
            if flight.waiting is not None:
                flight.waiting.cancel()

    async def empty(self) -> None:
        """Returns once no attempt is in the server."""
        while self._in_server():
            self._left.clear()
            await self._left.wait()
            self._check_open()

    # -- requests

    async def generate(self, request: GenerateRequest) -> Completion:
        flight, ref, name = Flight(request=request), request.session, request.request_id
        if ref is not None:
            budget = request.sampling.max_new_tokens
            flight.before = self.book.reserve(ref, name, len(request.prompt_token_ids), budget)
        self._flights[name] = flight
        node: Node | None = None
        try:
            self._check_length(flight)
            completion, wire = await self._serve(flight)
            node = Node(
                parent=ref.parent_request_id if ref else None,
                token_ids=request.prompt_token_ids + completion.token_ids,
                wire=wire,
            )
            return completion
        finally:
            del self._flights[name]
            if ref is not None:
                self.book.settle(ref, name, node)

    async def abort(self, request_ids: list[str]) -> None:
        """These requests return with what they have."""
        flights = [flight for name in request_ids if (flight := self._flights.get(name)) is not None]
        for flight in flights:
            flight.ended_by_caller = True
            if flight.waiting is not None:
                flight.waiting.cancel()
        await self._end(flights)

    async def end_attempts(self, *, for_good: bool, counted_only: bool = False) -> None:
        """All attempts in the server return with what they have: to their callers, or to wait at the gate.

        A request that has no token yet has not begun, and waits in either case. `counted_only`: those alone for which
        the server keeps a count over the answer.
        """
        flights = [flight for flight in self._in_server() if flight.is_counted or not counted_only]
        for flight in flights:
            flight.ended_by_pause = for_good
        await self._end(flights)

    async def close_session(self, session_id: str) -> None:
        """Ends what runs in it; unknown ids are fine."""
        if session_id not in self.book:
            return
        refs = {name: flight.request.session for name, flight in self._flights.items()}
        self.book.close(session_id)
        await self.abort([name for name, ref in refs.items() if ref is not None and ref.session_id == session_id])
        await self.close_natively(session_id)

    async def close_natively(self, session_id: str) -> None:
        """In the server, if it is open there."""
        since = self._native_since.pop(session_id, None)
        if self.serving is not None and since == self.serving.life.number:
            with contextlib.suppress(EngineUnavailable):  # a server that is lost has closed it
                await self.serving.life.client.close_session(session_id)

    # -- one request

    async def _serve(self, flight: Flight) -> tuple[Completion, _Wire | None]:
        """Attempts until the request is done: the completion, and what the server keeps to continue from."""
        busy_wait_s, fruitless = FIRST_BUSY_WAIT_S, 0
        while True:
            serving = await self._admit(flight)
            if serving is None:
                return flight.completion("abort"), None
            had, attempt = len(flight.token_ids), None
            try:
                if await self._open_natively(flight, serving.life):
                    continue  # the gate may have been shut meanwhile
                attempt = self._next_attempt(flight, serving)
                result = await self._send(flight, attempt, serving.life)
            except ServerBusy:
                await asyncio.sleep(busy_wait_s)
                busy_wait_s = min(busy_wait_s * 2, LAST_BUSY_WAIT_S)
                continue
            except EngineUnavailable as exc:
                self._check_open()
                self.totals.num_resent += attempt is not None
                await self._lost(serving.life, str(exc))
                continue
            flight.add(result, version=serving.version)
            self._count(attempt, result)
            if result.finish_reason != "abort":
                wire = (serving.life.number, attempt.wire_id) if attempt.session is not None else None
                return flight.completion(result.finish_reason, result.stop_reason), wire
            if flight.ended_by_caller or (flight.ended_by_pause and flight.token_ids):
                return flight.completion("abort"), None
            if len(flight.token_ids) >= flight.request.sampling.max_new_tokens:
                return flight.completion("length"), None
            fruitless = 0 if len(flight.token_ids) > had or not self._gate.is_set() else fruitless + 1
            if fruitless == MAX_FRUITLESS_ATTEMPTS:
                raise EngineUnavailable(
                    f"engine {self._info.name} ended request {flight.request.request_id} {fruitless} times without a "
                    "token, and nobody asked it to"
                )

    async def _admit(self, flight: Flight) -> Serving | None:
        """Waits at the gate; None where the caller gave the request up."""
        while True:
            self._check_open()
            if flight.ended_by_caller:
                return None
            if self._gate.is_set():
                assert self.serving is not None
                return self.serving
            flight.waiting = asyncio.ensure_future(self._gate.wait())
            try:
                await asyncio.wait({flight.waiting})
            finally:
                flight.waiting.cancel()
                flight.waiting = None

    async def _open_natively(self, flight: Flight, life: Life) -> bool:
        """The request's session in the server, for each of its lives once; whether that took a moment."""
        ref = flight.request.session
        if ref is None or not self._traits.native_sessions or self._native_since.get(ref.session_id) == life.number:
            return False
        self._native_since[ref.session_id] = life.number
        try:
            await life.client.open_session(ref.session_id, 2**31 - 1)  # the book holds the capacity
        except BaseException:
            self._native_since.pop(ref.session_id, None)
            raise
        return True

    def _next_attempt(self, flight: Flight, serving: Serving) -> Attempt:
        self._num_wires += 1
        life, request = serving.life, flight.request
        token_ids, session = flight.whole_prompt, None
        if request.session is not None and self._traits.native_sessions:
            # After the parent, where the server has it as the book does; else the whole prompt, from the root.
            session = WireSession(session_id=request.session.session_id)
            parent = self.book.parent(request.session)
            if (
                not flight.token_ids
                and parent is not None
                and parent.wire is not None
                and parent.wire[0] == life.number
            ):
                token_ids = request.prompt_token_ids
                session = WireSession(session_id=session.session_id, parent_wire_id=parent.wire[1])
        return flight.attempt(
            # The server's own log shows whose request it is; the number makes it unique over attempts and lives.
            f"{request.request_id}#{life.number}.{self._num_wires}",
            token_ids=token_ids,
            session=session,
            adapter=request.adapter or serving.adapter,
            with_seed="seed" in self._info.capabilities,
        )

    async def _send(self, flight: Flight, attempt: Attempt, life: Life) -> AttemptResult:
        flight.ended_by_pause = False
        try:
            return await life.client.generate(attempt)
        finally:
            flight.wire_id = None
            self._left.set()

    async def _end(self, flights: list[Flight]) -> None:
        """The attempts that these are in now return. Raises EngineUnavailable after a while."""
        loop = asyncio.get_running_loop()
        deadline, pause_s = loop.time() + END_ATTEMPTS_TIMEOUT_S, 0.05
        attempts = [(flight, flight.wire_id) for flight in flights if flight.wire_id is not None]

        def running() -> list[str]:
            return [wire for flight, wire in attempts if flight.wire_id == wire]

        while wires := running():
            if self.serving is not None:
                with contextlib.suppress(EngineUnavailable):  # a server that is lost has ended them
                    await self.serving.life.client.abort(wires)
            # An abort may overtake its request on the way to the server: asked again until all are back.
            again = loop.time() + pause_s
            while running() and (left := again - loop.time()) > 0:
                self._left.clear()
                # asyncio.wait_for of Python 3.11 can lose a cancellation.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(left):
                        await self._left.wait()
            pause_s = min(pause_s * 2, 2.0)
            if loop.time() > deadline:
                raise EngineUnavailable(
                    f"engine {self._info.name}: {len(running())} requests did not end within "
                    f"{END_ATTEMPTS_TIMEOUT_S:g} s of being aborted"
                )

    def _in_server(self) -> list[Flight]:
        return [flight for flight in self._flights.values() if flight.wire_id is not None]

    def _count(self, attempt: Attempt, result: AttemptResult) -> None:
        self.totals.num_prompt_tokens += len(attempt.token_ids)
        self.totals.num_cached_tokens += result.num_cached_tokens
        self.totals.num_generated_tokens += len(result.token_ids)

    def _check_length(self, flight: Flight) -> None:
        prompt, budget = len(flight.whole_prompt), flight.request.sampling.max_new_tokens
        if prompt + budget > self._info.max_context_len:
            raise RequestRejected(
                f"request {flight.request.request_id}: prompt and max_new_tokens need {prompt + budget} tokens, engine "
                f"{self._info.name} has room for {self._info.max_context_len}; lower "
                "generator.sampling_params.max_generate_length or raise generator.max_model_len"
            )
