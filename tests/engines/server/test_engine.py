"""Pauses, updates, deaths and sleep of a server engine, in the orders that go wrong: scripted.py."""

from __future__ import annotations

import asyncio
import itertools
import logging
from typing import Any

import pytest

from skyrl_train.async_loop import next_is_complete
from skyrl_train.engines.router import RoutedEngine
from skyrl_train.engines.server.engine import ServerEngine
from skyrl_train.errors import EngineUnavailable, RequestRejected, WeightUpdateError
from skyrl_train.types import WeightUpdate
from skyrl_train.weight_sync.sync import Turns, sync_weights
from tests.engines.server.scripted import (
    Machine,
    adapter,
    ask,
    assert_sampled,
    engine_over,
    named,
    run,
    settled,
)
from tests.engines.server.test_traffic import PROMPT, begin, serve

BOTH = pytest.mark.parametrize("keeps_versions", [True, False])
FORMS = pytest.mark.parametrize("form", [named, adapter])


def versions(answer: Any) -> list[int]:
    return [span.version for span in answer.versions]


# -- deaths


@FORMS
@BOTH
def test_a_dead_server_is_started_with_the_current_weights_and_its_requests_are_sent_again(
    form: Any, keeps_versions: bool
) -> None:
    async def body(machine: Machine, engine: ServerEngine) -> None:
        await sync_weights(engine, form(3))
        tasks = begin(engine, *(ask(f"r{i}", (i,)) for i in range(5)))
        await machine.step(4)
        machine.server.die()
        await machine.until(*tasks)
        for i, task in enumerate(tasks):
            assert_sampled(await task, (i,), count=6)
            assert versions(await task) == [3]
        stats = await engine.stats()
        assert (stats.num_restarts_total, stats.num_resent_total) == (1, 5)
        assert stats.num_generated_tokens_total == 5 * 6
        assert not stats.paused

    serve(body, Machine(keeps_versions=keeps_versions))


def test_a_server_that_hangs_is_replaced() -> None:
    async def body(machine: Machine, engine: ServerEngine) -> None:
        await sync_weights(engine, named(3))
        (task,) = begin(engine, ask("r"))
        await machine.step(2)
        machine.server.hangs = True
        await machine.until(task)
        assert_sampled(await task, PROMPT, count=6)
        assert len(machine.servers) == 2

    serve(body)


def test_two_deaths_in_a_row_and_a_start_that_fails_are_three_restarts() -> None:
    async def body(machine: Machine, engine: ServerEngine) -> None:
        await sync_weights(engine, named(3))
        (task,) = begin(engine, ask("r"))
        await machine.step(2)
        machine.num_failing_starts = 1
        pushing = machine.stop_at("half")
        machine.server.die()
        while len(machine.servers) < 2 or machine.calls[-1] != "half":
            await asyncio.sleep(0.1)
        machine.server.die()  # while it gets its weights
        pushing.set()
        await machine.until(task)
        assert_sampled(await task, PROMPT, count=6)
        assert versions(await task) == [3]
        assert (await engine.stats()).num_restarts_total == 3

    serve(body)


def test_a_server_that_died_too_often_is_lost_for_everybody_who_waits() -> None:
    machine = Machine()

    async def whole() -> None:
        engine = engine_over(machine, max_restarts=2)
        await engine.start()
        running, parked = begin(engine, ask("r"), ask("s"))
        await machine.step(2)
        pausing = asyncio.create_task(engine.pause("wait"))
        late = asyncio.create_task(engine.generate(ask("t")))
        await settled()
        machine.num_failing_starts = 2
        machine.server.die()
        for task in (running, parked, pausing, late):
            with pytest.raises(EngineUnavailable, match="died 3 times and is not started again"):
                await task
        for call in (engine.stats(), engine.resume(), engine.pause(), engine.generate(ask("u")), engine.flush_cache()):
            with pytest.raises(EngineUnavailable, match="is lost"):
                await call
        await engine.close()

    run(whole())


def test_the_end_of_life_is_noticed_though_it_comes_as_the_next_one_settles() -> None:
    async def body(machine: Machine, engine: ServerEngine) -> None:
        releasing = machine.stop_at("release")
        machine.server.die()
        while machine.calls[-1] != "release":
            await asyncio.sleep(0.1)
        (task,) = begin(engine, ask("r"))
        releasing.set()
        for turn in range(30):
            await asyncio.sleep(0)
            if turn == 4:
                machine.server.die()
        await machine.until(task)
        assert_sampled(await task, PROMPT, count=6)

    serve(body)


@pytest.mark.parametrize("turns", range(0, 40, 3))
def test_an_engine_can_be_closed_at_any_moment_of_a_revival(turns: int) -> None:
    machine = Machine()

    async def whole() -> None:
        engine = engine_over(machine)
        await engine.start()
        await sync_weights(engine, named(3))
        (task,) = begin(engine, ask("r"))
        await machine.step(1)
        machine.server.die()
        await settled()
        while len(machine.servers) < 2:
            await asyncio.sleep(0.2)
        for _ in range(turns):
            await asyncio.sleep(0)
        await engine.close()
        with pytest.raises(EngineUnavailable, match="is closed"):
            await task
        assert machine.server.died.is_set()

    run(whole())


def test_a_start_that_fails_or_is_cancelled_leaves_no_server() -> None:
    async def whole() -> None:
        machine = Machine()
        machine.refuse["set_weight_version"] = [EngineUnavailable("it is gone")]
        with pytest.raises(EngineUnavailable, match="it is gone"):
            await engine_over(machine).start()
        assert machine.server.died.is_set()

        machine = Machine()
        machine.stop_at("open_channel")
        starting = asyncio.create_task(engine_over(machine).start())
        await asyncio.sleep(20)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert machine.server.died.is_set()

    run(whole())


def test_figures_of_a_server_that_dies_are_those_of_before_and_only_rise() -> None:
    async def body(machine: Machine, engine: ServerEngine) -> None:
        (task,) = begin(engine, ask("r", count=9))
        await machine.step(5)
        assert (await engine.stats()).num_steps_total == 5
        looking = machine.stop_at("figures")
        look = asyncio.create_task(engine.stats())
        await settled()
        machine.server.die()
        assert (await look).num_steps_total == 5
        looking.set()
        assert await engine.metrics_text() == ""
        stats = await engine.stats()
        assert (stats.num_steps_total, stats.num_running, stats.num_waiting) == (5, 0, 1)
        await machine.until(task)
        assert (await engine.stats()).num_steps_total == 5 + 9

    serve(body)


def test_a_death_of_which_a_broken_request_tells_is_one_death() -> None:
    """Requests, the watch and a control call all notice it."""

    async def body(machine: Machine, engine: ServerEngine) -> None:
        tasks = begin(engine, *(ask(f"r{i}") for i in range(8)))
        await machine.step(1)
        pausing = asyncio.create_task(engine.pause())
        machine.server.die()
        await pausing
        await engine.resume()
        await machine.until(*tasks)
        assert (await engine.stats()).num_restarts_total == 1

    serve(body)


# -- deaths at every call of an update

CALLS = [
    "abort",
    "hold",
    "halt",
    "push",
    "half",
    "weight_version",
    "release",
    "score",
    "load_adapter",
    "unload_adapter",
]


@FORMS
@BOTH
@pytest.mark.parametrize("call", CALLS)
def test_a_death_at_any_call_of_an_update_costs_nothing(call: str, keeps_versions: bool, form: Any) -> None:
    async def body(machine: Machine, engine: ServerEngine) -> None:
        await sync_weights(engine, form(1))
        tasks = begin(engine, *(ask(f"r{i}", (i,)) for i in range(3)))
        await machine.step(2)
        stop, count = machine.stop_at(call), len(machine.calls)
        syncing = asyncio.create_task(sync_weights(engine, form(2)))
        for _ in range(40):
            await asyncio.sleep(0.05)
            if call in machine.calls[count:]:
                machine.server.die()
                break
        stop.set()
        await machine.until(syncing, *tasks)
        await syncing
        stats = await engine.stats()
        assert (stats.policy_version, stats.paused) == (2, False)
        for i, task in enumerate(tasks):
            assert_sampled(await task, (i,), count=6)
        (task,) = begin(engine, ask("after"))
        await machine.until(task)
        assert_sampled(await task, PROMPT, count=6)
        assert versions(await task) == [2]

    serve(body, Machine(keeps_versions=keeps_versions), proves=form is named)


@FORMS
@BOTH
@pytest.mark.parametrize("moment", ["before the update", "before resume"])
def test_a_death_between_the_calls_of_an_update_costs_nothing(moment: str, keeps_versions: bool, form: Any) -> None:
    async def body(machine: Machine, engine: ServerEngine) -> None:
        await sync_weights(engine, form(1))
        (task,) = begin(engine, ask("r"))
        await machine.step(2)
        await engine.pause()
        if moment == "before the update":
            machine.server.die()
        await engine.update_weights(form(2))
        if moment == "before resume":
            machine.server.die()
            await settled()
        await engine.resume()
        await machine.until(task)
        assert_sampled(await task, PROMPT, count=6)
        assert versions(await task)[-1] == 2
        assert len(machine.servers) == 2

    serve(body, Machine(keeps_versions=keeps_versions), proves=form is named)


def test_a_hanging_server_is_replaced_in_the_middle_of_an_update() -> None:
    """Its watch ends the push, and the channel is closed only after that."""

    async def body(machine: Machine, engine: ServerEngine) -> None:
        await engine.pause()
        pushing = machine.stop_at("half")
        updating = asyncio.create_task(engine.update_weights(named(2)))
        await settled()
        machine.server.hangs = True
        await asyncio.sleep(40)
        pushing.set()
        await machine.until(updating)
        await updating
        await engine.resume()
        (task,) = begin(engine, ask("r"))
        await machine.until(task)
        assert versions(await task) == [2]

    serve(body)


def test_an_update_that_comes_during_a_revival_is_what_the_next_life_serves() -> None:
    async def body(machine: Machine, engine: ServerEngine) -> None:
        await sync_weights(engine, named(1))
        for moment in ("start", "halt", "half", "weight_version"):
            machine.stops.clear()
            stop = machine.stop_at(moment)
            machine.calls.clear()
            machine.server.die()
            while moment not in machine.calls:
                await asyncio.sleep(0.1)
            syncing = asyncio.create_task(sync_weights(engine, named(2)))
            await settled()
            stop.set()
            await syncing
            assert machine.server.halves == [2.0, 2.0]
            (task,) = begin(engine, ask(moment))
            await machine.until(task)
            assert versions(await task) == [2]
            await sync_weights(engine, named(1))

    serve(body, proves=True)


def test_a_cancelled_update_leaves_an_engine_that_a_whole_one_heals() -> None:
    async def body(machine: Machine, engine: ServerEngine) -> None:
        await engine.pause()
        pushing = machine.stop_at("half")
        updating = asyncio.create_task(engine.update_weights(named(2)))
        await settled()
        updating.cancel()
        with pytest.raises(asyncio.CancelledError):
            await updating
        pushing.set()
        with pytest.raises(WeightUpdateError, match="repeat it before resume"):
            await engine.resume()
        await engine.update_weights(named(2))
        await engine.resume()
        (task,) = begin(engine, ask("r"))
        await machine.until(task)
        assert_sampled(await task, PROMPT, count=6)

    serve(body)


# -- weights that the trainer no longer has


class Trainer:
    """Its tensors are valid until it `moves_on`."""

    def __init__(self) -> None:
        self.now = 0

    def export(self, version: int) -> WeightUpdate:
        mine = self.now
        return named(version, lambda: self.now == mine)

    def moves_on(self) -> None:
        self.now += 1


@pytest.mark.parametrize("moment", ["before", "in the middle"])
def test_a_server_that_can_not_have_its_weights_again_serves_nobody_until_the_next_update(moment: str) -> None:
    async def body(machine: Machine, engine: ServerEngine) -> None:
        trainer = Trainer()
        await sync_weights(engine, trainer.export(1))
        (task,) = begin(engine, ask("r"))
        await machine.step(2)
        pushing = machine.stop_at("half")
        machine.calls.clear()
        if moment == "before":
            trainer.moves_on()
        machine.server.die()
        if moment == "in the middle":
            while "half" not in machine.calls:
                await asyncio.sleep(0.1)
            trainer.moves_on()
        pushing.set()
        await asyncio.sleep(30)
        assert not task.done() and not machine.server.running
        assert (await engine.stats()).paused
        with pytest.raises(WeightUpdateError):
            await engine.resume()
        # A second death changes nothing.
        machine.server.die()
        await asyncio.sleep(30)
        await sync_weights(engine, trainer.export(2))
        await machine.until(task)
        assert_sampled(await task, PROMPT, count=6)
        assert versions(await task)[-1] == 2

    serve(body)


def test_an_update_does_not_wait_for_a_batch_that_waits_for_the_update() -> None:
    """The deterministic loop lands its weights when the next batch is complete; this one can't be without them."""

    class Pipeline:
        def __init__(self, batch: list[Any]) -> None:
            self.batch = batch

        async def next_is_complete(self) -> None:
            await asyncio.wait(self.batch)

    async def body(machine: Machine, engine: ServerEngine) -> None:
        trainer = Trainer()
        await sync_weights(engine, trainer.export(1))
        tasks = begin(engine, ask("r"), ask("s"))
        pipeline: Any = Pipeline(tasks)
        landing = asyncio.create_task(next_is_complete(pipeline, engine))
        await machine.until(*tasks)
        await landing  # as long as the engine serves, it is the batch that is waited for

        tasks = begin(engine, ask("r"), ask("s"))
        pipeline = Pipeline(tasks)
        await machine.step(2)
        trainer.moves_on()
        machine.server.die()
        await next_is_complete(pipeline, engine)
        await sync_weights(engine, trainer.export(2))
        await machine.until(*tasks)
        assert versions(await tasks[0])[-1] == 2

    serve(body)


def test_resume_during_a_revival_that_finds_no_weights_opens_nothing() -> None:
    """Else the model that a run begins with would answer in the name of the current one."""

    async def body(machine: Machine, engine: ServerEngine) -> None:
        trainer = Trainer()
        await sync_weights(engine, trainer.export(1))
        await engine.pause()
        machine.server.die()
        await settled()
        trainer.moves_on()
        with pytest.raises(WeightUpdateError):
            await engine.resume()
        (task,) = begin(engine, ask("r"))
        await machine.step(3)
        assert not machine.server.running
        await sync_weights(engine, trainer.export(2))
        await machine.until(task)
        assert versions(await task) == [2]

    serve(body)


def test_a_refused_update_before_a_death_does_not_end_the_engine() -> None:
    async def body(machine: Machine, engine: ServerEngine) -> None:
        await sync_weights(engine, named(1))
        await engine.pause()
        machine.refuse["push"] = [WeightUpdateError("model.norm.weight has another shape")] * 2
        with pytest.raises(WeightUpdateError, match="another shape"):
            await engine.update_weights(named(2))
        machine.server.die()
        await asyncio.sleep(30)
        with pytest.raises(WeightUpdateError):
            await engine.resume()
        await engine.update_weights(named(3))
        await engine.resume()
        (task,) = begin(engine, ask("r"))
        await machine.until(task)
        assert versions(await task) == [3]

    serve(body)


def test_a_server_that_refuses_the_current_weights_fails_aloud_where_nobody_would_give_it_others() -> None:
    """Requests wait for it, and the loop for them."""
    machine = Machine()

    async def whole() -> None:
        engine = engine_over(machine)
        await engine.start()
        await sync_weights(engine, named(1))
        (task,) = begin(engine, ask("r"))
        await machine.step(1)
        machine.refuse["push"] = [WeightUpdateError("no room for a bucket")]
        machine.server.die()
        with pytest.raises(EngineUnavailable, match="no room for a bucket"):
            await task
        await engine.close()

    run(whole())


# -- adapters


def test_an_adapter_that_is_refused_leaves_the_old_one_serving_and_reviving() -> None:
    async def body(machine: Machine, engine: ServerEngine) -> None:
        await sync_weights(engine, adapter(1))
        await engine.pause()
        machine.refuse["load_adapter"] = [RequestRejected("rank 64 is too much")]
        with pytest.raises(WeightUpdateError, match="rank 64"):
            await engine.update_weights(adapter(2))
        await engine.resume()
        (task,) = begin(engine, ask("r"))
        await machine.step(2)
        machine.server.die()
        await machine.until(task)
        assert_sampled(await task, PROMPT, count=6)
        assert versions(await task) == [1]

    serve(body)


@pytest.mark.parametrize("call", ["unload_adapter", "flush_cache", "set_weight_version"])
def test_an_adapter_that_is_half_changed_is_not_served(call: str) -> None:
    async def body(machine: Machine, engine: ServerEngine) -> None:
        await sync_weights(engine, adapter(1))
        await engine.pause()
        machine.refuse[call] = [WeightUpdateError("not now")]
        with pytest.raises(WeightUpdateError, match="not now"):
            await engine.update_weights(adapter(2))
        with pytest.raises(WeightUpdateError, match="repeat it"):
            await engine.resume()
        await engine.update_weights(adapter(2))
        await engine.resume()
        (task,) = begin(engine, ask("r"))
        await machine.until(task)
        assert_sampled(await task, PROMPT, count=6)
        assert len(machine.server.adapters) == 1, "no adapter stays behind"

    serve(body)


# -- pauses


@BOTH
def test_a_waiting_pause_brings_a_server_up_again_for_what_it_waits_for(keeps_versions: bool) -> None:
    async def body(machine: Machine, engine: ServerEngine) -> None:
        await sync_weights(engine, named(1))
        (begun,) = begin(engine, ask("r"))
        await machine.step(2)
        pausing = asyncio.create_task(engine.pause("wait"))
        await settled()
        (late,) = begin(engine, ask("late"))
        machine.server.die()
        await machine.until(begun, pausing)
        assert_sampled(await begun, PROMPT, count=6)
        assert not late.done()
        assert machine.server.is_paused
        await engine.resume()
        await machine.until(late)

    serve(body, Machine(keeps_versions=keeps_versions))


@BOTH
def test_a_waiting_pause_finishes_what_an_earlier_one_froze(keeps_versions: bool) -> None:
    async def body(machine: Machine, engine: ServerEngine) -> None:
        (task,) = begin(engine, ask("r"))
        await machine.step(2)
        await engine.pause()
        pausing = asyncio.create_task(engine.pause("wait"))
        await machine.until(task, pausing)
        assert_sampled(await task, PROMPT, count=6)
        assert (await engine.stats()).paused
        await engine.resume()

    serve(body, Machine(keeps_versions=keeps_versions))


def test_who_wanted_a_waiting_pause_may_go_away() -> None:
    async def body(machine: Machine, engine: ServerEngine) -> None:
        first, second = begin(engine, ask("r"), ask("s", count=12))
        await machine.step(2)
        pausing = asyncio.create_task(engine.pause("wait"))
        await settled()
        (late,) = begin(engine, ask("late"))
        pausing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pausing
        await machine.until(first, second, late)
        assert not (await engine.stats()).paused

    serve(body)


def test_an_aborting_pause_returns_what_has_begun_and_keeps_what_has_not() -> None:
    async def body(machine: Machine, engine: ServerEngine) -> None:
        (begun,) = begin(engine, ask("r"))
        await machine.step(2)
        (new,) = begin(engine, ask("s"))
        await settled()
        await engine.pause("abort")
        assert (await begun).finish_reason == "abort"
        assert_sampled(await begun, PROMPT, count=2)
        assert not new.done()
        await engine.resume()
        await machine.until(new)
        assert_sampled(await new, PROMPT, count=6)

    serve(body)


def test_a_server_that_does_not_end_what_it_is_asked_to_is_replaced() -> None:
    async def body(machine: Machine, engine: ServerEngine) -> None:
        (task,) = begin(engine, ask("r"))
        await machine.step(2)
        server = machine.server
        server.abort = lambda wire_ids: None  # type: ignore[method-assign]
        await engine.pause()
        assert server.died.is_set()
        await engine.resume()
        await machine.until(task)
        assert_sampled(await task, PROMPT, count=6)

    serve(body, Machine(keeps_versions=False))


# -- proofs


def test_what_wrong_weights_made_while_they_were_proved_reaches_nobody() -> None:
    async def body(machine: Machine, engine: ServerEngine) -> None:
        await sync_weights(engine, named(1))
        short, long = begin(engine, ask("short", count=4), ask("long", count=9))
        await machine.step(2)
        await engine.pause()
        await engine.update_weights(named(2))
        machine.server.halves = [5.0, 5.0]  # another model than the trainer's, whole
        scoring = machine.stop_at("score")
        resuming = asyncio.create_task(engine.resume())
        await machine.step(3)  # the server goes on meanwhile: the short one is done
        assert not short.done()
        scoring.set()
        with pytest.raises(WeightUpdateError, match="does not score as version 2"):
            await resuming
        assert machine.server.is_paused
        await engine.update_weights(named(2))
        await engine.resume()
        await machine.until(short, long)
        for task, count in ((short, 4), (long, 9)):
            assert_sampled(await task, PROMPT, count=count)
            assert versions(await task) == [1, 2]

    serve(body, proves=True)


def test_a_proof_that_fails_in_a_revival_ends_the_wait() -> None:
    machine = Machine()

    async def whole() -> None:
        engine = engine_over(machine, proves=True)
        await engine.start()
        await sync_weights(engine, named(1))
        (task,) = begin(engine, ask("r"))
        await machine.step(1)
        machine.refuse["score"] = [WeightUpdateError("it does not score as the trainer does")]
        await engine.pause()
        await engine.update_weights(named(2))
        machine.refuse.clear()
        await engine.resume()
        machine.refuse["score"] = [WeightUpdateError("it does not score as the trainer does")]
        machine.server.die()
        with pytest.raises(EngineUnavailable, match="does not score as the trainer does"):
            await task
        await engine.close()

    run(whole())


# -- sleep


def test_colocated_a_whole_turn_serves_the_new_weights() -> None:
    async def body(machine: Machine, engine: ServerEngine) -> None:
        turns = Turns(releases=("kv_cache", "weights"), make_room=lambda: None)
        for version in (1, 2):
            await turns.to_trainer(engine)
            assert machine.server.asleep == {"kv_cache", "weights"}
            await sync_weights(engine, named(version), turns=turns)
            (task,) = begin(engine, ask("r"))
            await machine.until(task)
            assert versions(await task) == [version]

    serve(body, proves=True)


@pytest.mark.parametrize("releases", [("kv_cache", "weights"), ("kv_cache",)])
@pytest.mark.parametrize("moment", ["as it falls asleep", "asleep", "as it wakes"])
def test_a_server_that_dies_asleep_is_started_when_it_is_needed(moment: str, releases: Any) -> None:
    """The trainer has the GPU until then."""

    async def body(machine: Machine, engine: ServerEngine) -> None:
        trainer = Trainer()
        await sync_weights(engine, trainer.export(1))
        turns = Turns(releases=releases, make_room=lambda: None)
        sleeping, waking = machine.stop_at("sleep"), machine.stop_at("wake")
        turn = asyncio.create_task(turns.to_trainer(engine))
        await settled()
        if moment == "as it falls asleep":
            machine.server.die()
        sleeping.set()
        await turn
        if moment == "asleep":
            machine.server.die()
        (late,) = begin(engine, ask("late"))
        trainer.moves_on()
        await asyncio.sleep(100)
        assert len(machine.servers) == 1, "nothing is started while the trainer works"
        assert (await engine.stats()).policy_version == 1
        syncing = asyncio.create_task(sync_weights(engine, trainer.export(2), turns=turns))
        await settled()
        if moment == "as it wakes":
            machine.server.die()
        waking.set()
        await machine.until(syncing, late)
        await syncing
        assert_sampled(await late, PROMPT, count=6)
        assert versions(await late) == [2]
        assert len(machine.servers) == 2

    serve(body, proves=True)


def test_weights_that_were_given_away_are_not_served_without_an_update() -> None:
    async def body(machine: Machine, engine: ServerEngine) -> None:
        await engine.sleep(("weights",))
        (task,) = begin(engine, ask("r"))
        await engine.wake(("weights",))
        await machine.step(2)
        assert not machine.server.running
        await sync_weights(engine, named(1))
        await machine.until(task)
        assert versions(await task) == [1]

    serve(body)


def test_a_sleep_that_is_refused_is_no_sleep() -> None:
    async def body(machine: Machine, engine: ServerEngine) -> None:
        machine.refuse["sleep"] = [RequestRejected("not built with a memory saver")]
        with pytest.raises(RequestRejected):
            await engine.sleep(("weights",))
        (task,) = begin(engine, ask("r"))
        await machine.until(task)
        await engine.pause()
        await engine.sleep(("weights",))
        with pytest.raises(WeightUpdateError, match="wake them first"):
            await engine.update_weights(named(1))
        await engine.wake(("weights",))
        await sync_weights(engine, named(1))

    serve(body)


# -- a server of others


@FORMS
def test_a_server_of_others_that_comes_back_is_given_the_current_weights(form: Any) -> None:
    async def body(machine: Machine, engine: ServerEngine) -> None:
        await sync_weights(engine, form(1))
        (task,) = begin(engine, ask("r"))
        await machine.step(2)
        machine.server.die()
        await asyncio.sleep(50)
        machine.start()  # somebody starts another one
        await machine.until(task)
        assert_sampled(await task, PROMPT, count=6)
        assert versions(await task) == [1]
        # It was away for us alone: what it had of us is taken away from it.
        (task,) = begin(engine, ask("s"))
        await machine.step(2)
        machine.server.hangs = True
        await asyncio.sleep(45)
        machine.server.hangs = False
        await machine.until(task)
        assert_sampled(await task, PROMPT, count=6)
        await sync_weights(engine, form(2))
        assert len(machine.server.adapters) == (1 if form is adapter else 0)

    serve(body, attached=True)


def test_a_server_of_others_that_stays_away_is_given_up() -> None:
    machine = Machine()

    async def whole() -> None:
        engine = engine_over(machine, attached=True)
        await engine.start()
        (task,) = begin(engine, ask("r"))
        await machine.step(1)
        machine.server.die()
        with pytest.raises(EngineUnavailable, match="did not come back within 100 s"):
            await task
        await engine.close()

    run(whole())


# -- behind a router


def test_a_router_goes_on_without_an_engine_that_failed_for_good() -> None:
    machines = [Machine(), Machine()]

    async def whole() -> None:
        engines = []
        for index, machine in enumerate(machines):
            machine.traits = type(machine.traits)(**{**vars(machine.traits), "name": f"scripted-{index}"})
            engines.append(engine_over(machine, max_restarts=0))
        router = RoutedEngine(engines, check_interval_s=5.0)
        await router.start()
        await sync_weights(router, named(1))
        tasks = [asyncio.create_task(router.generate(ask(f"{i}/0/0", (i,)))) for i in range(6)]
        await settled()
        machines[0].server.die()
        for _ in itertools.takewhile(lambda _: not all(t.done() for t in tasks), range(200)):
            for machine in machines:
                await machine.step()
            await asyncio.sleep(0.1)
        for i, task in enumerate(tasks):
            assert_sampled(await task, (i,), count=6)
        await sync_weights(router, named(2))
        await asyncio.sleep(30)
        assert list(router.out_of_rotation) == ["scripted-0"]
        await router.close()

    run(whole())


def test_no_wait_of_this_engine_outlives_its_server(caplog: pytest.LogCaptureFixture) -> None:
    """A watch that breaks itself ends the engine aloud: nobody would notice the next death."""
    machine = Machine()

    async def whole() -> None:
        engine = engine_over(machine)

        async def broken(**_: Any) -> str:
            await asyncio.sleep(1)
            raise OSError("too many open files")

        engine._lifeline._process.watch = broken  # type: ignore[union-attr, method-assign]
        await engine.start()
        await engine.pause()
        (task,) = begin(engine, ask("r"))
        with caplog.at_level(logging.ERROR), pytest.raises(EngineUnavailable, match="too many open files"):
            await task
        assert "is lost" in caplog.text
        await engine.close()

    run(whole())
