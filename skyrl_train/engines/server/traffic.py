"""The requests of one server: who is at the gate, who is in the server, and what each has so far.

    generate ─► gate ─► attempt ─► client ─► server ─► done
                 ▲                    │
                 └── again, with what it has ◄── ended by a pause, or the server was lost

    gate open      who comes goes in
         draining  who has begun goes in, and nobody else: a pause waits for them
         shut      nobody

The engine sets the gate, and says which life of the server, which version and which adapter are served.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from typing import Literal

from skyrl_train.engines.base import EngineInfo
from skyrl_train.engines.server.client import Attempt, AttemptResult, ServerBusy, ServerTraits, WireSession
from skyrl_train.engines.server.flight import Flight, before_version, ended
from skyrl_train.engines.server.lifeline import Life
from skyrl_train.engines.server.native_sessions import NativeSessions
from skyrl_train.engines.session_book import Node, SessionBook
from skyrl_train.errors import EngineUnavailable, RequestRejected
from skyrl_train.types import Completion, GenerateRequest

END_ATTEMPTS_TIMEOUT_S = 60.0
FIRST_BUSY_WAIT_S, LAST_BUSY_WAIT_S = 0.02, 1.0
MAX_FRUITLESS_ATTEMPTS = 20

GateState = Literal["open", "draining", "shut"]
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
    """`lost` is told of a broken attempt, and says whether the server is lost (then the gate is shut until it is up
    again) or one connection broke; `check_open` raises once it is over. `end_token_ids` are the model's own.
    """

    def __init__(
        self,
        info: EngineInfo,
        traits: ServerTraits,
        *,
        lost: Callable[[Life, str], Awaitable[bool]],
        check_open: Callable[[], None],
        end_token_ids: Collection[int] = (),
    ) -> None:
        self._info = info
        self._traits = traits
        self._lost = lost
        self._check_open = check_open
        self._end_token_ids = frozenset(end_token_ids)
        self.serving: Serving | None = None
        self.proof: asyncio.Future[int | None] | None = None
        """While the server goes on with weights that are still to be proved: nobody gets what they made before the
        verdict, which is the version to drop, or None."""
        self.book = SessionBook(info.name)
        self.totals = Totals()
        self._flights: dict[str, Flight] = {}
        self._gate: GateState = "shut"
        self._changed = asyncio.Event()
        """Set whenever an attempt returned or a request ended."""
        self._native = NativeSessions()
        self._num_wires = 0
        self._mark = secrets.token_hex(3)
        """In all names that this engine gives: a server that others use too, or used, knows other ones."""

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._flights

    def __len__(self) -> int:
        return len(self._flights)

    @property
    def num_in_server(self) -> int:
        return len(self._in_server())

    @property
    def num_begun(self) -> int:
        """Requests of which an attempt was sent at some time, wherever they are now."""
        return sum(flight.num_attempts > 0 for flight in self._flights.values())

    # -- the gate

    def set_gate(self, gate: GateState) -> None:
        self._gate = gate
        if gate != "shut":
            self.look_again()

    def look_again(self) -> None:
        """Whoever waits here finds out by itself what has changed."""
        self._changed.set()
        for flight in self._flights.values():
            if flight.waiting is not None and not flight.waiting.done():
                flight.waiting.set_result(None)

    async def changed(self) -> None:
        """Returns once an attempt has returned, a request has ended, or somebody said `look_again`."""
        self._changed.clear()
        await self._changed.wait()

    def forget_server(self) -> set[str]:
        """Its life is over. Returns the sessions that a server which lives on all the same may still have."""
        return self._native.forget()

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
            self._changed.set()
            if ref is not None:
                self.book.settle(ref, name, node)

    async def abort(self, request_ids: list[str]) -> None:
        """These requests return with what they have."""
        flights = [flight for name in request_ids if (flight := self._flights.get(name)) is not None]
        for flight in flights:
            flight.ended_by_caller = True
            if flight.waiting is not None and not flight.waiting.done():
                flight.waiting.set_result(None)
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
        try:
            await self.abort([name for name, ref in refs.items() if ref is not None and ref.session_id == session_id])
        finally:
            await self.close_natively(session_id)

    async def close_natively(self, session_id: str) -> None:
        """In the server, if it is open there."""
        if self.serving is not None:
            await self._native.close(self._native_name(session_id), self.serving.life.client)

    # -- one request

    async def _serve(self, flight: Flight) -> tuple[Completion, _Wire | None]:
        """Attempts until the request is done: the completion, and what the server keeps to continue from."""
        wait_s, fruitless, sampling = FIRST_BUSY_WAIT_S, 0, flight.request.sampling
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
                await asyncio.sleep(wait_s)
                wait_s = min(wait_s * 2, LAST_BUSY_WAIT_S)
                continue
            except EngineUnavailable as exc:
                self._check_open()
                self.totals.num_resent += attempt is not None
                if not await self._lost(serving.life, str(exc)):
                    fruitless += 1
                    self._check_fruitless(flight, fruitless, f"broke, and the server answers all the same: {exc}", exc)
                    await asyncio.sleep(wait_s)
                    wait_s = min(wait_s * 2, LAST_BUSY_WAIT_S)
                continue
            result = ended(await self._proved(result), sampling, self._end_token_ids)
            flight.add(result, version=serving.version)
            self._count(flight, attempt, result)
            if result.finish_reason != "abort":
                wire = (serving.life.number, attempt.wire_id) if attempt.session is not None else None
                return flight.completion(result.finish_reason, result.stop_reason), wire
            # Before all else: who goes on from an answer must find something left to sample.
            if len(flight.token_ids) >= sampling.max_new_tokens:
                return flight.completion("length"), None
            if flight.ended_by_caller or (flight.ended_by_pause and flight.token_ids):
                return flight.completion("abort"), None
            fruitless = 0 if len(flight.token_ids) > had or self._gate == "shut" else fruitless + 1
            self._check_fruitless(flight, fruitless, "ended without a token, and nobody asked for that")

    def _check_fruitless(self, flight: Flight, count: int, what: str, cause: Exception | None = None) -> None:
        if count >= MAX_FRUITLESS_ATTEMPTS:
            raise EngineUnavailable(
                f"engine {self._info.name}: {count} attempts at request {flight.request.request_id} {what}"
            ) from cause

    async def _proved(self, result: AttemptResult) -> AttemptResult:
        """Without what weights made that turned out to be the wrong ones."""
        if (proof := self.proof) is None:
            return result
        await asyncio.wait({proof})
        dropped = proof.result()
        return result if dropped is None else before_version(result, dropped)

    async def _admit(self, flight: Flight) -> Serving | None:
        """Waits at the gate; None where the caller gave the request up."""
        while True:
            self._check_open()
            if flight.ended_by_caller:
                return None
            if self._gate == "open" or (self._gate == "draining" and flight.num_attempts):
                assert self.serving is not None
                return self.serving
            flight.waiting = asyncio.get_running_loop().create_future()
            try:
                await flight.waiting
            finally:
                flight.waiting = None

    async def _open_natively(self, flight: Flight, life: Life) -> bool:
        """The request's session in the server, for each of its lives once; whether that took a moment."""
        ref = flight.request.session
        if ref is None or not self._traits.native_sessions:
            return False
        return await self._native.open(self._native_name(ref.session_id), life.client)

    def _native_name(self, session_id: str) -> str:
        return f"{session_id}-{self._mark}"

    def _next_attempt(self, flight: Flight, serving: Serving) -> Attempt:
        self._num_wires += 1
        life, request = serving.life, flight.request
        token_ids, session = flight.whole_prompt, None
        if request.session is not None and self._traits.native_sessions:
            # After the parent, where the server has it as the book does; else the whole prompt, from the root.
            session = WireSession(session_id=self._native_name(request.session.session_id))
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
            # The server's own log shows whose request it is; the number makes it unique over attempts and lives, and
            # the mark over runs: one that was killed may have left requests in a server that others run.
            f"{request.request_id}#{self._mark}.{self._num_wires}",
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
            self._changed.set()

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
                # asyncio.wait_for of Python 3.11 can lose a cancellation.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(left):
                        await self.changed()
            pause_s = min(pause_s * 2, 2.0)
            if loop.time() > deadline:
                raise EngineUnavailable(
                    f"engine {self._info.name}: {len(running())} requests did not end within "
                    f"{END_ATTEMPTS_TIMEOUT_S:g} s of being aborted"
                )

    def _in_server(self) -> list[Flight]:
        return [flight for flight in self._flights.values() if flight.wire_id is not None]

    def _count(self, flight: Flight, attempt: Attempt, result: AttemptResult) -> None:
        # What the server goes on from in a session is prompt too: it tells all of it that it found in its cache.
        goes_on = attempt.session is not None and attempt.session.parent_wire_id is not None
        self.totals.num_prompt_tokens += len(attempt.token_ids) + (len(flight.before) if goes_on else 0)
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
