"""Requests on their way to a server and back, in every order that an event loop can give: scripted.py."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from skyrl_train.engines.server.client import ServerBusy
from skyrl_train.engines.server.engine import ServerEngine
from skyrl_train.errors import EngineUnavailable, RequestRejected
from skyrl_train.types import Completion, LogitProcessor, SamplingParams, SessionRef
from tests.engines.server.scripted import (
    END,
    Machine,
    adapter,
    ask,
    assert_sampled,
    engine_over,
    named,
    next_token,
    run,
    settled,
)

PROMPT = (1, 2, 3)
Body = Callable[[Machine, ServerEngine], Coroutine[Any, Any, None]]


def serve(body: Body, machine: Machine | None = None, **options: Any) -> None:
    """`body` with a started engine, which is closed afterwards."""

    async def whole() -> None:
        there = machine or Machine()
        engine = engine_over(there, **options)
        await engine.start()
        try:
            await body(there, engine)
            await settled()
            assert (await engine.stats()).num_waiting == 0
            assert (await engine.stats()).num_running == 0
        finally:
            await engine.close()

    run(whole())


def begin(engine: ServerEngine, *requests: Any) -> list[asyncio.Task[Completion]]:
    return [asyncio.create_task(engine.generate(request)) for request in requests]


def test_an_answer_is_what_the_model_says() -> None:
    async def body(machine: Machine, engine: ServerEngine) -> None:
        (task,) = begin(engine, ask("r"))
        await machine.step(6)
        answer = await task
        assert_sampled(answer, PROMPT, count=6)
        assert answer.finish_reason == "length"

    serve(body)


@pytest.mark.parametrize("keeps_versions", [True, False])
def test_a_pause_meets_a_request_that_has_not_arrived_yet(keeps_versions: bool) -> None:
    async def body(machine: Machine, engine: ServerEngine) -> None:
        machine.request_turns = 8
        (task,) = begin(engine, ask("r"))
        await asyncio.sleep(0)  # sent, not there
        await engine.pause()
        await engine.update_weights(named(1))
        await engine.resume()
        await machine.until(task)
        answer = await task
        assert_sampled(answer, PROMPT, count=6)
        assert [span.version for span in answer.versions] == [1]

    serve(body, Machine(keeps_versions=keeps_versions))


@pytest.mark.parametrize("keeps_versions", [True, False])
def test_what_runs_over_an_update_goes_on_from_what_it_has(keeps_versions: bool) -> None:
    async def body(machine: Machine, engine: ServerEngine) -> None:
        (task,) = begin(engine, ask("r"))
        await machine.step(2)
        await engine.pause()
        await engine.update_weights(named(1))
        await engine.resume()
        await machine.until(task)
        answer = await task
        assert_sampled(answer, PROMPT, count=6)
        assert [(span.version, span.start, span.end) for span in answer.versions] == [(0, 0, 2), (1, 2, 6)]
        # Held, it was sent once; ended and sent again, its first part stands once in the counts.
        assert (await engine.stats()).num_generated_tokens_total == 6

    serve(body, Machine(keeps_versions=keeps_versions))


def test_an_abort_that_races_with_the_end_gives_the_end() -> None:
    async def body(machine: Machine, engine: ServerEngine) -> None:
        (task,) = begin(engine, ask("r", count=2))
        await machine.step(1)
        machine.server.step()  # the answer is on its way back
        await engine.abort(["r"])
        answer = await task
        assert (answer.finish_reason, len(answer.token_ids)) == ("length", 2)

    serve(body)


def test_an_abort_before_the_request_arrives_is_repeated_until_it_has() -> None:
    async def body(machine: Machine, engine: ServerEngine) -> None:
        machine.request_turns = 20
        (task,) = begin(engine, ask("r"))
        await asyncio.sleep(0)
        await engine.abort(["r"])
        answer = await task
        assert (answer.finish_reason, answer.token_ids) == ("abort", ())
        assert machine.calls.count("abort") > 1

    serve(body)


def test_an_aborted_answer_with_its_whole_budget_is_complete() -> None:
    """A server may sample the last token in the very step that ends the request: nothing is left to go on with."""

    async def body(machine: Machine, engine: ServerEngine) -> None:
        (task,) = begin(engine, ask("r", count=3))
        await machine.step(2)
        request = next(iter(machine.server.running.values()))
        request.token_ids.append(next_token(0, (*PROMPT, *request.token_ids)))
        request.versions.append("0")
        await engine.abort(["r"])
        answer = await task
        assert answer.finish_reason == "length"
        assert_sampled(answer, PROMPT, count=3)

    serve(body)


@pytest.mark.parametrize("why", ["caller", "pause"])
def test_an_aborted_answer_that_ends_with_the_end_token_is_complete(why: str) -> None:
    """SGLang looks for an abort before it looks for the end: to go on would write behind the end."""

    async def body(machine: Machine, engine: ServerEngine) -> None:
        (task,) = begin(engine, ask("r"))
        await machine.step(2)
        request = next(iter(machine.server.running.values()))
        request.token_ids += [END, 5]  # a speculating server accepts some tokens more
        request.versions += ["0", "0"]
        if why == "caller":
            await engine.abort(["r"])
        else:
            await engine.pause("abort")
        answer = await task
        assert (answer.finish_reason, answer.stop_reason) == ("stop", None)
        assert answer.token_ids[2:] == (END,)
        assert [(span.start, span.end) for span in answer.versions] == [(0, 3)]

    serve(body)


def test_an_end_token_that_is_to_be_ignored_ends_nothing() -> None:
    async def body(machine: Machine, engine: ServerEngine) -> None:
        (task,) = begin(engine, ask("r", sampling=SamplingParams(max_new_tokens=9, ignore_eos=True)))
        await machine.step(1)
        request = next(iter(machine.server.running.values()))
        request.token_ids.append(END)
        request.versions.append("0")
        await engine.abort(["r"])
        answer = await task
        assert (answer.finish_reason, answer.token_ids[-1]) == ("abort", END)

    serve(body)


def test_cancelled_at_the_gate_a_request_leaves_nothing_behind() -> None:
    async def body(machine: Machine, engine: ServerEngine) -> None:
        await engine.pause()
        session = await engine.open_session(50)
        tasks = begin(engine, ask("r"), ask("s", session=SessionRef(session_id=session)))
        await settled()
        assert (await engine.stats()).num_waiting == 2
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (await engine.stats()).num_waiting == 0
        await engine.resume()
        # Its room is free again, and its name.
        (task,) = begin(engine, ask("s", count=47, session=SessionRef(session_id=session)))
        await machine.until(task)
        assert_sampled(await task, PROMPT, count=47)
        await engine.close_session(session)

    serve(body)


def test_cancelled_in_the_server_a_request_is_ended_there() -> None:
    async def body(machine: Machine, engine: ServerEngine) -> None:
        (task,) = begin(engine, ask("r"))
        await machine.step(2)
        task.cancel()
        await settled()
        assert not machine.server.running and not machine.server.arriving

    serve(body)


def test_aborted_at_the_gate_a_request_returns_what_it_has() -> None:
    async def body(machine: Machine, engine: ServerEngine) -> None:
        (task,) = begin(engine, ask("r"))
        await machine.step(2)
        await engine.pause()  # it is ended, and waits
        await engine.abort(["r"])
        answer = await task
        assert answer.finish_reason == "abort"
        assert_sampled(answer, PROMPT, count=2)

    serve(body, Machine(keeps_versions=False))


def test_a_full_server_is_asked_again() -> None:
    async def body(machine: Machine, engine: ServerEngine) -> None:
        machine.refuse["generate"] = [ServerBusy("full")] * 4
        (task,) = begin(engine, ask("r"))
        await machine.until(task)
        assert_sampled(await task, PROMPT, count=6)

    serve(body)


def test_one_broken_connection_is_no_death() -> None:
    async def body(machine: Machine, engine: ServerEngine) -> None:
        machine.refuse["generate"] = [EngineUnavailable("one connection broke")]
        (task,) = begin(engine, ask("r"))
        await machine.until(task)
        assert_sampled(await task, PROMPT, count=6)
        assert len(machine.servers) == 1

    serve(body)


def test_a_request_that_breaks_in_a_healthy_server_again_and_again_is_given_up() -> None:
    async def body(machine: Machine, engine: ServerEngine) -> None:
        machine.refuse["generate"] = [EngineUnavailable("500: no such kernel")] * 100
        with pytest.raises(EngineUnavailable, match=r"20 attempts at request r broke.*no such kernel"):
            await engine.generate(ask("r"))

    serve(body)


def test_a_server_that_ends_a_request_of_its_own_accord_is_asked_again_and_not_for_ever() -> None:
    async def body(machine: Machine, engine: ServerEngine) -> None:
        (task,) = begin(engine, ask("r"))
        await machine.step(2)
        machine.server.abort(list(machine.server.running))
        await machine.until(task)
        assert_sampled(await task, PROMPT, count=6)

        (task,) = begin(engine, ask("s"))
        while not task.done():
            await settled()
            machine.server.abort(list(machine.server.running))
            await asyncio.sleep(0.01)
        with pytest.raises(EngineUnavailable, match="ended without a token"):
            await task

    serve(body)


def test_a_request_of_a_known_name_is_refused_while_the_first_runs() -> None:
    async def body(machine: Machine, engine: ServerEngine) -> None:
        (task,) = begin(engine, ask("r"))
        await settled()
        with pytest.raises(RequestRejected, match="running request of this id"):
            await engine.generate(ask("r"))
        await machine.until(task)

    serve(body)


def test_a_logit_processor_is_refused_for_it_would_have_to_travel_as_code() -> None:
    async def body(machine: Machine, engine: ServerEngine) -> None:
        sampling = SamplingParams(max_new_tokens=3, logit_processor=LogitProcessor(path="my.function"))
        with pytest.raises(
            RequestRejected, match=r"r: engine .* runs no logit processors .*\(my.function\); the embedded"
        ):
            await engine.generate(ask("r", sampling=sampling))

    serve(body)


# -- sessions


def test_two_first_requests_of_a_session_open_it_once_and_both_wait_for_that() -> None:
    async def body(machine: Machine, engine: ServerEngine) -> None:
        session = SessionRef(session_id=await engine.open_session(100))
        opening = machine.stop_at("open_session")
        tasks = begin(engine, ask("a", (1,), session=session), ask("b", (2,), session=session))
        await settled()
        assert not machine.server.running
        opening.set()
        await machine.until(*tasks)
        assert_sampled(await tasks[0], (1,), count=6)
        assert_sampled(await tasks[1], (2,), count=6)
        assert machine.calls.count("open_session") == 1
        await engine.close_session(session.session_id)
        assert not machine.server.sessions

    serve(body)


def test_a_session_whose_opener_goes_away_is_open_for_the_next_and_closed_in_the_end() -> None:
    async def body(machine: Machine, engine: ServerEngine) -> None:
        session = SessionRef(session_id=await engine.open_session(100))
        opening = machine.stop_at("open_session")
        first, second = begin(engine, ask("a", session=session), ask("b", session=session))
        await settled()
        first.cancel()
        opening.set()
        await machine.until(second)
        assert_sampled(await second, PROMPT, count=6)
        await engine.close_session(session.session_id)
        assert not machine.server.sessions

    serve(body)


def test_a_session_that_is_closed_while_it_is_opened_does_not_stay_in_the_server() -> None:
    async def body(machine: Machine, engine: ServerEngine) -> None:
        session = SessionRef(session_id=await engine.open_session(100))
        opening = machine.stop_at("open_session")
        (task,) = begin(engine, ask("a", session=session))
        await settled()
        closing = asyncio.create_task(engine.close_session(session.session_id))
        await settled()
        opening.set()
        await machine.until(task, closing)
        assert (await task).finish_reason == "abort"
        assert not machine.server.sessions
        assert (await engine.stats()).num_sessions == 0

    serve(body)


def test_an_opening_whose_answer_was_lost_is_made_good() -> None:
    """Nobody knows whether the server has it: it is closed before it is opened again."""

    async def body(machine: Machine, engine: ServerEngine) -> None:
        session = SessionRef(session_id=await engine.open_session(100))
        machine.refuse["open_session"] = [EngineUnavailable("the answer was lost")]
        (task,) = begin(engine, ask("a", session=session))
        while not machine.server.sessions and "close_session" not in machine.calls:
            await asyncio.sleep(0.01)
        await machine.until(task)
        assert_sampled(await task, PROMPT, count=6)
        assert machine.calls.index("close_session") < len(machine.calls) - machine.calls[::-1].index("open_session")
        await engine.close_session(session.session_id)
        assert not machine.server.sessions

    serve(body)


def test_a_cleared_session_is_closed_before_it_is_opened_again() -> None:
    async def body(machine: Machine, engine: ServerEngine) -> None:
        session = SessionRef(session_id=await engine.open_session(100))
        for name in ("a", "b"):
            (task,) = begin(engine, ask(name, session=session))
            await machine.until(task)
            assert_sampled(await task, PROMPT, count=6)
            await engine.clear_session(session.session_id)
            assert not machine.server.sessions
        await engine.close_session(session.session_id)

    serve(body)


def test_a_turn_goes_on_after_its_parent_in_the_server_and_in_the_next_life() -> None:
    async def body(machine: Machine, engine: ServerEngine) -> None:
        session = await engine.open_session(100)
        (task,) = begin(engine, ask("a", session=SessionRef(session_id=session)))
        await machine.until(task)
        history = PROMPT + (await task).token_ids
        at = SessionRef(session_id=session, parent_request_id="a")
        (task,) = begin(engine, ask("b", (7,), session=at))
        await settled()
        (request,) = machine.server.running.values()
        assert request.attempt.token_ids == (7,), "only what is new is sent"
        await machine.step(3)
        machine.server.die()
        await machine.until(task)
        assert_sampled(await task, (*history, 7), count=6)
        (task,) = begin(engine, ask("c", (8,), session=at))
        await machine.until(task)
        assert_sampled(await task, (*history, 8), count=6)
        await engine.close_session(session)
        assert not machine.server.sessions

    serve(body)


def test_sessions_in_a_server_of_others_that_was_away_for_a_moment_are_closed_there() -> None:
    async def body(machine: Machine, engine: ServerEngine) -> None:
        kept, closed = await engine.open_session(100), await engine.open_session(100)
        tasks = begin(
            engine,
            ask("a", session=SessionRef(session_id=kept)),
            ask("b", (5,), session=SessionRef(session_id=closed)),
        )
        await machine.step(1)
        assert len(machine.server.sessions) == 2
        machine.server.hangs = True  # for the network: it goes on, and knows of nothing
        await asyncio.sleep(45)
        machine.server.hangs = False
        await machine.until(*tasks)
        assert_sampled(await tasks[0], PROMPT, count=6)
        assert_sampled(await tasks[1], (5,), count=6)
        await engine.close_session(closed)
        assert len(machine.server.sessions) == 1
        await engine.close_session(kept)
        assert not machine.server.sessions

    serve(body, attached=True)


def test_an_engine_that_is_closed_leaves_no_session_in_a_server_of_others() -> None:
    machine = Machine()

    async def body(machine: Machine, engine: ServerEngine) -> None:
        session = SessionRef(session_id=await engine.open_session(100))
        (task,) = begin(engine, ask("a", session=session))
        await machine.until(task)
        assert machine.server.sessions

    serve(body, machine, attached=True)
    assert not machine.server.sessions


def test_tables_shrink_again() -> None:
    """A run has many steps: what is remembered is what is open."""

    async def body(machine: Machine, engine: ServerEngine) -> None:
        traffic: Any = engine._traffic
        for step in range(30):
            session = SessionRef(session_id=await engine.open_session(100))
            tasks = begin(engine, *(ask(f"{step}/{i}", (i,), count=2, session=session) for i in range(3)))
            if step % 10 == 5:
                await machine.step(1)
                machine.server.die()
            await machine.until(*tasks)
            await engine.close_session(session.session_id)
            await engine.pause()
            await engine.update_weights(adapter(step))
            await engine.resume()
        assert not traffic._flights and not len(traffic.book)
        native = traffic._native
        assert not native._open and not native._closing and not native._unclosed
        weights: Any = engine._weights
        assert len(weights._loaded) == 1 and not weights._left
        assert len(machine.server.adapters) == 1

    serve(body, max_restarts=10)
