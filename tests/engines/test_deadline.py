"""Requests whose time is over, on every kind of engine; the clock is the test's."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from skyrl_train.engines.embedded import EmbeddedConfig, EmbeddedEngine
from skyrl_train.engines.router import RoutedEngine
from skyrl_train.errors import EngineUnavailable
from skyrl_train.types import DEADLINE, Completion, GenerateRequest, SamplingParams
from tests.engines.server.scripted import Machine, VirtualLoop, ask, assert_sampled, engine_over, run, settled
from tests.tiny import make_model, make_tokenizer

SETTINGS = EmbeddedConfig(max_num_seqs=2, max_num_batched_tokens=16, kv_cache_tokens=256, max_context_len=128)


def timed(name: str, deadline_s: float | None, *, max_new: int = 100) -> GenerateRequest:
    sampling = SamplingParams(max_new_tokens=max_new, ignore_eos=True, seed=1)
    return GenerateRequest(request_id=name, prompt_token_ids=(1, 2, 3), sampling=sampling, deadline_s=deadline_s)


def pass_time(seconds: float) -> None:
    """While nobody waits: an engine that computes takes no time of this clock."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    loop._clock.now += seconds


def with_embedded(body: Callable[[EmbeddedEngine], Awaitable[None]]) -> None:
    async def whole() -> None:
        engine = EmbeddedEngine(make_model(num_hidden_layers=1), make_tokenizer(), config=SETTINGS)
        try:
            await body(engine)
            engine.core.check_integrity()
            assert (await engine.stats()).num_running == (await engine.stats()).num_waiting == 0
        finally:
            await engine.close()

    run(whole())


def test_a_request_ends_with_what_it_has_when_its_time_is_over() -> None:
    async def body(engine: EmbeddedEngine) -> None:
        whole = await engine.generate(timed("whole", None))
        late = asyncio.create_task(engine.generate(timed("late", 5.0)))
        other = asyncio.create_task(engine.generate(timed("other", 500.0)))
        while not engine.core.stats().num_generated_tokens_total > 110:
            await asyncio.sleep(0)
        pass_time(4.0)
        await asyncio.sleep(0)
        assert not late.done()
        pass_time(1.0)
        answer = await late
        assert (answer.finish_reason, answer.stop_reason) == ("abort", DEADLINE)
        assert 0 < len(answer.token_ids) < 30
        assert answer.token_ids == whole.token_ids[: len(answer.token_ids)]
        assert (await other).token_ids == whole.token_ids

    with_embedded(body)


def test_requests_that_wait_and_requests_at_a_paused_engine_end_too() -> None:
    async def body(engine: EmbeddedEngine) -> None:
        running = [asyncio.create_task(engine.generate(timed(f"r{i}", None))) for i in range(2)]
        waiting = asyncio.create_task(engine.generate(timed("waiting", 3.0)))
        await asyncio.sleep(0)
        pass_time(3.0)
        answer = await waiting
        assert (answer.token_ids, answer.finish_reason, answer.stop_reason) == ((), "abort", DEADLINE)
        assert not any(task.done() for task in running)
        await asyncio.gather(*running)
        await engine.pause()
        answer = await engine.generate(timed("paused", 7.0))
        assert (answer.token_ids, answer.stop_reason) == ((), DEADLINE)
        await engine.resume()

    with_embedded(body)


def test_an_answer_in_time_and_one_that_was_aborted_are_as_without_a_deadline() -> None:
    async def body(engine: EmbeddedEngine) -> None:
        answer = await engine.generate(timed("r", 9.0, max_new=5))
        assert (answer.finish_reason, answer.stop_reason, len(answer.token_ids)) == ("length", None, 5)
        task = asyncio.create_task(engine.generate(timed("a", 9.0)))
        await asyncio.sleep(0)
        await engine.abort(["a"])
        assert ((await task).finish_reason, (await task).stop_reason) == ("abort", None)
        # Its timer is gone with it: another request of that name is nobody's business.
        again = asyncio.create_task(engine.generate(timed("a", None)))
        await asyncio.sleep(0)
        pass_time(20.0)
        assert (await again).finish_reason == "length"

    with_embedded(body)


def test_a_stream_ends_in_time_with_the_whole_answer_last() -> None:
    async def body(engine: EmbeddedEngine) -> None:
        token_ids: list[int] = []
        last: Completion | None = None
        async for piece in engine.stream(timed("s", 2.0)):
            token_ids += piece.token_ids
            last = piece.completion
            if len(token_ids) == 4:
                pass_time(2.0)
        assert last is not None and last.token_ids == tuple(token_ids)
        assert (last.finish_reason, last.stop_reason) == ("abort", DEADLINE)

    with_embedded(body)


def test_a_cancelled_caller_leaves_no_timer() -> None:
    async def body(engine: EmbeddedEngine) -> None:
        task = asyncio.create_task(engine.generate(timed("r", 3.0)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        pass_time(5.0)
        assert (await engine.generate(timed("r", None, max_new=3))).finish_reason == "length"

    with_embedded(body)


@pytest.mark.parametrize("is_paused", [False, True])
def test_a_servers_request_ends_in_time_in_the_server_and_at_the_gate(is_paused: bool) -> None:
    async def body() -> None:
        machine = Machine(keeps_versions=False)
        engine = engine_over(machine)
        await engine.start()
        task = asyncio.create_task(engine.generate(ask("r", deadline_s=5.0)))
        await machine.step(2)
        if is_paused:
            await engine.pause()
        await asyncio.sleep(4.9)
        assert not task.done()
        await asyncio.sleep(0.2)
        await settled()
        answer = await task
        assert (answer.finish_reason, answer.stop_reason) == ("abort", DEADLINE)
        assert_sampled(answer, (1, 2, 3), count=2)
        await engine.close()

    run(body())


def test_a_routed_requests_time_goes_on_while_it_moves_to_another_engine() -> None:
    class Lost:
        """An engine that is gone after three seconds."""

        def __init__(self, engine: EmbeddedEngine) -> None:
            self.engine = engine
            self.info = engine.info

        async def generate(self, request: GenerateRequest) -> Completion:
            await asyncio.sleep(3.0)
            raise EngineUnavailable("gone")

        def __getattr__(self, name: str) -> object:
            return getattr(self.engine, name)

    async def body() -> None:
        model = make_model(num_hidden_layers=1)
        engines = [EmbeddedEngine(model, make_tokenizer(), config=SETTINGS, name=f"e{i}") for i in range(2)]
        await engines[1].pause()
        router = RoutedEngine([Lost(engines[0]), engines[1]])  # type: ignore[list-item]
        started = asyncio.get_running_loop().time()
        answer = await router.generate(timed("r", 5.0))
        assert asyncio.get_running_loop().time() - started == pytest.approx(5.0)
        assert (answer.finish_reason, answer.stop_reason) == ("abort", DEADLINE)
        await router.close()

    run(body())


@pytest.mark.parametrize("deadline_s", [0.0, -1.0, float("nan")])
def test_a_deadline_that_is_no_time_is_refused(deadline_s: float) -> None:
    with pytest.raises(ValueError, match="deadline_s must be over 0"):
        timed("r", deadline_s)
