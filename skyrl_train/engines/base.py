"""The two interfaces: `GenerateFn` is all that a rollout sees, `Engine` is all that the loop sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from skyrl_train.types import Completion, GenerateRequest, WeightUpdate

PauseMode = Literal["keep", "wait", "abort"]
Occupant = Literal["weights", "kv_cache"]
LogprobSpace = Literal["raw", "temperature", "penalised", "sampled"]
"""Which distribution `Completion.logprobs` describe: the model's at temperature 1 (raw), after the temperature
(temperature), after penalties, min_new_tokens and the temperature (penalised), or the one that was drawn from, after
truncation too (sampled)."""

Capability = Literal[
    "abort",
    "adapter_weights",
    "disk_weights",
    "local_weights",
    "lora",
    "min_p",
    "named_weights",
    "penalties",
    "priority",
    "seed",
    "sessions",
    "sleep",
    "speculation",
    "stop_strings",
    "structured_output",
]


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """Constant for an engine's lifetime. `max_context_len` counts prompt and completion together."""

    name: str
    model: str
    max_context_len: int
    logprob_space: LogprobSpace
    capabilities: frozenset[Capability]


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """What the engine is doing now. Counters (`num_*_total`) only rise; `accept_len` is None without speculation."""

    policy_version: int
    paused: bool
    num_running: int
    num_waiting: int
    kv_used_frac: float
    num_prompt_tokens_total: int
    num_cached_tokens_total: int
    num_generated_tokens_total: int
    num_retractions_total: int
    num_evicted_tokens_total: int
    num_steps_total: int
    accept_len: float | None = None
    num_verifications_total: int = 0
    """Steps of requests that had drafts, where the engine counts them; so with the next two."""
    num_drafted_tokens_total: int = 0
    num_accepted_tokens_total: int = 0
    draft_updates_behind: int | None = None
    """Weight updates since the draft's own weights were made; None where it has none."""
    num_sessions: int = 0
    num_host_cached_tokens_total: int = 0
    """Tokens read back from a host tier behind the KV cache; prompt tokens among them count as cached too."""
    num_restarts_total: int = 0
    num_resent_total: int = 0

    @property
    def cache_hit_frac(self) -> float:
        """Prompt tokens served from the prefix cache, over all prompt tokens."""
        return self.num_cached_tokens_total / max(self.num_prompt_tokens_total, 1)


class GenerateFn(Protocol):
    """All that a rollout sees of an engine."""

    async def __call__(self, request: GenerateRequest) -> Completion: ...


class Engine(Protocol):
    """All that the loop sees of an engine. `info` is valid from construction, the rest between `start` and `close`."""

    @property
    def info(self) -> EngineInfo: ...

    async def start(self) -> None:
        """Ready for requests when it returns. Raises EngineUnavailable, or ConfigError for what can't run as asked."""
        ...

    async def stats(self) -> EngineStats:
        """Also while paused. Raises EngineUnavailable once the engine is closed or has failed."""
        ...

    async def metrics_text(self) -> str:
        """The servers' own series in Prometheus' text format, under their own names; empty where there are none.

        Raises EngineUnavailable as `stats`.
        """
        ...

    async def generate(self, request: GenerateRequest) -> Completion:
        """Waits while paused. Raises RequestRejected or EngineUnavailable.

        Cancelling the caller aborts the request and frees what it held.
        """
        ...

    async def abort(self, request_ids: Sequence[str]) -> None:
        """End these requests now: each returns its partial output with finish_reason "abort". Unknown ids are fine."""
        ...

    async def open_session(self, capacity: int) -> str:
        """A new, empty session that holds at most `capacity` tokens; its id. Raises RequestRejected."""
        ...

    async def clear_session(self, session_id: str) -> None:
        """As newly opened, for its next user. Raises RequestRejected if it is unknown or requests run in it."""
        ...

    async def close_session(self, session_id: str) -> None:
        """Frees what it held; its running requests are aborted. An unknown id is fine: closing twice is closing."""
        ...

    async def pause(self, mode: PauseMode = "keep") -> None:
        """Stop stepping. keep: running requests freeze; wait: they finish first; abort: they end, output kept."""
        ...

    async def resume(self) -> None: ...

    async def prepare_weights(self, update: WeightUpdate) -> None:
        """What of the update needs no pause, while requests run; optional, and followed by `update_weights` of it.

        Nothing that is served changes. Raises WeightUpdateError.
        """
        ...

    async def update_weights(self, update: WeightUpdate) -> None:
        """Only while paused; all or nothing; flushes the prefix cache once; then serves as `update.version`."""
        ...

    async def flush_cache(self) -> None:
        """Forget cached prefixes. Only while no request runs. Raises RequestRejected otherwise."""
        ...

    async def sleep(self, release: Sequence[Occupant]) -> None:
        """Give memory back. Only when drained."""
        ...

    async def wake(self, restore: Sequence[Occupant]) -> None: ...

    async def close(self) -> None: ...
