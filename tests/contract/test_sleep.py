"""An engine that gives its memory back and takes it again: nothing is lost but what can be computed anew."""

from __future__ import annotations

import asyncio

import pytest

from skyrl_train.errors import RequestRejected
from skyrl_train.types import SessionRef
from tests.contract import models
from tests.contract.asking import ENDLESS, MOMENTS, ask, assert_greedy, prompts
from tests.contract.under_test import Case

SLEEP = pytest.mark.capability("Sleep and wake: memory given back between two updates")
WHOLE = ("kv_cache", "weights")


async def can_sleep(case: Case) -> bool:
    """One that can't refuses both calls, and serves on."""
    if await case.can("sleep"):
        return True
    with pytest.raises(RequestRejected, match="can't sleep"):
        await case.engine.sleep(WHOLE)
    with pytest.raises(RequestRejected, match="can't sleep"):
        await case.engine.wake(WHOLE)
    return False


@SLEEP
async def test_a_whole_turn_of_the_trainer_serves_the_new_weights_to_who_came_meanwhile(case: Case) -> None:
    if not await can_sleep(case):
        return
    (prompt,) = prompts(20, seed=61)
    before = await case.engine.generate(ask(prompt))
    other = models.nearly(case.reference)
    await case.engine.pause("wait")
    await case.engine.sleep(WHOLE)
    await case.engine.sleep(("kv_cache",))
    waiting = asyncio.create_task(case.engine.generate(ask(prompt)))
    await asyncio.sleep(0.1)
    with pytest.raises(RequestRejected, match="wake it first"):
        await case.engine.resume()
    await case.engine.wake(("weights",))
    await case.engine.update_weights(case.started.update_to(other))
    await case.engine.wake(("kv_cache",))
    await case.engine.wake(WHOLE)
    assert not waiting.done()
    await case.engine.resume()
    answer = await waiting
    assert [span.version for span in answer.versions] == [case.started.version]
    assert answer.num_cached_tokens == 0, "prefixes are forgotten"
    assert_greedy(other, prompt, answer)
    await case.started.restore()
    assert (await case.engine.generate(ask(prompt))).token_ids == before.token_ids


@SLEEP
async def test_who_works_does_not_sleep(case: Case) -> None:
    if not await can_sleep(case):
        return
    request = ask(prompts(20, seed=62)[0], ENDLESS)
    task = asyncio.create_task(case.engine.generate(request))
    await asyncio.sleep(MOMENTS[0])
    with pytest.raises(RequestRejected, match="it sleeps only when drained"):
        await case.engine.sleep(WHOLE)
    await case.engine.abort([request.request_id])
    assert_greedy(case.reference, request.prompt_token_ids, await task)


@SLEEP
async def test_a_session_goes_on_after_its_keys_were_given_back(case: Case) -> None:
    if not await can_sleep(case):
        return
    first_new, second_new = prompts(20, 7, seed=63)
    session = await case.engine.open_session(200)
    first = ask(first_new, session=SessionRef(session_id=session, parent_request_id=None))
    answer = await case.engine.generate(first)
    await case.engine.pause("wait")
    await case.engine.sleep(("kv_cache",))
    await case.engine.wake(("kv_cache",))
    await case.engine.resume()
    second = ask(second_new, session=SessionRef(session_id=session, parent_request_id=first.request_id))
    assert_greedy(case.reference, first_new + answer.token_ids + second_new, await case.engine.generate(second))
    await case.engine.close_session(session)
