"""What a server engine asks of one server: the calls of its HTTP API, in our words.

    ServerEngine ──► ServerClient ──HTTP──► SGLang or vLLM
         │  pauses, versions, restarts, sessions, partial answers: once, for both servers
         └► WeightChannel ──► files, process group or shared memory ──► the same server

A client holds connections and nothing else: no table of requests, no retry, no version. It maps every foreign error
once: RequestRejected (this request can never be served), ServerBusy (not now: the queue is full), EngineUnavailable
(the connection broke or the server is gone), WeightUpdateError (an update was refused).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from skyrl_train.engines.base import Capability, LogprobSpace, Occupant
from skyrl_train.errors import EngineError
from skyrl_train.types import AdapterWeights, FinishReason, SamplingParams


class ServerBusy(EngineError):
    """The server's queue is full. The request had no effect; it may be sent again later."""

    retry_is_safe = True


@dataclass(frozen=True, kw_only=True)
class ServerTraits:
    """Constant for one release started with one set of arguments.

    `reports_versions`: an attempt that outlives a weight update says which tokens each version sampled. Then, and only
    then, may requests stay in the server over an update: the engine pauses it with `hold`. Elsewhere the engine ends
    them and sends them again with what they have.
    `native_sessions`: the server keeps sessions; elsewhere the engine sends whole prompts and the prefix cache does it.
    """

    name: str
    release: str
    logprob_space: LogprobSpace
    capabilities: frozenset[Capability]
    reports_versions: bool = False
    native_sessions: bool = False


@dataclass(frozen=True, kw_only=True)
class WireSession:
    """A place in a native session: go on after attempt `parent_wire_id`; None is the empty root."""

    session_id: str
    parent_wire_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One sending of a request. `token_ids` is all that the server must put before the first new token: the prompt
    with what an earlier attempt made, or, in a native session, only what follows the parent. `sampling` has the budget
    that is left. `wire_id` is unique among all attempts of this engine.
    """

    wire_id: str
    token_ids: tuple[int, ...]
    sampling: SamplingParams
    adapter: str | None = None
    priority: int = 0
    session: WireSession | None = None


@dataclass(frozen=True, kw_only=True)
class WireSpan:
    """Tokens [start, end) of an answer were sampled while the server's weight version was `version`."""

    version: str
    start: int
    end: int


@dataclass(frozen=True, kw_only=True)
class AttemptResult:
    """What one attempt made, in ids and log-probabilities of the engine's space. Stop strings and end tokens are kept.

    `spans` None: all under the version that the server had when the attempt was sent.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    num_cached_tokens: int = 0
    spans: tuple[WireSpan, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class ServerFigures:
    """A look at the server's own counters; None is what this release doesn't tell."""

    num_running: int
    num_waiting: int
    kv_used_frac: float
    num_prompt_tokens_total: int
    num_cached_tokens_total: int | None = None
    num_generated_tokens_total: int
    num_retractions_total: int | None = None
    num_evicted_tokens_total: int | None = None
    num_steps_total: int | None = None
    accept_len: float | None = None


class ServerClient(Protocol):
    """One running server. All calls but `generate` end within a deadline of their own, with EngineUnavailable."""

    @property
    def traits(self) -> ServerTraits: ...

    async def is_healthy(self) -> bool:
        """Answers within seconds; False for any failure."""
        ...

    async def check_identity(self) -> None:
        """Once, when the server is up: it is what the traits say. Raises ConfigError naming what differs."""
        ...

    def check(self, attempt: Attempt) -> None:
        """Raises RequestRejected for what `generate` refuses without asking the server; needs no running server."""
        ...

    async def generate(self, attempt: Attempt) -> AttemptResult:
        """Waits as long as the server lives. Cancelling it ends the request in the server too."""
        ...

    async def abort(self, wire_ids: Sequence[str]) -> None:
        """These attempts return with what they have, finish_reason "abort". Unknown ids are fine."""
        ...

    async def hold(self) -> None:
        """Nothing steps any more; what runs stays in the server, its cache may go. Only with `reports_versions`."""
        ...

    async def halt(self) -> None:
        """Nothing steps and no new request starts; the engine has ended all attempts before."""
        ...

    async def release(self) -> None:
        """After hold or halt: go on."""
        ...

    async def flush_cache(self) -> None:
        """Forget prefixes. Raises RequestRejected while requests run."""
        ...

    async def weight_version(self) -> str | None:
        """What the server calls its weights; None where the release has no such name."""
        ...

    async def set_weight_version(self, version: str) -> None:
        """Names the weights that it has. Nothing is aborted."""
        ...

    async def load_adapter(self, name: str, adapter: AdapterWeights | str) -> None:
        """Tensors, or a folder in peft's format that the server sees."""
        ...

    async def unload_adapter(self, name: str) -> None: ...

    async def open_session(self, session_id: str, capacity: int) -> None: ...

    async def close_session(self, session_id: str) -> None: ...

    async def sleep(self, release: Sequence[Occupant]) -> None: ...

    async def wake(self, restore: Sequence[Occupant]) -> None: ...

    async def score(self, token_ids: Sequence[int]) -> tuple[float, ...]:
        """Log-probabilities at temperature 1 of token_ids[1:], computed anew (no cache), by the base model: [L - 1]."""
        ...

    async def figures(self) -> ServerFigures: ...

    async def metrics_text(self) -> str:
        """The server's own series in Prometheus' text format; empty where they are off."""
        ...

    async def close(self) -> None:
        """Connections only; the server goes on."""
        ...
