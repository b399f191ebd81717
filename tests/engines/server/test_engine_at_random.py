"""Any order of requests, aborts, pauses, updates and deaths: each request is answered once, by the weights it names."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from skyrl_train.engines.base import PauseMode
from skyrl_train.engines.server.engine import ServerEngine
from skyrl_train.errors import WeightUpdateError
from skyrl_train.types import Completion, GenerateRequest, SamplingParams, SessionRef, WeightUpdate
from skyrl_train.weight_sync.sync import Turns, sync_weights
from tests.engines.server.scripted import Machine, adapter, ask, assert_sampled, engine_over, named, run, settled

NUM_STEPS = 60


class Story:
    """Random calls of one engine by a caller that keeps the engine's rules: updates while paused, names used once."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.machine = Machine(
            keeps_versions=self.random.random() < 0.5,
            keeps_sessions=self.random.random() < 0.5,
        )
        self.form: Any = self.random.choice([named, adapter])
        self.attached = self.random.random() < 0.3
        self.engine = engine_over(self.machine, attached=self.attached, max_restarts=10_000, proves=self.form is named)
        self.num_writes = 0
        """Of the trainer into the weights that it gave last."""
        self.calls: list[asyncio.Task[None]] = []
        self.version = 0
        self.asked: dict[str, GenerateRequest] = {}
        self.history: dict[str, tuple[int, ...]] = {}
        self.tasks: dict[str, asyncio.Task[Completion]] = {}
        self.aborted: set[str] = set()
        self.cancelled: set[str] = set()
        self.sessions: list[str] = []
        self.control: asyncio.Task[None] | None = None
        self.may_abort = False

    async def tell(self) -> None:
        await self.engine.start()
        self.sessions = [await self.engine.open_session(100_000) for _ in range(2)]
        for _ in range(NUM_STEPS):
            self.random.choice(self.plot())()
            for _ in range(self.random.choice([0, 1, 3, 7, 30])):
                await asyncio.sleep(0)
            if self.random.random() < 0.3:
                await asyncio.sleep(self.random.choice([0.01, 0.3, 3.0]))
        if self.attached:
            self.come_back()
        if self.control is not None:
            await self.machine.until(self.control, limit=5000)
            await self.control
        self.sync()
        assert self.control is not None
        await self.machine.until(self.control, limit=5000)
        await self.control
        await self.machine.until(*self.tasks.values(), limit=5000)
        await self.judge()

    def plot(self) -> list[Any]:
        control = [self.sync, self.pause_and_resume] if self.control is None or self.control.done() else []
        ends = [self.fall_silent, self.come_back, self.come_back] if self.attached else [self.die]
        return [*[self.ask] * 4, *[self.step] * 8, self.abort, self.cancel, self.hiccup, self.write, *ends, *control]

    def ask(self) -> None:
        name, session, parent = f"r{len(self.asked)}", None, None
        before: tuple[int, ...] = ()
        if self.random.random() < 0.4:
            session_id = self.random.choice(self.sessions)
            known = [n for n, t in self.tasks.items() if self._is_answered(n, t, session_id)]
            if known and self.random.random() < 0.7:
                parent = self.random.choice(known)
                before = self.history[parent] + self.tasks[parent].result().token_ids
            session = SessionRef(session_id=session_id, parent_request_id=parent)
        new = tuple(self.random.randrange(900) for _ in range(self.random.randint(1, 3)))
        sampling = SamplingParams(
            max_new_tokens=self.random.randint(1, 9),
            min_new_tokens=self.random.choice([0, 0, 1]),
            presence_penalty=self.random.choice([0.0, 0.0, 0.0, 0.5]),
        )
        request = self.asked[name] = ask(name, new, sampling=sampling, session=session)
        self.history[name] = before + new
        self.tasks[name] = asyncio.create_task(self.engine.generate(request))

    def _is_answered(self, name: str, task: asyncio.Task[Completion], session_id: str) -> bool:
        session = self.asked[name].session
        if session is None or session.session_id != session_id or not task.done() or task.cancelled():
            return False
        return task.exception() is None

    def step(self) -> None:
        self.machine.server.step()

    def abort(self) -> None:
        if self.asked:
            name = self.random.choice(list(self.asked))
            self.aborted.add(name)
            self._call(self.engine.abort([name]))

    def cancel(self) -> None:
        open_ones = [name for name, task in self.tasks.items() if not task.done()]
        if open_ones:
            name = self.random.choice(open_ones)
            self.cancelled.add(name)
            self.tasks[name].cancel()

    def die(self) -> None:
        if self.random.random() < 0.5:
            self.machine.server.die()
            self.machine.num_failing_starts = self.random.choice([0, 0, 0, 1, 2])

    def fall_silent(self) -> None:
        """A server of others ends, or can't be reached for a while."""
        if self.random.random() < 0.5:
            self.machine.server.die()
        else:
            self.machine.server.hangs = True

    def come_back(self) -> None:
        self.machine.server.hangs = False
        if self.machine.server.died.is_set():
            self.machine.start()

    def hiccup(self) -> None:
        """The server ends what runs, and says so."""
        if self.random.random() < 0.5:
            self.machine.server.abort(list(self.machine.server.running))

    def write(self) -> None:
        """The trainer begins to change what it gave: a server that dies from here on can't have it again."""
        if self.form is named and self.random.random() < 0.3:
            self.num_writes += 1

    def update(self, version: int) -> WeightUpdate:
        if self.form is adapter:
            return adapter(version)
        written = self.num_writes
        return named(version, lambda: self.num_writes == written)

    def sync(self) -> None:
        self.version += 1
        mode: PauseMode = self.random.choice(["keep", "keep", "keep", "wait", "abort"])
        self.may_abort |= mode == "abort"
        self.control = asyncio.create_task(self._sync(self.version, mode))

    async def _sync(self, version: int, mode: PauseMode) -> None:
        turns = None
        if not self.attached and self.random.random() < 0.3:
            releases: Any = ("kv_cache",) if self.form is adapter else ("kv_cache", "weights")
            turns = Turns(releases=releases, make_room=lambda: None)
            await self._stepping(asyncio.create_task(turns.to_trainer(self.engine)))
            await asyncio.sleep(self.random.choice([0.0, 0.5, 5.0]))
        else:
            await self._stepping(asyncio.create_task(self.engine.pause(mode)))
        written = self.num_writes
        try:
            await sync_weights(self.engine, self.update(version), turns=turns)
        except WeightUpdateError:
            # Only where a server died and could not have them again: it waits for the next ones.
            assert self.num_writes > written
        assert (await self.engine.stats()).policy_version in (version, version - 1)

    def pause_and_resume(self) -> None:
        mode: PauseMode = self.random.choice(["keep", "wait", "abort"])
        self.may_abort |= mode == "abort"
        self.control = asyncio.create_task(self._pause_and_resume(mode))

    async def _pause_and_resume(self, mode: PauseMode) -> None:
        await self._stepping(asyncio.create_task(self.engine.pause(mode)))
        await asyncio.sleep(self.random.choice([0.0, 0.5]))
        try:
            await self.engine.resume()
        except WeightUpdateError:
            assert self.num_writes

    async def _stepping(self, pausing: asyncio.Task[None]) -> None:
        """A waiting pause waits for a server that steps."""
        while not pausing.done():
            self.machine.server.step()
            await asyncio.sleep(0.1)
        await pausing

    def _call(self, call: Any) -> None:
        self.calls.append(asyncio.create_task(call))

    async def judge(self) -> None:
        engine: ServerEngine = self.engine
        for name, task in self.tasks.items():
            if task.cancelled():
                assert name in self.cancelled
                continue
            answer = task.result()
            assert answer.request_id == name
            assert_sampled(answer, self.history[name])
            count, budget = len(answer.token_ids), self.asked[name].sampling.max_new_tokens
            if answer.finish_reason == "abort":
                assert (name in self.aborted or self.may_abort) and count < budget
            else:
                assert (answer.finish_reason, count) == ("length", budget)
            versions = [span.version for span in answer.versions]
            assert versions == sorted(set(versions)), "it went back to older weights"
        await asyncio.gather(*self.calls)
        await settled()
        stats = await engine.stats()
        assert (stats.num_running, stats.num_waiting, stats.paused) == (0, 0, False)
        assert stats.policy_version == self.version
        engine._traffic.book.check_integrity()
        for session in self.sessions:
            await engine.close_session(session)
        assert not self.machine.server.sessions and (await engine.stats()).num_sessions == 0
        assert not self.machine.server.running and not self.machine.server.arriving
        await engine.close()


@pytest.mark.parametrize("seed", range(60))
def test_every_request_is_answered_once_by_the_weights_it_names(seed: int) -> None:
    run(Story(seed).tell())
