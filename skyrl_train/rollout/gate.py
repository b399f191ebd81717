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
import hashlib
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from skyrl_train.engines.base import Engine, GenerateFn
from skyrl_train.rollout.journal import completion_from_json, completion_to_json
from skyrl_train.types import Completion, GenerateRequest

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Answer:
    """A completion, whole or partial, and the digest of the prompt that it was sampled after."""

    prompt: str
    completion: Completion


@dataclass(eq=False, kw_only=True)
class _Record:
    """Of one unfinished trajectory. `replay` is what an earlier process gave it and it has not asked for yet."""

    name: str
    number: int
    done: dict[str, _Answer] = field(default_factory=dict)
    partial: dict[str, _Answer] = field(default_factory=dict)
    replay: dict[str, _Answer] = field(default_factory=dict)


_current: contextvars.ContextVar[_Record] = contextvars.ContextVar("trajectory_record")


class Gate:
    """Owns what is known of unfinished trajectories. One event loop.

    `num_expected` says how many trajectories will stand in line once everything has come to rest.
    """

    def __init__(self, engine: Engine, num_expected: Callable[[], int], *, generate: GenerateFn | None = None) -> None:
        """`generate` None is the engine's own; another one leads there (sessions)."""
        self._engine = engine
        self._generate = generate or engine.generate
        self._num_expected = num_expected
        self._is_open = False
        self._line: dict[str, tuple[int, asyncio.Future[None]]] = {}
        self._in_flight: dict[str, None] = {}
        self._records: dict[str, _Record] = {}
        """By the trajectory's name, those that have begun, and those of an earlier process that have not yet."""
        self._at_rest = asyncio.Event()
        self.num_parked = 0
        """Requests that came back unfinished since the gate was shut last."""
        self.num_resampled_total = 0
        """Recorded answers that were given up because the prompt is another one now."""

    @property
    def is_open(self) -> bool:
        return self._is_open

    async def generate(self, request: GenerateRequest) -> Completion:
        """Within `trajectory`. Waits while the gate is shut, however often that happens on the way."""
        try:
            record = _current.get()
        except LookupError:
            raise RuntimeError(
                f"request {request.request_id}: in the asynchronous loop an agent asks for tokens from the task that "
                "runs the trajectory, or from tasks that this one started; whose trajectory is this?"
            ) from None
        name, prompt = request.request_id, digest(request.prompt_token_ids)
        recorded = self._same(record.replay.pop(name, None), prompt, record)
        completion = None if recorded is None else recorded.completion
        while completion is None:
            if not self._is_open:
                await self._stand_in_line(name, record.number)
            kept = self._same(record.partial.pop(name, None), prompt, record)
            self._in_flight[name] = None
            try:
                answer = await self._generate(request if kept is None else replace(request, partial=kept.completion))
            finally:
                del self._in_flight[name]
                self.count_again()
            if answer.finish_reason != "abort" or self._is_open:
                completion = answer
                continue
            self.num_parked += 1
            if answer.token_ids:
                record.partial[name] = _Answer(prompt=prompt, completion=answer)
        record.done[name] = _Answer(prompt=prompt, completion=completion)
        return completion

    @contextmanager
    def trajectory(self, number: int, name: str) -> Iterator[None]:
        """The trajectory `number` of the run, in the order in which they were started; its record ends with it."""
        record = self._records.setdefault(name, _Record(name=name, number=number))
        record.number = number
        token = _current.set(record)
        try:
            yield
        finally:
            _current.reset(token)
            del self._records[name]

    def count_again(self) -> None:
        """A trajectory ended or was added, or a request moved: perhaps all is at rest now."""
        waiting = {number for number, _ in self._line.values()}
        if not self._is_open and not self._in_flight and len(waiting) == self._num_expected():
            self._at_rest.set()
        else:
            self._at_rest.clear()

    async def shut(self) -> None:
        """No request starts from here on, and those that run come back. See `rest`."""
        if not self._is_open:
            return
        self._is_open = False
        self.num_parked = 0
        await self._engine.abort(list(self._in_flight))
        self.count_again()

    async def rest(self) -> None:
        """Returns when every unfinished trajectory stands in line: environments that still step are waited for."""
        self.count_again()
        while not self._at_rest.is_set():
            await self._at_rest.wait()

    def open(self) -> None:
        """Let the line in, in the order of the trajectories' numbers, whoever came first."""
        self._is_open = True
        self._at_rest.clear()
        line, self._line = self._line, {}
        for _, future in sorted(line.values(), key=lambda entry: entry[0]):
            if not future.done():
                future.set_result(None)

    def state(self) -> list[dict[str, Any]]:
        """Valid at rest: all that was sampled for trajectories that have not ended."""
        return [
            {
                "trajectory": record.name,
                # Also what is still to be replayed: a trajectory may not have had its turn since the last checkpoint.
                "done": _to_json([*record.replay.values(), *record.done.values()]),
                "partial": _to_json(record.partial.values()),
            }
            for record in self._records.values()
        ]

    def load(self, state: Sequence[Mapping[str, Any]], trajectories: Collection[str]) -> None:
        """Before these trajectories are started again; what is recorded of others is left out."""
        for row in state:
            if row["trajectory"] in trajectories:
                self._records[row["trajectory"]] = _Record(
                    name=row["trajectory"],
                    number=-1,
                    partial=_from_json(row["partial"]),
                    replay=_from_json(row["done"]),
                )

    def _same(self, answer: _Answer | None, prompt: str, record: _Record) -> _Answer | None:
        """The answer, if it was sampled after this very prompt; else it is given up, aloud."""
        if answer is None or answer.prompt == prompt:
            return answer
        self.num_resampled_total += 1
        logger.warning(
            "trajectory %s: request %s was recorded with another prompt, so its environment does not say the same "
            "again; what was sampled for it is given up and sampled anew",
            record.name,
            answer.completion.request_id,
        )
        return None

    async def _stand_in_line(self, name: str, number: int) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._line[name] = (number, future)
        self.count_again()
        try:
            await future
        finally:
            self._line.pop(name, None)


def digest(token_ids: Sequence[int]) -> str:
    """Of a prompt, short."""
    return hashlib.blake2b(repr(tuple(token_ids)).encode(), digest_size=8).hexdigest()


def _to_json(answers: Collection[_Answer]) -> list[dict[str, Any]]:
    return [{"prompt": answer.prompt, **completion_to_json(answer.completion)} for answer in answers]


def _from_json(rows: Sequence[Mapping[str, Any]]) -> dict[str, _Answer]:
    return {
        row["request_id"]: _Answer(
            prompt=row["prompt"],
            completion=completion_from_json({name: value for name, value in row.items() if name != "prompt"}),
        )
        for row in rows
    }
