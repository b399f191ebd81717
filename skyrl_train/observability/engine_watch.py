"""The engine's figures of each training step, for the log: looked at now and then, and added up at its end."""

from __future__ import annotations

import asyncio
from types import TracebackType

from skyrl_train.engines.base import Engine, EngineStats
from skyrl_train.errors import EngineError

_COUNTERS = (
    ("engine/prompt_tokens", "num_prompt_tokens_total"),
    ("engine/cached_tokens", "num_cached_tokens_total"),
    ("engine/generated_tokens", "num_generated_tokens_total"),
    ("engine/retractions", "num_retractions_total"),
    ("engine/evicted_tokens", "num_evicted_tokens_total"),
    ("engine/steps", "num_steps_total"),
    ("engine/restarts", "num_restarts_total"),
    ("engine/resent", "num_resent_total"),
)


class EngineWatch:
    """Looks at the engine while it is entered; one event loop.

        async with EngineWatch(engine) as watch:
            for step in ...:
                ...
                metrics |= await watch.step()

    While the loop is blocked, by a training step say, nobody looks; then the engine has nothing to do either.
    """

    def __init__(self, engine: Engine, *, every_s: float = 2.0) -> None:
        self._engine = engine
        self._every_s = every_s
        self._seen: list[EngineStats] = []
        self._before: EngineStats | None = None
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> EngineWatch:
        self._before = await self.look()
        self._seen.clear()
        self._task = asyncio.create_task(self._keep_looking(), name=f"watch of {self._engine.info.name}")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def step(self) -> dict[str, float]:
        """The figures since the last call. `running`, `waiting` and their `_max` are over the looks in between,
        `kv_used_frac` is the greatest; what the engine counts is counted since the last call.
        """
        now = await self.look()
        seen, self._seen = self._seen, []
        before, self._before = self._before, now
        if now is None:
            return {"engine/up": 0}
        metrics: dict[str, float] = {
            "engine/up": 1,
            "engine/running": sum(stats.num_running for stats in seen) / len(seen),
            "engine/running_max": max(stats.num_running for stats in seen),
            "engine/waiting": sum(stats.num_waiting for stats in seen) / len(seen),
            "engine/waiting_max": max(stats.num_waiting for stats in seen),
            "engine/kv_used_frac": max(stats.kv_used_frac for stats in seen),
            "engine/sessions": now.num_sessions,
        }
        metrics |= _speculation(before, now)
        for name, field in _COUNTERS:
            metrics[name] = getattr(now, field) - (0 if before is None else getattr(before, field))
        cached, prompts = metrics["engine/cached_tokens"], metrics["engine/prompt_tokens"]
        metrics["engine/cache_hit_frac"] = cached / prompts if prompts else 0.0
        return metrics

    async def look(self) -> EngineStats | None:
        """One look more, where the figures are worth it: at the end of a rollout, before an update empties the cache.

        None while the engine doesn't answer: whoever needs it meets the error himself.
        """
        try:
            stats = await self._engine.stats()
        except EngineError:
            return None
        self._seen.append(stats)
        return stats

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(self._every_s)
            await self.look()


def _speculation(before: EngineStats | None, now: EngineStats) -> dict[str, float]:
    """Accept length and rate since `before` where the engine counts drafts, else its own figure since it began."""
    metrics: dict[str, float] = {}
    if now.accept_len is None:
        return metrics
    metrics["engine/accept_len"] = now.accept_len
    verified, drafted, accepted = (
        getattr(now, field) - (0 if before is None else getattr(before, field))
        for field in ("num_verifications_total", "num_drafted_tokens_total", "num_accepted_tokens_total")
    )
    if now.num_verifications_total:
        # A step in which nothing was drafted got one token at a time.
        metrics["engine/accept_len"] = 1 + accepted / verified if verified else 1.0
        metrics["engine/drafted_tokens"] = drafted
        metrics["engine/accept_frac"] = accepted / drafted if drafted else 0.0
    if now.draft_updates_behind is not None:
        metrics["engine/draft_updates_behind"] = now.draft_updates_behind
    return metrics
