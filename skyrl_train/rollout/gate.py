"""A `GenerateFn` that can be shut: what runs comes back with what it has, waits, and goes on later where it was.

    open     request ──► engine ──► completion ──► the trajectory goes on
    shut     engine aborts; partial answers are kept here; every trajectory that asks for tokens waits in line
    open     in the line's canonical order: request + partial answer ──► engine ──► one joined completion

So a weight update, an evaluation or a checkpoint meets no running request, and what is in flight is a list of
tokens: `state` is all of it. A trajectory that is started again after a kill is answered from the record until it
asks for what nobody has sampled yet.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from skyrl_train.engines.base import Engine
from skyrl_train.rollout.journal import completion_from_json, completion_to_json
from skyrl_train.types import Completion, GenerateRequest

_number: contextvars.ContextVar[int] = contextvars.ContextVar("trajectory_number")


class Gate:
    """Owns what is known of unfinished trajectories. One event loop.

    `num_expected` says how many trajectories will stand in line once everything has come to rest.
    """

    def __init__(self, engine: Engine, num_expected: Callable[[], int]) -> None:
        self._engine = engine
        self._num_expected = num_expected
        self._is_open = False
        self._line: dict[str, tuple[int, asyncio.Future[None]]] = {}
        self._in_flight: dict[str, None] = {}
        self._done: dict[int, dict[str, Completion]] = {}
        """Of each unfinished trajectory: the answers that it was given."""
        self._partial: dict[str, Completion] = {}
        self._replay: dict[str, Completion] = {}
        self._at_rest = asyncio.Event()
        self.num_parked = 0
        """Requests that the last shutting brought back."""

    @property
    def is_open(self) -> bool:
        return self._is_open

    async def generate(self, request: GenerateRequest) -> Completion:
        """Within `trajectory`. Waits while the gate is shut, however often that happens on the way."""
        name, number = request.request_id, _number.get()
        completion = self._replay.pop(name, None)
        while completion is None:
            if not self._is_open:
                await self._stand_in_line(name, number)
            self._in_flight[name] = None
            try:
                answer = await self._engine.generate(replace(request, partial=self._partial.pop(name, None)))
            finally:
                del self._in_flight[name]
            if answer.finish_reason != "abort" or self._is_open:
                completion = answer
            elif answer.token_ids:
                self._partial[name] = answer
        self._done.setdefault(number, {})[name] = completion
        return completion

    @contextmanager
    def trajectory(self, number: int) -> Iterator[None]:
        """The trajectory `number` of the run, in the order in which they were started; its record ends with it."""
        token = _number.set(number)
        try:
            yield
        finally:
            _number.reset(token)
            self._done.pop(number, None)

    def count_again(self) -> None:
        """A trajectory ended or was added: perhaps all is at rest now."""
        if not self._is_open and len(self._line) == self._num_expected():
            self._at_rest.set()
        else:
            self._at_rest.clear()

    async def shut(self) -> None:
        """No request starts from here on, and those that run come back. See `rest`."""
        if not self._is_open:
            return
        self._is_open = False
        self.num_parked = len(self._in_flight)
        await self._engine.abort(list(self._in_flight))
        self.count_again()

    async def rest(self) -> None:
        """Returns when every unfinished trajectory stands in line: environments that still step are waited for."""
        self.count_again()
        await self._at_rest.wait()

    def open(self) -> None:
        """Let the line in, in the order of the trajectories' numbers, whoever came first."""
        self._is_open = True
        self._at_rest.clear()
        line, self._line = self._line, {}
        for _, future in sorted(line.values(), key=lambda entry: entry[0]):
            if not future.done():
                future.set_result(None)

    def state(self) -> dict[str, Any]:
        """Valid at rest: all that was sampled for trajectories that have not ended."""
        return {
            "done": [completion_to_json(c) for answers in self._done.values() for c in answers.values()],
            "partial": [completion_to_json(c) for c in self._partial.values()],
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Before the trajectories are started again."""
        self._replay = {row["request_id"]: completion_from_json(row) for row in state["done"]}
        self._partial = {row["request_id"]: completion_from_json(row) for row in state["partial"]}

    async def _stand_in_line(self, name: str, number: int) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._line[name] = (number, future)
        self.count_again()
        try:
            await future
        finally:
            self._line.pop(name, None)
