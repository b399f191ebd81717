"""A server that only exists here: what ServerEngine may count on of a real one, stepped by the test, in virtual time.

    run(test())      an event loop whose clock jumps to the next timer when nobody has anything to do; a wait that
                     nothing can end fails at once, and so does an exception that no task's owner has seen
    Machine          where servers run: at most one lives. `step` samples one token for each running request
    ScriptedClient   the ServerClient of one life; ScriptedChannel its WeightChannel; ScriptedProcess starts and watches

The model: the next token depends on all tokens before it and on the weights, `next_token`. The server has its weights
in two halves, which an update changes one after the other, and a prefix cache, which it must flush: a token that was
sampled with two different halves is TORN, one after a cache of other weights is STALE. So each answer can be checked
token by token against the versions that it claims.
"""

from __future__ import annotations

import asyncio
import gc
import selectors
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from skyrl_train.engines.base import Capability, Occupant
from skyrl_train.engines.server.client import (
    Attempt,
    AttemptResult,
    ServerFigures,
    ServerTraits,
    WireSpan,
)
from skyrl_train.engines.server.engine import ServerEngine
from skyrl_train.engines.server.lifeline import HealthPolicy, Lifeline
from skyrl_train.errors import EngineUnavailable, RequestRejected, WeightsTorn, WeightUpdateError
from skyrl_train.types import (
    AdapterWeights,
    Completion,
    FinishReason,
    GenerateRequest,
    NamedWeights,
    SamplingParams,
    WeightUpdate,
)
from skyrl_train.weight_sync.plan import WeightPlan

VOCABULARY = 1000
TORN, STALE = 998, 999
"""What no weights sample."""
END = 997
CALL_TURNS = 3
START_S = 2.0
Ids = tuple[int, ...]


def next_token(weights: float, before: Ids) -> int:
    """What a model with these weights says after `before`: in [0, 900)."""
    return int(sum(before) * 31 + len(before) * 7 + weights * 101) % 900


# -- time


class _Jumping(selectors.DefaultSelector):
    """A selector that doesn't wait: it lets the loop's clock jump."""

    now = 0.0
    is_stuck = False

    def select(self, timeout: float | None = None) -> list[Any]:
        ready = super().select(0)
        if not ready and timeout is None:
            self.is_stuck = True
            raise AssertionError("everybody waits for something that nothing will do")
        if not ready and timeout:
            self.now += timeout
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._clock = _Jumping()
        super().__init__(self._clock)
        self.unseen: list[str] = []
        self.set_exception_handler(lambda _, context: self.unseen.append(f"{context}"))

    def time(self) -> float:
        return self._clock.now


def run(test: Coroutine[Any, Any, None]) -> None:
    """The test in a loop of its own. Afterwards no task is left, and none failed unseen."""
    gc.freeze()  # what is there already need not be looked at: a collection is of this test alone then
    try:
        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            loop = runner.get_loop()
            assert isinstance(loop, VirtualLoop)
            runner.run(_alone(test))
            gc.collect()
            assert not loop.unseen, loop.unseen
    finally:
        gc.unfreeze()


async def _alone(test: Coroutine[Any, Any, None]) -> None:
    await test
    await settled()
    left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    assert not left, f"tasks that nobody ended: {left}"


async def settled() -> None:
    """Everybody has gone as far as they get without time passing."""
    for _ in range(40):
        await asyncio.sleep(0)


# -- the machine


@dataclass(eq=False, kw_only=True)
class _Request:
    attempt: Attempt
    before: Ids
    answer: asyncio.Future[AttemptResult]
    token_ids: list[int] = field(default_factory=list)
    versions: list[str] = field(default_factory=list)

    def span_list(self) -> tuple[WireSpan, ...]:
        spans: list[WireSpan] = []
        for index, version in enumerate(self.versions):
            if spans and spans[-1].version == version:
                spans[-1] = replace(spans[-1], end=index + 1)
            else:
                spans.append(WireSpan(version=version, start=index, end=index + 1))
        return tuple(spans)


@dataclass(eq=False, kw_only=True)
class Server:
    """One life. What is on its way to it has not arrived: an abort doesn't find it yet."""

    halves: list[float]
    version: str = "default"
    died: asyncio.Event = field(default_factory=asyncio.Event)
    hangs: bool = False
    is_paused: bool = False
    asleep: set[Occupant] = field(default_factory=set)
    arriving: dict[str, _Request] = field(default_factory=dict)
    running: dict[str, _Request] = field(default_factory=dict)
    cached: set[float] = field(default_factory=set)
    adapters: dict[str, float] = field(default_factory=dict)
    sessions: dict[str, dict[str, Ids]] = field(default_factory=dict)
    wire_ids: set[str] = field(default_factory=set)
    num_steps: int = 0

    def check(self) -> None:
        if self.died.is_set():
            raise EngineUnavailable("connection refused")

    def die(self) -> None:
        self.died.set()
        for request in (*self.arriving.values(), *self.running.values()):
            if not request.answer.done():
                request.answer.set_exception(EngineUnavailable("connection reset"))
        self.arriving.clear()
        self.running.clear()
        self.sessions.clear()

    def arrive(self) -> None:
        self.running |= self.arriving
        self.arriving.clear()

    def step(self) -> None:
        """One token for each, if it steps at all."""
        if self.is_paused or self.hangs or self.died.is_set():
            return
        self.num_steps += 1
        for request in list(self.running.values()):
            if request.answer.done():
                del self.running[request.attempt.wire_id]
                continue
            self._sample(request)

    def _sample(self, request: _Request) -> None:
        sampling, adapter = request.attempt.sampling, request.attempt.adapter
        low, high = self.halves
        weights = low + (self.adapters[adapter] if adapter is not None else 0.0)
        token = next_token(weights, request.before + tuple(request.token_ids))
        if self.cached - {weights}:
            token = STALE
        if low != high or "weights" in self.asleep:
            token = TORN
        self.cached.add(weights)
        request.token_ids.append(token)
        request.versions.append(self.version)
        if token in sampling.stop_token_ids:
            self.finish(request, "stop", token)
        elif len(request.token_ids) == sampling.max_new_tokens:
            self.finish(request, "length")

    def finish(self, request: _Request, reason: FinishReason, stop_reason: int | None = None) -> None:
        self.running.pop(request.attempt.wire_id, None)
        session = request.attempt.session
        if session is not None and session.session_id in self.sessions:
            whole = request.before + tuple(request.token_ids)
            self.sessions[session.session_id][request.attempt.wire_id] = whole
        if not request.answer.done():
            tokens = tuple(request.token_ids)
            request.answer.set_result(
                AttemptResult(
                    token_ids=tokens,
                    logprobs=tuple(-float(token) for token in tokens),
                    finish_reason=reason,
                    stop_reason=stop_reason,
                    spans=request.span_list(),
                )
            )

    def abort(self, wire_ids: Sequence[str]) -> None:
        for wire_id in wire_ids:
            if wire_id in self.running:
                self.finish(self.running[wire_id], "abort")


class Machine:
    """`keeps_versions` and `keeps_sessions` are the server's traits. `base` is the model that each life starts with.

    `stops[name]` is waited for in the client's call `name`; `refuse[name]` is raised by it, once.
    """

    def __init__(self, *, keeps_versions: bool = True, keeps_sessions: bool = True, base: float = 0.0) -> None:
        capabilities: set[Capability] = {"abort", "named_weights", "adapter_weights", "lora", "sessions", "sleep"}
        self.traits = ServerTraits(
            name="scripted",
            release="1",
            logprob_space="raw",
            capabilities=frozenset(capabilities),
            reports_versions=keeps_versions,
            native_sessions=keeps_sessions,
        )
        self.base = base
        self.servers: list[Server] = []
        self.calls: list[str] = []
        self.stops: dict[str, asyncio.Event] = {}
        self.refuse: dict[str, list[Exception]] = {}
        self.num_failing_starts = 0
        self.request_turns = 5
        """Turns of the loop until a request has reached the server; a call needs fewer, and may overtake it."""

    @property
    def server(self) -> Server:
        return self.servers[-1]

    def start(self) -> Server:
        self.servers.append(Server(halves=[self.base, self.base]))
        return self.server

    def stop_at(self, call: str) -> asyncio.Event:
        """The next calls of this name wait until the event is set."""
        return self.stops.setdefault(call, asyncio.Event())

    async def step(self, count: int = 1) -> None:
        for _ in range(count):
            await settled()
            self.server.arrive()
            self.server.step()
        await settled()

    async def until(self, *tasks: asyncio.Task[Any], limit: int = 500) -> None:
        """Steps, and lets time pass, until these are done."""
        for _ in range(limit):
            if all(task.done() for task in tasks):
                return
            await self.step()
            await asyncio.sleep(0.1)
        raise AssertionError([task for task in tasks if not task.done()])


# -- what the engine sees of it


class ScriptedClient:
    """Every call reaches the server after a few turns of the loop, and breaks when that life ends or this closes."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._bound: Server | None = None
        self._mine: set[str] = set()
        self._closed = False

    @property
    def _server(self) -> Server:
        """Whoever listens, until it said who it is."""
        return self._bound or self._machine.server

    @property
    def traits(self) -> ServerTraits:
        return self._machine.traits

    async def is_healthy(self) -> bool:
        assert not self._closed, "a closed client was asked for its server's health"
        await asyncio.sleep(0)
        return not self._server.died.is_set() and not self._server.hangs

    async def check_identity(self) -> None:
        await self._reach("check_identity")
        self._bound = self._server

    def check(self, attempt: Attempt) -> None:
        return

    async def generate(self, attempt: Attempt) -> AttemptResult:
        server = self._server
        assert attempt.wire_id not in server.wire_ids, f"{attempt.wire_id} was sent twice"
        server.wire_ids.add(attempt.wire_id)
        if self._closed:
            raise EngineUnavailable("the client is closed")
        server.check()
        for error in self._machine.refuse.get("generate", [])[:1]:
            self._machine.refuse["generate"].pop(0)
            raise error
        answer: asyncio.Future[AttemptResult] = asyncio.get_running_loop().create_future()
        request = _Request(attempt=attempt, before=self._before(attempt), answer=answer)
        server.arriving[attempt.wire_id] = request
        self._mine.add(attempt.wire_id)
        asyncio.get_running_loop().create_task(self._travel(attempt.wire_id))
        try:
            result = await answer
        finally:
            # Who doesn't wait any more has closed the connection: the server ends the request.
            self._mine.discard(attempt.wire_id)
            server.arriving.pop(attempt.wire_id, None)
            server.running.pop(attempt.wire_id, None)
        return result if self.traits.reports_versions else replace(result, spans=None)

    async def _travel(self, wire_id: str) -> None:
        for _ in range(self._machine.request_turns):
            await asyncio.sleep(0)
        if wire_id in self._server.arriving:
            self._server.running[wire_id] = self._server.arriving.pop(wire_id)

    def _before(self, attempt: Attempt) -> Ids:
        if attempt.adapter is not None and attempt.adapter not in self._server.adapters:
            raise RequestRejected(f"{attempt.adapter} has never been loaded")
        session = attempt.session
        if session is None:
            return attempt.token_ids
        assert self.traits.native_sessions
        known = self._server.sessions.get(session.session_id)
        if known is None or (session.parent_wire_id is not None and session.parent_wire_id not in known):
            raise RequestRejected(f"session id {session} does not exist")
        return (known[session.parent_wire_id] if session.parent_wire_id is not None else ()) + attempt.token_ids

    async def abort(self, wire_ids: Sequence[str]) -> None:
        await self._reach("abort")
        self._server.abort(wire_ids)

    async def hold(self) -> None:
        assert self.traits.reports_versions
        await self._reach("hold")
        self._server.is_paused = True

    async def halt(self) -> None:
        await self._reach("halt")
        self._server.is_paused = True

    async def release(self) -> None:
        await self._reach("release")
        self._server.is_paused = False

    async def flush_cache(self) -> None:
        await self._reach("flush_cache")
        if self._server.running and not self._server.is_paused:
            raise RequestRejected("requests run")
        self._server.cached.clear()

    async def weight_version(self) -> str | None:
        await self._reach("weight_version")
        return self._server.version

    async def set_weight_version(self, version: str) -> None:
        await self._reach("set_weight_version")
        self._server.version = version

    async def load_adapter(self, name: str, adapter: AdapterWeights | str) -> None:
        await self._reach("load_adapter")
        assert isinstance(adapter, AdapterWeights)
        if name in self._server.adapters:
            raise RequestRejected(f"{name} is loaded")
        self._server.adapters[name] = float(adapter.tensors["a"])

    async def unload_adapter(self, name: str) -> None:
        await self._reach("unload_adapter")
        if name not in self._server.adapters:
            raise WeightUpdateError(f"{name} is not loaded")
        used = [r for r in self._server.running.values() if r.attempt.adapter == name]
        assert not used, f"requests run with {name}"
        del self._server.adapters[name]

    async def open_session(self, session_id: str, capacity: int) -> None:
        await self._reach("open_session")
        if session_id in self._server.sessions:
            raise RequestRejected(f"session id {session_id} is open")
        self._server.sessions[session_id] = {}

    async def close_session(self, session_id: str) -> None:
        await self._reach("close_session")
        self._server.sessions.pop(session_id, None)

    async def sleep(self, release: Sequence[Occupant]) -> None:
        await self._reach("sleep")
        assert not self._server.running, "it sleeps only when drained"
        self._server.asleep |= set(release)
        if "weights" in release:
            self._server.halves = [-1.0, -2.0]

    async def wake(self, restore: Sequence[Occupant]) -> None:
        await self._reach("wake")
        assert set(restore) <= self._server.asleep, "what is awake can't be woken"
        self._server.asleep -= set(restore)

    async def score(self, token_ids: Sequence[int]) -> tuple[float, ...]:
        await self._reach("score")
        assert not self._server.is_paused, "a paused server scores nothing"
        low, high = self._server.halves
        return (low, high)

    async def figures(self) -> ServerFigures:
        await self._reach("figures")
        return ServerFigures(
            num_running=len(self._server.running),
            num_waiting=0,
            kv_used_frac=0.0,
            num_prompt_tokens_total=0,
            num_generated_tokens_total=0,
            num_steps_total=self._server.num_steps,
        )

    async def metrics_text(self) -> str:
        await self._reach("metrics_text")
        return "scripted 1\n"

    async def close(self) -> None:
        self._closed = True
        for wire_id in list(self._mine):
            found = self._server.running.get(wire_id) or self._server.arriving.get(wire_id)
            if found is not None and not found.answer.done():
                found.answer.set_exception(EngineUnavailable("the client was closed"))

    async def _reach(self, call: str) -> None:
        self._machine.calls.append(call)
        stop = self._machine.stops.get(call)
        for _ in range(CALL_TURNS):
            await asyncio.sleep(0)
        await self.wait(stop)
        if errors := self._machine.refuse.get(call):
            raise errors.pop(0)

    async def wait(self, stop: asyncio.Event | None) -> None:
        """For what the test holds back; the life's end breaks it."""
        if self._closed:
            raise EngineUnavailable("the client is closed")
        died = asyncio.ensure_future(self._server.died.wait())
        waits = {died} if stop is None else {died, asyncio.ensure_future(stop.wait())}
        try:
            if stop is not None or self._server.hangs:
                timeout = 60.0 if self._server.hangs else None
                await asyncio.wait(waits, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
                if self._server.hangs:
                    raise EngineUnavailable("no answer within 60 s")
            self._server.check()
        finally:
            for one in waits:
                one.cancel()
            await asyncio.gather(*waits, return_exceptions=True)


class ScriptedChannel:
    """Two halves, one after the other; what breaks between them has torn the model."""

    def __init__(self, machine: Machine, server: Server) -> None:
        self._machine = machine
        self._server = server
        self._client = ScriptedClient(machine)
        self._client._bound = server
        self._is_pushing = False

    async def open(self) -> None:
        await self._step("open_channel")

    async def prepare(self, plan: WeightPlan, tensors: Mapping[str, torch.Tensor], *, version: int) -> None:
        self._machine.calls.append("prepare")

    async def push(self, plan: WeightPlan, tensors: Mapping[str, torch.Tensor], *, version: int) -> None:
        server = self._server
        self._is_pushing = True
        try:
            await self._step("push")
            assert server.is_paused, "weights are pushed into a server that steps"
            assert self._machine.traits.reports_versions or not server.running, "weights are pushed under requests"
            assert "weights" not in server.asleep, "weights are pushed into memory that isn't there"
            for half, name in enumerate(("a", "b")):
                server.halves[half] = float(tensors[name])
                try:
                    await self._step("half")
                except WeightUpdateError as exc:
                    raise WeightsTorn(str(exc)) from exc
            server.cached.clear()
            server.version = str(version)
        finally:
            self._is_pushing = False

    async def close(self) -> None:
        assert not self._is_pushing, "the channel is closed under a push"

    async def _step(self, name: str) -> None:
        try:
            await self._client._reach(name)
        except EngineUnavailable as exc:
            raise WeightUpdateError(str(exc)) from exc


class ScriptedProcess:
    """Stands for ServerProcess."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._server: Server | None = None

    @property
    def is_running(self) -> bool:
        return self._server is not None and not self._server.died.is_set()

    async def start(self) -> str:
        assert not self.is_running
        self._machine.calls.append("start")
        await asyncio.sleep(START_S)
        stop = self._machine.stops.get("start")
        if stop is not None:
            await stop.wait()
        if self._machine.num_failing_starts:
            self._machine.num_failing_starts -= 1
            raise EngineUnavailable("it died while it started")
        self._server = self._machine.start()
        return f"http://scripted/{len(self._machine.servers)}"

    async def stop(self) -> None:
        if self._server is not None:
            self._server.die()
        await asyncio.sleep(0.1)

    async def restart(self) -> str:
        await self.stop()
        return await self.start()

    async def wait_dead(self) -> str:
        assert self._server is not None
        await self._server.died.wait()
        return "it died, says its log"

    async def watch(self, *, interval_s: float, max_failures: int) -> str:
        assert self._server is not None
        server, failures = self._server, 0
        while failures < max_failures and not server.died.is_set():
            try:
                async with asyncio.timeout(interval_s):
                    await server.died.wait()
            except TimeoutError:
                failures = failures + 1 if server.hangs else 0
        return "it died, says its log" if server.died.is_set() else "it failed its health checks"


# -- an engine over it


def engine_over(
    machine: Machine, *, attached: bool = False, proves: bool = False, max_restarts: int = 5, **options: Any
) -> ServerEngine:
    """Not started. `proves`: after an update the server's two halves must both be the version's."""
    if attached and not machine.servers:
        machine.start()
    process: Any = None if attached else ScriptedProcess(machine)
    lifeline = Lifeline(
        "scripted",
        process=process,
        url="http://scripted" if attached else None,
        connect=lambda url: ScriptedClient(machine),
        open_channel=lambda url: ScriptedChannel(machine, machine.server),
        health=HealthPolicy(interval_s=10.0, max_failures=3, attached_timeout_s=100.0),
        max_restarts=max_restarts,
    )

    async def verify(client: Any, version: int) -> None:
        if await client.score((1, 2)) != (float(version), float(version)):
            raise WeightUpdateError(f"it does not score as version {version}")

    return ServerEngine(
        traits=machine.traits,
        model="m",
        max_context_len=10_000,
        vocab_size=VOCABULARY,
        end_token_ids=(END,),
        lifeline=lifeline,
        weight_dtype=torch.float32,
        verify=verify if proves else None,
        **options,
    )


def named(version: int, still_valid: Callable[[], bool] = lambda: True) -> WeightUpdate:
    """The weights `version`: whoever has them samples `next_token(version, …)`."""
    tensors = {"a": torch.tensor(float(version)), "b": torch.tensor(float(version))}
    return WeightUpdate(version=version, source=NamedWeights(tensors=tensors, still_valid=still_valid))


def adapter(version: int) -> WeightUpdate:
    """As `named`, over the base model 0."""
    tensors = {"a": torch.tensor(float(version))}
    return WeightUpdate(version=version, source=AdapterWeights(tensors=tensors, config={}))


def ask(name: str, prompt: Ids = (1, 2, 3), count: int = 6, **options: Any) -> GenerateRequest:
    sampling = options.pop("sampling", None) or SamplingParams(max_new_tokens=count)
    return GenerateRequest(request_id=name, prompt_token_ids=prompt, sampling=sampling, **options)


def assert_sampled(answer: Completion, before: Ids, *, count: int | None = None) -> None:
    """Each token is what its declared version says after all before it, and has its own log-probability."""
    assert count is None or len(answer.token_ids) == count, answer
    assert answer.logprobs == tuple(-float(token) for token in answer.token_ids)
    for span in answer.versions:
        for place in range(span.start, span.end):
            wanted = next_token(span.version, before + answer.token_ids[:place])
            assert answer.token_ids[place] == wanted, (place, wanted, answer)
