"""Requests that are ended, left or held: nothing is lost and nothing stays behind."""

from __future__ import annotations

import asyncio

import pytest

from skyrl_train.engines.base import PauseMode
from skyrl_train.types import Completion
from tests.contract.asking import ENDLESS, LONG, MOMENTS, ask, assert_greedy, idle, prompts, reference_greedy
from tests.contract.under_test import Case

ABORT = pytest.mark.capability("Abort: partial answers, and going on from them")
PAUSE = pytest.mark.capability("Pause and resume: keep, wait, abort")


@ABORT
async def test_an_aborted_answer_is_the_start_of_the_greedy_one_and_goes_on_from_there(case: Case) -> None:
    (prompt,) = prompts(20, seed=21)
    if not await case.can("abort"):
        return
    for moment in MOMENTS:
        request = ask(prompt, ENDLESS)
        task = asyncio.create_task(case.engine.generate(request))
        await asyncio.sleep(moment)
        await case.engine.abort([request.request_id])
        partial = await task
        if partial.token_ids and partial.finish_reason == "abort":
            break
    assert 0 < len(partial.token_ids) < ENDLESS
    assert partial.finish_reason == "abort"
    assert_greedy(case.reference, prompt, partial)
    whole = len(partial.token_ids) + 16
    rest = await case.engine.generate(ask(prompt, whole, partial=partial))
    assert rest.finish_reason == "length"
    assert len(rest.token_ids) == whole
    assert rest.token_ids[: len(partial.token_ids)] == partial.token_ids
    assert_greedy(case.reference, prompt, rest)


@ABORT
async def test_a_made_up_partial_answer_is_gone_on_from_with_its_own_numbers_kept(case: Case) -> None:
    (prompt,) = prompts(20, seed=22)
    first = await case.engine.generate(ask(prompt, 7, temperature=1.0))
    partial = Completion(
        request_id=first.request_id,
        token_ids=first.token_ids,
        logprobs=first.logprobs,
        finish_reason="abort",
        versions=first.versions,
    )
    answer = await case.engine.generate(ask(prompt, 20, partial=partial))
    assert answer.token_ids[:7] == first.token_ids
    assert answer.logprobs[:7] == pytest.approx(first.logprobs, abs=1e-6)
    assert answer.token_ids[7:] == reference_greedy(case.reference, prompt + first.token_ids, 13)


@ABORT
async def test_aborting_what_is_not_there_does_nothing(case: Case) -> None:
    await case.engine.abort(["never-sent"])
    assert len((await case.engine.generate(ask([65, 66], 4))).token_ids) == 4


@pytest.mark.capability("Cancelling the caller frees the engine")
async def test_cancelling_the_caller_frees_the_engine(case: Case) -> None:
    tasks = [asyncio.create_task(case.engine.generate(ask(prompt, LONG))) for prompt in prompts(9, 30, 12)]
    await asyncio.sleep(MOMENTS[0])
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await idle(case.engine)


@PAUSE
@pytest.mark.parametrize("mode", ["keep", "wait", "abort"])
async def test_a_paused_engine_starts_nothing_and_resume_serves_it(case: Case, mode: PauseMode) -> None:
    await case.engine.pause(mode)
    assert (await case.engine.stats()).paused
    waiting = asyncio.create_task(case.engine.generate(ask([65, 66, 67], 8)))
    done, _ = await asyncio.wait([waiting], timeout=0.3)
    assert not done
    await case.engine.resume()
    assert (await waiting).token_ids == reference_greedy(case.reference, [65, 66, 67], 8)


@PAUSE
async def test_what_runs_is_kept_over_a_pause(case: Case) -> None:
    wanted = prompts(9, 30, 12, seed=23)
    tasks = [asyncio.create_task(case.engine.generate(ask(prompt, 1000))) for prompt in wanted]
    await asyncio.sleep(MOMENTS[0])
    await case.engine.pause("keep")
    # The third runs on a pause of a pause: a second one changes nothing.
    await case.engine.pause("keep")
    await case.engine.resume()
    for prompt, answer in zip(wanted, await asyncio.gather(*tasks), strict=True):
        assert (len(answer.token_ids), answer.finish_reason) == (1000, "length")
        assert_greedy(case.reference, prompt, answer)


@PAUSE
async def test_a_waiting_pause_lets_what_runs_finish(case: Case) -> None:
    tasks = [asyncio.create_task(case.engine.generate(ask(prompt, 200))) for prompt in prompts(9, 30, 12)]
    await asyncio.sleep(MOMENTS[0])
    await case.engine.pause("wait")
    answers = await asyncio.wait_for(asyncio.gather(*tasks), timeout=20)
    await case.engine.resume()
    assert [(len(answer.token_ids), answer.finish_reason) for answer in answers] == [(200, "length")] * 3


@PAUSE
async def test_an_aborting_pause_returns_what_there_is(case: Case) -> None:
    (prompt,) = prompts(16, seed=24)
    for moment in MOMENTS:
        task = asyncio.create_task(case.engine.generate(ask(prompt, ENDLESS)))
        await asyncio.sleep(moment)
        await case.engine.pause("abort")
        await case.engine.resume()
        answer = await task
        if answer.token_ids and answer.finish_reason == "abort":
            break
    assert answer.finish_reason == "abort"
    assert 0 < len(answer.token_ids) < ENDLESS
    assert_greedy(case.reference, prompt, answer)
