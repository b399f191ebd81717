from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import AsyncIterator
from typing import Any

import pytest
import torch

from skyrl_train.engines.base import Engine
from skyrl_train.engines.embedded import EmbeddedConfig, EmbeddedEngine
from skyrl_train.errors import EngineUnavailable, RequestRejected, WeightUpdateError
from skyrl_train.types import Completion, GenerateRequest, LocalWeights, SessionRef, WeightUpdate
from tests.engines.embedded.common import make_core, random_prompts, request, run
from tests.tiny import make_model, make_tokenizer

DRIVERS = ("inline", "thread")
SETTINGS = EmbeddedConfig(max_num_seqs=4, max_num_batched_tokens=16, kv_cache_tokens=256, max_context_len=128)


@pytest.fixture(params=DRIVERS)
async def engine(request: pytest.FixtureRequest) -> AsyncIterator[EmbeddedEngine]:
    made = make_engine(driver=request.param)
    yield made
    await made.close()


def make_engine(model: Any = None, config: EmbeddedConfig = SETTINGS, **options: Any) -> EmbeddedEngine:
    model = model if model is not None else make_model()
    return EmbeddedEngine(model, make_tokenizer(), config=config, **options)


def sampled(name: str, prompt: tuple[int, ...], max_new: int = 12) -> GenerateRequest:
    return request(name, prompt, max_new, temperature=1.0, seed=hash(prompt) % 1000, ignore_eos=True)


async def until(condition: Any) -> None:
    """Wait for what the engine will do soon; the test's own timeout is the deadline."""
    while not condition():
        await asyncio.sleep(0.001)


async def test_it_is_an_engine(engine: EmbeddedEngine) -> None:
    as_engine: Engine = engine
    assert as_engine.info.max_context_len == 128
    assert as_engine.info.logprob_space == "temperature"
    assert "lora" not in as_engine.info.capabilities
    assert (await as_engine.stats()).num_running == 0


async def test_both_drivers_give_the_answers_of_the_core(engine: EmbeddedEngine) -> None:
    requests = [sampled(str(i), prompt) for i, prompt in enumerate(random_prompts(5, 30, 12, 3, 22, 9))]
    answers = await asyncio.gather(*(engine.generate(item) for item in requests))
    assert [a.token_ids for a in answers] == [a.token_ids for a in run(make_core(), requests)]
    assert (await engine.stats()).num_generated_tokens_total == 6 * 12


async def test_the_inline_driver_repeats_a_run_to_the_bit() -> None:
    async def once() -> list[Completion]:
        engine = make_engine()

        async def chain(i: int, prompt: tuple[int, ...]) -> list[Completion]:
            answers = []
            for turn in range(3):  # callers that come back, as rollouts with several turns do
                answers.append(await engine.generate(request(f"{i}.{turn}", prompt, 4 + i, temperature=1.0)))
                prompt = (*prompt, *answers[-1].token_ids, turn)
            return answers

        chains = await asyncio.gather(*(chain(i, p) for i, p in enumerate(random_prompts(5, 17, 9, 2, 26, 7))))
        await engine.close()
        return [answer for answers in chains for answer in answers]

    assert await once() == await once()


async def test_a_cancelled_caller_aborts_its_request_and_nobody_elses(engine: EmbeddedEngine) -> None:
    prompts = random_prompts(6, 6, 6)
    tasks = [asyncio.create_task(engine.generate(sampled(str(i), p, 100))) for i, p in enumerate(prompts)]
    while (await engine.stats()).num_generated_tokens_total < 6:
        await asyncio.sleep(0)
    tasks[1].cancel()
    with pytest.raises(asyncio.CancelledError):
        await tasks[1]
    answers = await asyncio.gather(tasks[0], tasks[2])
    assert [len(answer.token_ids) for answer in answers] == [100, 100]
    stats = await engine.stats()
    assert stats.num_running == 0 and stats.num_generated_tokens_total < 300
    engine.core.check_integrity()


async def test_abort_returns_the_partial_answer_to_the_caller(engine: EmbeddedEngine) -> None:
    (prompt,) = random_prompts(6)
    task = asyncio.create_task(engine.generate(sampled("a", prompt, 100)))
    while (await engine.stats()).num_generated_tokens_total < 3:
        await asyncio.sleep(0)
    await engine.abort(["a", "unknown"])
    answer = await task
    assert answer.finish_reason == "abort" and 3 <= len(answer.token_ids) < 100


async def test_requests_wait_while_paused_and_go_on_after_resume(engine: EmbeddedEngine) -> None:
    (prompt,) = random_prompts(6)
    expected = run(make_core(), [sampled("a", prompt, 40)])[0].token_ids
    running = asyncio.create_task(engine.generate(sampled("a", prompt, 40)))
    while (await engine.stats()).num_generated_tokens_total < 3:
        await asyncio.sleep(0)
    await engine.pause("keep")
    late = asyncio.create_task(engine.generate(sampled("b", prompt, 3)))
    before = await engine.stats()
    for _ in range(20):
        await asyncio.sleep(0.001)
    after = await engine.stats()
    assert after.paused and after.num_steps_total == before.num_steps_total
    assert not running.done() and not late.done()
    await engine.resume()
    assert (await running).token_ids == expected
    assert len((await late).token_ids) == 3


async def test_pause_wait_returns_when_the_running_requests_are_done(engine: EmbeddedEngine) -> None:
    prompts = random_prompts(6, 7, 8, 9, 10)
    tasks = [asyncio.create_task(engine.generate(sampled(str(i), p, 20))) for i, p in enumerate(prompts)]
    while (await engine.stats()).num_generated_tokens_total < 8:
        await asyncio.sleep(0)
    await engine.pause("wait")
    stats = await engine.stats()
    assert stats.num_running == 0 and stats.paused
    assert [task.done() for task in tasks] == [True] * 4 + [False]  # the fifth had no seat yet
    await engine.resume()
    assert len((await tasks[4]).token_ids) == 20


@pytest.mark.parametrize("end", ["abort", "cancel", "pause", "resume"])
async def test_pause_wait_returns_when_what_it_waits_for_ends_otherwise(engine: EmbeddedEngine, end: str) -> None:
    (prompt,) = random_prompts(6)
    task = asyncio.create_task(engine.generate(sampled("a", prompt, 100)))
    while (await engine.stats()).num_generated_tokens_total < 3:
        await asyncio.sleep(0)
    pause = asyncio.create_task(engine.pause("wait"))
    await asyncio.sleep(0)
    if end == "abort":
        await engine.abort(["a"])
    elif end == "cancel":
        task.cancel()
    elif end == "pause":
        await engine.pause("abort")
    else:
        await engine.resume()
        await engine.abort(["a"])
    await asyncio.wait_for(pause, 20)
    assert (await engine.stats()).paused == (end != "resume")
    await asyncio.gather(task, return_exceptions=True)


async def test_pause_abort_ends_what_runs_and_keeps_what_waits(engine: EmbeddedEngine) -> None:
    prompts = random_prompts(6, 7, 8, 9, 10)
    tasks = [asyncio.create_task(engine.generate(sampled(str(i), p, 50))) for i, p in enumerate(prompts)]
    while (await engine.stats()).num_generated_tokens_total < 8:
        await asyncio.sleep(0)
    await engine.pause("abort")
    answers = await asyncio.gather(*tasks[:4])
    assert {answer.finish_reason for answer in answers} == {"abort"}
    await engine.resume()
    assert (await tasks[4]).finish_reason == "length"


async def test_a_pause_whose_caller_gives_up_does_not_come(engine: EmbeddedEngine) -> None:
    (prompt,) = random_prompts(6)
    task = asyncio.create_task(engine.generate(sampled("a", prompt, 100)))
    while (await engine.stats()).num_generated_tokens_total < 3:
        await asyncio.sleep(0)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(engine.pause("wait"), 0)
    await task
    assert not (await engine.stats()).paused


async def test_weights_are_updated_under_pause(engine: EmbeddedEngine) -> None:
    with pytest.raises(WeightUpdateError, match="paused"):
        await engine.update_weights(WeightUpdate(version=1, source=LocalWeights()))
    await engine.pause()
    await engine.update_weights(WeightUpdate(version=1, source=LocalWeights()))
    await engine.resume()
    answer = await engine.generate(sampled("a", (1, 2, 3), 4))
    assert [span.version for span in answer.versions] == [1]
    assert (await engine.stats()).policy_version == 1


@pytest.mark.parametrize("driver", DRIVERS)
async def test_a_step_that_raises_fails_every_request_and_closes_the_engine(driver: Any) -> None:
    model = make_model()
    engine = make_engine(model, driver=driver)
    prompts = random_prompts(5, 6, 7)
    tasks = [asyncio.create_task(engine.generate(sampled(str(i), p, 50))) for i, p in enumerate(prompts)]
    while (await engine.stats()).num_generated_tokens_total < 3:
        await asyncio.sleep(0)
    await engine.pause()
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan  # a policy that has diverged
    await engine.resume()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    for result in results:
        assert isinstance(result, EngineUnavailable) and isinstance(result.__cause__, FloatingPointError)
    assert len({id(result) for result in results}) == 3
    with pytest.raises(EngineUnavailable, match="failed: the model's logits"):
        await engine.generate(sampled("late", (1, 2)))
    with pytest.raises(EngineUnavailable):
        await engine.resume()
    await engine.close()


async def test_close_fails_open_requests_and_later_ones(engine: EmbeddedEngine) -> None:
    task = asyncio.create_task(engine.generate(sampled("a", (1, 2, 3), 100)))
    while (await engine.stats()).num_generated_tokens_total < 2:
        await asyncio.sleep(0)
    await engine.close()
    with pytest.raises(EngineUnavailable, match="was closed"):
        await task
    with pytest.raises(EngineUnavailable, match="is closed"):
        await engine.generate(sampled("b", (1, 2, 3)))
    await engine.close()


async def test_a_rejected_request_does_not_disturb_the_others(engine: EmbeddedEngine) -> None:
    good = asyncio.create_task(engine.generate(sampled("a", (1, 2, 3), 10)))
    with pytest.raises(RequestRejected, match="need 210 tokens"):
        await engine.generate(sampled("long", (1,) * 110, 100))
    assert len((await good).token_ids) == 10


async def test_a_stream_gives_the_tokens_as_they_come_and_the_completion_last(engine: EmbeddedEngine) -> None:
    item = sampled("a", (1, 2, 3), 9)
    pieces = [piece async for piece in engine.stream(item)]
    (expected,) = run(make_core(), [item])
    assert tuple(token for piece in pieces for token in piece.token_ids) == expected.token_ids
    assert tuple(logprob for piece in pieces for logprob in piece.logprobs) == pytest.approx(
        expected.logprobs, abs=1e-6
    )
    assert [piece.completion for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].completion is not None and pieces[-1].completion.token_ids == expected.token_ids


async def test_a_stream_that_is_left_aborts_its_request(engine: EmbeddedEngine) -> None:
    async with contextlib.aclosing(engine.stream(sampled("a", (1, 2, 3), 100))) as pieces:
        async for _ in pieces:
            break
    stats = await engine.stats()
    assert stats.num_running == 0 and stats.num_generated_tokens_total < 100


async def test_what_the_engine_cannot_do_is_refused_by_type(engine: EmbeddedEngine) -> None:
    for call in (
        engine.open_session(0),
        engine.clear_session("s"),
    ):
        with pytest.raises(RequestRejected):
            await call
    params = request("a", (1,)).sampling
    session = SessionRef(session_id="s")
    with pytest.raises(RequestRejected, match="no open session 's'"):
        await engine.generate(GenerateRequest(request_id="a", prompt_token_ids=(1,), sampling=params, session=session))
    with pytest.raises(RequestRejected, match="no adapter 'x'"):
        await engine.generate(GenerateRequest(request_id="b", prompt_token_ids=(1,), sampling=params, adapter="x"))


async def test_the_thread_driver_leaves_the_event_loop_free() -> None:
    engine = make_engine(driver="thread")
    task = asyncio.create_task(engine.generate(sampled("a", (1, 2, 3), 100)))
    turns = 0
    while not task.done():
        await asyncio.sleep(0)
        turns += 1
    assert turns > (await engine.stats()).num_steps_total
    await engine.close()


@pytest.mark.parametrize("driver", DRIVERS)
def test_one_engine_serves_one_event_loop_after_another(driver: Any) -> None:
    engine = make_engine(driver=driver)
    first = asyncio.run(engine.generate(sampled("a", (1, 2, 3), 5)))
    second = asyncio.run(engine.generate(sampled("b", (1, 2, 3), 5)))
    assert first.token_ids == second.token_ids
    asyncio.run(engine.close())


@pytest.mark.parametrize("driver", DRIVERS)
def test_an_engine_that_is_dropped_gives_its_pool_back(driver: Any) -> None:
    import weakref

    engine = make_engine(driver=driver)
    asyncio.run(engine.generate(sampled("a", (1, 2, 3), 5)))
    asyncio.run(engine.close())
    pool = weakref.ref(engine.core.scheduler.pool)
    del engine
    gc.collect()
    assert pool() is None
