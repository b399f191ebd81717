"""Sessions are trees of requests: a turn sends what is new, and answers as if all had been sent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from skyrl_train.errors import RequestRejected
from skyrl_train.types import SessionRef
from tests.contract.asking import ENDLESS, MOMENTS, Ids, ask, assert_greedy, idle, prompts, reference_greedy
from tests.contract.models import CONTEXT_LEN
from tests.contract.under_test import Case

pytestmark = pytest.mark.capability("Sessions: turns, branches, capacity, closing")


@asynccontextmanager
async def _session(case: Case, capacity: int = 500) -> AsyncIterator[str]:
    session_id = await case.engine.open_session(capacity)
    try:
        yield session_id
    finally:
        await case.engine.close_session(session_id)


async def _has_sessions(case: Case) -> bool:
    if await case.can("sessions", ask([65], 4, session=SessionRef(session_id="never-opened"))):
        return True
    with pytest.raises(RequestRejected):
        await case.engine.open_session(100)
    return False


async def test_three_turns_are_the_answers_to_the_whole_conversation(case: Case) -> None:
    if not await _has_sessions(case):
        return
    whole: Ids = ()
    parent = None
    async with _session(case) as session_id:
        assert (await case.engine.stats()).num_sessions == 1
        for new in prompts(30, 11, 5, seed=51):
            request = ask(new, 9, session=SessionRef(session_id=session_id, parent_request_id=parent))
            answer = await case.engine.generate(request)
            assert_greedy(case.reference, whole + new, answer)
            assert answer.token_ids == reference_greedy(case.reference, whole + new, 9)
            whole += new + answer.token_ids
            parent = request.request_id
    assert (await case.engine.stats()).num_sessions == 0


async def test_two_branches_of_one_parent_do_not_see_each_other(case: Case) -> None:
    if not await _has_sessions(case):
        return
    root, left, right, deeper = prompts(25, 7, 9, 4, seed=52)
    async with _session(case) as session_id:
        first = ask(root, 6, session=SessionRef(session_id=session_id))
        answer = await case.engine.generate(first)
        whole = root + answer.token_ids
        at = SessionRef(session_id=session_id, parent_request_id=first.request_id)
        requests = [ask(left, 8, session=at), ask(right, 8, session=at)]
        for new, branch in zip((left, right), await case.answers(requests), strict=True):
            assert branch.token_ids == reference_greedy(case.reference, whole + new, 8)
        below = SessionRef(session_id=session_id, parent_request_id=requests[0].request_id)
        grandchild = await case.engine.generate(ask(deeper, 8, session=below))
        path = whole + left + reference_greedy(case.reference, whole + left, 8)
        assert grandchild.token_ids == reference_greedy(case.reference, path + deeper, 8)


async def test_what_does_not_fit_is_refused_with_both_numbers(case: Case) -> None:
    if not await _has_sessions(case):
        return
    async with _session(case, 40) as session_id:
        first = ask(prompts(20)[0], 10, session=SessionRef(session_id=session_id))
        await case.engine.generate(first)
        at = SessionRef(session_id=session_id, parent_request_id=first.request_id)
        with pytest.raises(RequestRejected, match="40"):
            await case.engine.generate(ask([65] * 5, 10, session=at))
        assert len((await case.engine.generate(ask([65] * 5, 5, session=at))).token_ids) == 5


async def test_an_aborted_turn_can_be_made_again(case: Case) -> None:
    if not await _has_sessions(case):
        return
    root, new = prompts(20, 8, seed=53)
    async with _session(case, CONTEXT_LEN) as session_id:
        first = ask(root, 6, session=SessionRef(session_id=session_id))
        whole = root + (await case.engine.generate(first)).token_ids
        at = SessionRef(session_id=session_id, parent_request_id=first.request_id)
        cut = ask(new, ENDLESS, session=at)
        task = asyncio.create_task(case.engine.generate(cut))
        await asyncio.sleep(MOMENTS[0])
        await case.engine.abort([cut.request_id])
        assert (await task).finish_reason == "abort"
        again = await case.engine.generate(ask(new, 9, session=at))
        assert again.token_ids == reference_greedy(case.reference, whole + new, 9)


async def test_a_session_is_closed_after_an_error_and_after_a_cancellation(case: Case) -> None:
    if not await _has_sessions(case):
        return
    with pytest.raises(ZeroDivisionError):
        async with _session(case) as session_id:
            await case.engine.generate(ask([65, 66], 4, session=SessionRef(session_id=session_id)))
            raise ZeroDivisionError
    assert (await case.engine.stats()).num_sessions == 0

    async def long_turn() -> None:
        async with _session(case, CONTEXT_LEN) as session_id:
            await case.engine.generate(ask([65, 66], ENDLESS, session=SessionRef(session_id=session_id)))

    task = asyncio.create_task(long_turn())
    await asyncio.sleep(MOMENTS[0])
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await case.engine.stats()).num_sessions == 0
    await idle(case.engine)


async def test_a_closed_session_a_stranger_and_an_unknown_parent_are_refused(case: Case) -> None:
    if not await _has_sessions(case):
        return
    async with _session(case) as session_id:
        nobody = SessionRef(session_id=session_id, parent_request_id="never-asked")
        with pytest.raises(RequestRejected, match="never-asked"):
            await case.engine.generate(ask([65], 4, session=nobody))
    for name in (session_id, "never-opened"):
        with pytest.raises(RequestRejected, match=name):
            await case.engine.generate(ask([65], 4, session=SessionRef(session_id=name)))
    await case.engine.close_session(session_id)


async def test_a_cleared_session_starts_empty(case: Case) -> None:
    if not await _has_sessions(case):
        return
    async with _session(case, 40) as session_id:
        first = ask(prompts(20)[0], 15, session=SessionRef(session_id=session_id))
        await case.engine.generate(first)
        await case.engine.clear_session(session_id)
        old = SessionRef(session_id=session_id, parent_request_id=first.request_id)
        with pytest.raises(RequestRejected):
            await case.engine.generate(ask([65], 4, session=old))
        (prompt,) = prompts(20, seed=54)
        answer = await case.engine.generate(ask(prompt, 15, session=SessionRef(session_id=session_id)))
        assert answer.token_ids == reference_greedy(case.reference, prompt, 15)


@pytest.mark.capability("Sessions go on over a weight update")
async def test_a_session_goes_on_over_a_weight_update(case: Case) -> None:
    from tests.contract import models

    if not await _has_sessions(case):
        return
    root, new = prompts(150, 8, seed=55)
    other = models.policy(seed=1)
    async with _session(case) as session_id:
        first = ask(root, 6, session=SessionRef(session_id=session_id))
        whole = root + (await case.engine.generate(first)).token_ids
        async with case.started.serving(other):
            at = SessionRef(session_id=session_id, parent_request_id=first.request_id)
            assert_greedy(other, whole + new, await case.engine.generate(ask(new, 9, session=at)))
