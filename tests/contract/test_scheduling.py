"""Who is served first, and what happens when there is no room."""

from __future__ import annotations

import asyncio

import pytest

from tests.contract.asking import ENDLESS, ask, assert_greedy, prompts
from tests.contract.under_test import Case

ONE_SEAT = pytest.mark.setting("one_seat")


@pytest.mark.capability("Higher priority is served first")
@ONE_SEAT
async def test_the_higher_priority_is_served_first(case: Case) -> None:
    first, *others = prompts(20, 10, 11, 12, 13, seed=81)
    if not await case.can("priority"):
        return
    served: list[int] = []

    async def one(prompt: tuple[int, ...], priority: int) -> None:
        await case.engine.generate(ask(prompt, 8, priority=priority))
        served.append(priority)

    # The one seat is taken until all others wait, however fast or busy the machine is.
    longest = ask(first, ENDLESS)
    task = asyncio.create_task(case.engine.generate(longest))
    while (await case.engine.stats()).num_running == 0:
        await asyncio.sleep(0.01)
    tasks = [asyncio.create_task(one(prompt, priority)) for prompt, priority in zip(others, (0, 2, 1, 3), strict=True)]
    while (await case.engine.stats()).num_waiting < len(tasks):
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.3)  # they are counted when they are sent
    assert not task.done(), "the request that holds the seat ended too early"
    await case.engine.abort([longest.request_id])
    await asyncio.gather(*tasks)
    await task
    assert served == [3, 2, 1, 0]


@pytest.mark.capability("A full engine serves all in the end")
@ONE_SEAT
async def test_a_full_engine_serves_all_in_the_end(case: Case) -> None:
    wanted = prompts(*range(5, 29), seed=82)
    for prompt, answer in zip(wanted, await case.answers([ask(p, 6) for p in wanted]), strict=True):
        assert len(answer.token_ids) == 6
        assert_greedy(case.reference, prompt, answer)


@pytest.mark.capability("A full engine serves all in the end")
async def test_more_tokens_than_the_cache_holds_are_served_in_the_end(case: Case) -> None:
    wanted = prompts(*[600] * 40, seed=83)
    for answer in await case.answers([ask(prompt, 40) for prompt in wanted]):
        assert (len(answer.token_ids), answer.finish_reason) == (40, "length")
