"""The embedded engine: the core behind asyncio.

    caller --generate()--> future          inline: a task on the caller's event loop steps the core
                             ^             thread: one worker thread steps it, the loop stays free
                  step ------+

Whoever steps, steps alone: with `inline` everything happens on one loop; with `thread` commands wait for the end of
the step that runs. An exception in a step fails every open request and closes the engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import torch

from skyrl_train.engines.base import EngineInfo, EngineStats, Occupant, PauseMode
from skyrl_train.engines.embedded.config import EmbeddedConfig
from skyrl_train.engines.embedded.core import EngineCore, Finished
from skyrl_train.errors import EngineUnavailable, RequestRejected
from skyrl_train.types import Completion, GenerateRequest, WeightUpdate


class EmbeddedEngine:
    """Implements `engines.base.Engine`."""

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: Any,
        *,
        config: EmbeddedConfig,
        name: str = "embedded-0",
        policy_version: int = 0,
    ) -> None:
        self._core = EngineCore(model, tokenizer, config=config, name=name, policy_version=policy_version)
        self._futures: dict[str, asyncio.Future[Completion]] = {}
        self._driver: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._failure: BaseException | None = None
        self._closed = False

    @property
    def info(self) -> EngineInfo:
        return self._core.info

    async def stats(self) -> EngineStats:
        return self._core.stats()

    async def generate(self, request: GenerateRequest) -> Completion:
        self._check_open()
        self._core.add(request)
        future: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        self._futures[request.request_id] = future
        self._wake_driver()
        try:
            return await future
        finally:
            if self._futures.pop(request.request_id, None) is not None:
                self._core.abort([request.request_id])

    async def abort(self, request_ids: Sequence[str]) -> None:
        self._deliver(self._core.abort(request_ids))

    async def pause(self, mode: PauseMode = "keep") -> None:
        self._check_open()
        self._deliver(self._core.pause(mode))
        while self._core.pause_state == "draining":
            self._wake_driver()
            self._changed.clear()
            await self._changed.wait()
            self._check_open()

    async def resume(self) -> None:
        self._check_open()
        self._core.resume()
        self._wake_driver()

    async def update_weights(self, update: WeightUpdate) -> None:
        self._check_open()
        self._core.update_weights(update)

    async def open_session(self, capacity: int) -> str:
        raise RequestRejected(f"engine {self.info.name} has no sessions; send whole prompts")

    async def close_session(self, session_id: str) -> None:
        raise RequestRejected(f"engine {self.info.name} has no sessions; {session_id!r} was never open")

    async def sleep(self, release: Sequence[Occupant]) -> None:
        raise RequestRejected(f"engine {self.info.name} can't sleep")

    async def wake(self, restore: Sequence[Occupant]) -> None:
        raise RequestRejected(f"engine {self.info.name} can't sleep")

    async def close(self) -> None:
        self._closed = True
        self._fail_all(EngineUnavailable(f"engine {self.info.name} was closed"))
        self._changed.set()
        if self._driver is not None:
            await asyncio.gather(self._driver, return_exceptions=True)

    def _check_open(self) -> None:
        if self._failure is not None:
            raise EngineUnavailable(f"engine {self.info.name} failed: {self._failure}") from self._failure
        if self._closed:
            raise EngineUnavailable(f"engine {self.info.name} is closed")

    def _wake_driver(self) -> None:
        if (self._driver is None or self._driver.done()) and self._core.has_work:
            self._driver = asyncio.create_task(self._drive(), name=f"{self.info.name} driver")

    async def _drive(self) -> None:
        core = self._core
        while core.has_work and not self._closed:
            try:
                finished = core.step()
            except Exception as exc:
                self._failure = exc
                self._fail_all(EngineUnavailable(f"engine {self.info.name} failed: {exc}"), cause=exc)
                self._changed.set()
                return
            self._deliver(finished)
            core.note_drained()
            self._changed.set()
            await asyncio.sleep(0)

    def _deliver(self, finished: Sequence[Finished]) -> None:
        for item in finished:
            future = self._futures.pop(item.completion.request_id, None)
            if future is not None and not future.done():
                future.set_result(item.completion)

    def _fail_all(self, error: Exception, cause: BaseException | None = None) -> None:
        error.__cause__ = cause
        futures, self._futures = self._futures, {}
        for future in futures.values():
            if not future.done():
                future.set_exception(error)
