"""Several real engines behind one router. A Link lies between the two, as a network does: it can be cut and mended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any

import pytest
import torch

from skyrl_train.engines.affinity import Affinity
from skyrl_train.engines.base import Engine
from skyrl_train.engines.embedded import EmbeddedConfig
from skyrl_train.engines.router import RoutedEngine
from skyrl_train.errors import ConfigError, EngineUnavailable, RequestRejected, WeightUpdateError
from skyrl_train.types import Completion, GenerateRequest, NamedWeights, SessionRef, WeightUpdate
from tests.engines.embedded.common import random_prompts, request
from tests.rollout.session_engine import SessionEngine
from tests.tiny import make_model, make_tokenizer

SETTINGS = EmbeddedConfig(max_num_seqs=8, max_num_batched_tokens=32, kv_cache_tokens=2048, max_context_len=128)


class Link:
    """An engine, reached over something that breaks. `calls` are the names of what came through."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.info = engine.info
        self.calls: list[str] = []
        self._cut = asyncio.Event()

    def cut(self) -> None:
        """Calls that are under way break off, at the engine too; later ones don't get through."""
        self._cut.set()

    def mend(self) -> None:
        self._cut.clear()

    def __getattr__(self, name: str) -> Callable[..., Coroutine[Any, Any, Any]]:
        async def call(*args: Any) -> Any:
            if self._cut.is_set():
                raise EngineUnavailable(f"no way to {self.info.name}")
            self.calls.append(name)
            under_way = asyncio.ensure_future(getattr(self.engine, name)(*args))
            cut = asyncio.ensure_future(self._cut.wait())
            try:
                await asyncio.wait({under_way, cut}, return_when=asyncio.FIRST_COMPLETED)
                if not under_way.done():
                    raise EngineUnavailable(f"the way to {self.info.name} broke")
                return under_way.result()
            finally:
                under_way.cancel()
                cut.cancel()
                await asyncio.gather(under_way, cut, return_exceptions=True)

        return call


Make = Callable[..., tuple[RoutedEngine, list[Link]]]


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    made: list[tuple[RoutedEngine, list[Link]]] = []

    def make(count: int = 2, *, sessions: bool = False, versions: Sequence[int] = (), **options: Any) -> Any:
        engines = [
            embedded(
                f"embedded-{i}",
                policy_version=versions[i] if versions else 0,
                without=() if sessions else ("sessions",),
            )
            for i in range(count)
        ]
        links = [Link(engine) for engine in engines]
        made.append((RoutedEngine(links, check_interval_s=0.01, **options), links))
        return made[-1]

    yield make
    for router, links in made:
        for link in links:
            link.mend()
        await router.close()


def embedded(name: str, *, seed: int = 0, policy_version: int = 0, without: Sequence[str] = ()) -> SessionEngine:
    return SessionEngine(
        make_model(seed=seed),
        make_tokenizer(),
        config=SETTINGS,
        name=name,
        policy_version=policy_version,
        without=without,
    )


def weights(version: int, *, seed: int, still_valid: Callable[[], bool] = lambda: True) -> WeightUpdate:
    return WeightUpdate(
        version=version, source=NamedWeights(tensors=make_model(seed=seed).state_dict(), still_valid=still_valid)
    )


def batch(num_groups: int, num_samples: int, max_new: int = 12) -> list[GenerateRequest]:
    prompts = random_prompts(*([20] * num_groups))
    return [
        request(f"{group}/{sample}/0", prompt, max_new + sample, ignore_eos=True)
        for group, prompt in enumerate(prompts)
        for sample in range(num_samples)
    ]


async def alone(requests: Sequence[GenerateRequest], *, seed: int = 0) -> list[Completion]:
    """What one engine answers."""
    engine = embedded("alone", seed=seed)
    answers = await asyncio.gather(*(engine.generate(item) for item in requests))
    await engine.close()
    return answers


def tokens(answers: Sequence[Completion]) -> list[tuple[int, ...]]:
    return [answer.token_ids for answer in answers]


async def until(condition: Callable[[], Any]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


async def sync(router: RoutedEngine, update: WeightUpdate) -> None:
    await router.pause()
    await router.update_weights(update)
    await router.resume()


# -- where requests go


async def test_it_is_an_engine_and_answers_as_one(make: Make) -> None:
    router, links = make(3)
    engine: Engine = router
    assert engine.info.name == "embedded-0+embedded-1+embedded-2"
    requests = batch(6, 4)
    answers = await asyncio.gather(*(engine.generate(item) for item in requests))
    assert tokens(answers) == tokens(await alone(requests))
    assert [answer.request_id for answer in answers] == [item.request_id for item in requests]
    stats = await engine.stats()
    assert stats.num_generated_tokens_total == sum(len(answer.token_ids) for answer in answers)
    # Six groups of four over three engines, each prompt computed once: the others come from the cache.
    assert [link.calls.count("generate") for link in links] == [8, 8, 8]
    for link in links:
        inner = await link.engine.stats()
        assert inner.num_prompt_tokens_total == 8 * 20
    with pytest.raises(RequestRejected, match="has no sessions"):
        await engine.open_session(100)


async def test_samples_of_a_prompt_find_its_prefix_in_the_cache(make: Make) -> None:
    router, _ = make(2)
    first, *others = batch(1, 6)
    await router.generate(first)
    answers = await asyncio.gather(*(router.generate(item) for item in others))
    assert [answer.num_cached_tokens for answer in answers] == [19] * 5


async def test_later_turns_follow_the_first_though_it_is_busier_there(make: Make) -> None:
    router, links = make(2)
    (prompt,) = random_prompts(20)
    first = await router.generate(request("0/0/0", prompt, 8, ignore_eos=True))
    busy = [asyncio.create_task(router.generate(request(f"0/{i}/0", prompt, 60, ignore_eos=True))) for i in (1, 2)]
    await until(lambda: links[0].calls.count("generate") == 3)
    longer = (*prompt, *first.token_ids, 1, 2)
    second = await router.generate(request("0/0/0/t1", longer, 8, ignore_eos=True))
    assert second.num_cached_tokens == len(prompt) + 7
    assert "generate" not in links[1].calls
    await asyncio.gather(*busy)


async def test_nothing_is_kept_of_requests_that_are_done(make: Make) -> None:
    affinity = Affinity(max_remembered=5)
    router, _ = make(2, affinity=affinity)
    for item in batch(12, 1, max_new=1):
        await router.generate(item)
        assert len(affinity) <= 10
    await sync(router, weights(1, seed=1))
    assert len(affinity) == 0
    # An id is free again once it was answered.
    await router.generate(batch(1, 1)[0])


async def test_an_id_that_runs_already_is_refused_whichever_engine_has_it(make: Make) -> None:
    router, links = make(2)
    item = batch(1, 1, max_new=60)[0]
    running = asyncio.create_task(router.generate(item))
    await until(lambda: "generate" in links[0].calls)
    with pytest.raises(RequestRejected, match="running request of this id"):
        await router.generate(item)
    await router.abort([item.request_id, "unknown"])
    assert (await running).finish_reason == "abort"


async def test_a_cancelled_caller_frees_what_its_request_held(make: Make) -> None:
    router, links = make(2)
    running = asyncio.create_task(router.generate(batch(1, 1, max_new=90)[0]))
    await until(lambda: links[0].engine.core.scheduler.num_running)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    stats = await router.stats()
    assert (stats.num_running, stats.num_waiting) == (0, 0)


# -- engines that go


async def test_a_closed_engines_requests_are_answered_by_another_and_none_is_lost_or_doubled(make: Make) -> None:
    router, links = make(3)
    requests = batch(9, 4, max_new=40)
    running = [asyncio.create_task(router.generate(item)) for item in requests]
    await until(lambda: links[1].engine.core.stats().num_generated_tokens_total > 50)
    before = await router.stats()
    await links[1].engine.close()
    answers = await asyncio.gather(*running)
    assert tokens(answers) == tokens(await alone(requests))
    after = await router.stats()
    assert router.out_of_rotation == {"embedded-1": "engine embedded-1 was closed"}
    router.check_integrity()
    assert after.num_resent_total == 12
    assert after.num_generated_tokens_total >= before.num_generated_tokens_total + 1
    assert after.num_steps_total > before.num_steps_total
    done = [await link.engine.stats() for link in (links[0], links[2])]
    assert all(stats.num_running == stats.num_waiting == 0 for stats in done)
    # The rest of the run goes on with two.
    await sync(router, weights(1, seed=1))
    answers = await asyncio.gather(*(router.generate(item) for item in requests))
    assert tokens(answers) == tokens(await alone(requests, seed=1))


async def test_without_any_engine_the_reasons_are_named(make: Make) -> None:
    router, links = make(2)
    running = [asyncio.create_task(router.generate(item)) for item in batch(2, 1, max_new=60)]
    await until(lambda: all("generate" in link.calls for link in links))
    await asyncio.gather(*(link.engine.close() for link in links))
    for outcome in await asyncio.gather(*running, return_exceptions=True):
        assert isinstance(outcome, EngineUnavailable)
        assert "embedded-0: engine embedded-0 was closed; embedded-1: engine embedded-1 was closed" in str(outcome)
    for call in (router.stats(), router.pause(), router.resume(), router.flush_cache()):
        with pytest.raises(EngineUnavailable, match="all 2 engines are out of rotation"):
            await call


async def test_an_abort_reaches_a_request_that_is_between_two_engines(make: Make) -> None:
    router, links = make(1)
    item = batch(1, 1, max_new=90)[0]
    running = asyncio.create_task(router.generate(item))
    await until(lambda: links[0].engine.core.scheduler.num_running)
    links[0].cut()
    await asyncio.gather(router.abort([item.request_id]), return_exceptions=True)
    with pytest.raises(EngineUnavailable):
        await running
    router, links = make(2)
    running = asyncio.create_task(router.generate(item))
    await until(lambda: links[0].engine.core.scheduler.num_running)
    links[0].cut()
    await router.abort([item.request_id])
    answer = await running
    assert (answer.finish_reason, answer.token_ids) == ("abort", ())


async def test_a_closed_router_closes_all_and_fails_what_is_open(make: Make) -> None:
    router, links = make(2)
    running = [asyncio.create_task(router.generate(item)) for item in batch(2, 2, max_new=90)]
    await until(lambda: all("generate" in link.calls for link in links))
    await router.close()
    await router.close()
    for outcome in await asyncio.gather(*running, return_exceptions=True):
        assert isinstance(outcome, EngineUnavailable) and "is closed" in str(outcome)
    assert [link.calls.count("close") for link in links] == [1, 1]
    with pytest.raises(EngineUnavailable, match="is closed"):
        await router.generate(batch(1, 1)[0])


async def test_a_start_that_fails_closes_those_that_started(make: Make) -> None:
    router, links = make(2)
    links[1].cut()
    with pytest.raises(EngineUnavailable, match="no way to embedded-1"):
        await router.start()
    assert links[0].calls == ["start", "close"]


# -- engines that come back


async def test_an_engine_that_comes_back_has_the_current_weights_before_its_first_request(make: Make) -> None:
    router, links = make(2)
    requests = batch(4, 2, max_new=30)
    running = [asyncio.create_task(router.generate(item)) for item in requests]
    await until(lambda: links[0].engine.core.scheduler.num_running)
    links[0].cut()
    assert tokens(await asyncio.gather(*running)) == tokens(await alone(requests))
    await sync(router, weights(1, seed=1))
    assert links[0].engine.core.policy_version == 0
    links[0].calls.clear()
    links[0].mend()
    await until(lambda: "resume" in links[0].calls)
    assert links[0].calls.index("update_weights") < links[0].calls.index("resume")
    answers = await asyncio.gather(*(router.generate(item) for item in requests))
    assert tokens(answers) == tokens(await alone(requests, seed=1))
    assert links[0].calls.count("generate") == 4
    assert {span.version for answer in answers for span in answer.versions} == {1}


async def test_weights_that_the_trainer_changes_are_not_given_to_an_engine_that_comes_back(make: Make) -> None:
    router, links = make(2)
    links[0].cut()
    await router.generate(batch(1, 1)[0])
    valid = True
    await sync(router, weights(1, seed=1, still_valid=lambda: valid))
    valid = False
    links[0].calls.clear()
    links[0].mend()
    await until(lambda: links[0].calls.count("pause") >= 3)
    assert "update_weights" not in links[0].calls and "resume" not in links[0].calls
    requests = batch(4, 2)
    answers = await asyncio.gather(*(router.generate(item) for item in requests))
    assert tokens(answers) == tokens(await alone(requests, seed=1))
    assert "generate" not in links[0].calls
    await sync(router, weights(2, seed=2))
    await until(lambda: "resume" in links[0].calls)
    answers = await asyncio.gather(*(router.generate(item) for item in requests))
    assert tokens(answers) == tokens(await alone(requests, seed=2))
    assert "generate" in links[0].calls


async def test_weights_that_change_while_they_are_read_keep_the_engine_out(make: Make) -> None:
    router, links = make(2)
    links[0].cut()
    await router.generate(batch(1, 1)[0])
    looks = 0

    def valid_at_first() -> bool:
        nonlocal looks
        looks += 1
        return looks != 2

    await sync(router, weights(1, seed=1, still_valid=valid_at_first))
    links[0].calls.clear()
    links[0].mend()
    await until(lambda: "resume" in links[0].calls)
    assert links[0].calls.count("update_weights") == 2 and looks == 4


async def test_an_engine_that_comes_back_into_a_pause_is_paused(make: Make) -> None:
    router, links = make(2)
    links[0].cut()
    await router.generate(batch(1, 1)[0])
    await router.pause()
    links[0].calls.clear()
    links[0].mend()
    await until(lambda: "pause" in links[0].calls)
    await router.update_weights(weights(1, seed=1))
    requests = batch(2, 2)
    running = [asyncio.create_task(router.generate(item)) for item in requests]
    await until(lambda: "generate" in links[1].calls)
    assert (await router.stats()).paused and not any(task.done() for task in running)
    await router.resume()
    assert tokens(await asyncio.gather(*running)) == tokens(await alone(requests, seed=1))
    assert "generate" in links[0].calls


async def test_an_engine_without_the_common_version_stays_out(make: Make) -> None:
    router, links = make(2, versions=(3, 4))
    with pytest.raises(WeightUpdateError, match="different versions"):
        await router.stats()
    links[0].cut()
    await router.generate(batch(1, 1)[0])
    links[0].calls.clear()
    links[0].mend()
    await until(lambda: links[0].calls.count("stats") >= 3)
    assert (await router.stats()).policy_version == 4 and "resume" not in links[0].calls


async def test_engines_that_all_went_come_back_too(make: Make) -> None:
    router, links = make(2)
    await sync(router, weights(1, seed=1))
    for link in links:
        link.cut()
    with pytest.raises(EngineUnavailable):
        await router.generate(batch(1, 1)[0])
    for link in links:
        link.calls.clear()
        link.mend()
    await until(lambda: all("resume" in link.calls for link in links))
    assert (await router.stats()).policy_version == 1
    # They have these weights already.
    assert not any("update_weights" in link.calls for link in links)


# -- pauses and weights


async def test_requests_that_run_over_an_update_end_under_the_new_version_everywhere(make: Make) -> None:
    router, links = make(2)
    running = [asyncio.create_task(router.generate(item)) for item in batch(4, 2, max_new=40)]
    await until(lambda: all(link.engine.core.stats().num_generated_tokens_total > 20 for link in links))
    await router.pause()
    await router.update_weights(weights(1, seed=1))
    assert (await router.stats()).policy_version == 1
    await router.resume()
    for answer in await asyncio.gather(*running):
        assert [span.version for span in answer.versions] == [0, 1]


async def test_an_update_that_one_engine_refuses_leaves_all_paused_until_a_whole_one(make: Make) -> None:
    router, links = make(2, versions=(0, 5))
    await router.pause()
    with pytest.raises(WeightUpdateError, match="version 3 did not reach embedded-1; all engines stay paused"):
        await router.update_weights(weights(3, seed=1))
    with pytest.raises(WeightUpdateError, match="did not reach embedded-1"):
        await router.stats()
    with pytest.raises(WeightUpdateError, match="repeat the update before resume"):
        await router.resume()
    waiting = asyncio.create_task(router.generate(batch(1, 1)[0]))
    await until(lambda: "generate" in links[0].calls)
    assert all(link.engine.core.pause_state == "paused" for link in links) and not waiting.done()
    await router.update_weights(weights(6, seed=2))
    await router.resume()
    assert tokens([await waiting]) == tokens(await alone(batch(1, 1), seed=2))
    assert (await router.stats()).policy_version == 6


async def test_an_engine_that_goes_during_an_update_does_not_hold_the_others_up(make: Make) -> None:
    router, links = make(2)
    await router.pause()
    links[0].cut()
    await router.update_weights(weights(1, seed=1))
    await router.resume()
    assert (await router.stats()).policy_version == 1


async def test_an_update_outside_of_a_pause_is_refused(make: Make) -> None:
    router, links = make(2)
    with pytest.raises(WeightUpdateError, match="must be paused"):
        await router.update_weights(weights(1, seed=1))
    assert all("update_weights" not in link.calls for link in links)


async def test_a_cancelled_pause_leaves_every_engine_running(make: Make) -> None:
    router, links = make(2)
    item = batch(1, 1, max_new=90)[0]
    running = asyncio.create_task(router.generate(item))
    await until(lambda: links[0].engine.core.scheduler.num_running)
    pausing = asyncio.create_task(router.pause("wait"))
    await until(lambda: links[1].engine.core.pause_state == "paused")
    assert links[0].engine.core.pause_state == "draining"
    pausing.cancel()
    await asyncio.gather(pausing, return_exceptions=True)
    await until(lambda: all(link.engine.core.pause_state == "running" for link in links))
    await running
    await router.pause("wait")
    assert all(link.engine.core.pause_state == "paused" for link in links)


async def test_what_one_engine_refuses_is_raised_after_all_were_asked(make: Make) -> None:
    router, links = make(2)
    running = asyncio.create_task(router.generate(batch(1, 1, max_new=60)[0]))
    await until(lambda: links[0].engine.core.scheduler.num_running)
    with pytest.raises(RequestRejected, match="embedded-0: 1 requests run on cached prefixes"):
        await router.flush_cache()
    assert "flush_cache" in links[1].calls
    with pytest.raises(RequestRejected, match="sleeps only when drained"):
        await router.sleep(["kv_cache"])
    await running
    await router.flush_cache()


# -- sessions


def turn(name: str, prompt: Sequence[int], session: str, parent: str | None = None) -> GenerateRequest:
    base = request(name, prompt, 8, ignore_eos=True)
    ref = SessionRef(session_id=session, parent_request_id=parent)
    return GenerateRequest(request_id=name, prompt_token_ids=base.prompt_token_ids, sampling=base.sampling, session=ref)


async def test_a_session_lives_where_its_first_prompt_is(make: Make) -> None:
    router, links = make(2, sessions=True)
    first, second = random_prompts(20, 25)
    sessions = [await router.open_session(100) for _ in range(4)]
    assert (await router.stats()).num_sessions == 4
    names = ["a/0/0", "b/0/0", "a/1/0", "b/1/0"]
    prompts = [first, second, first, second]
    answers = await asyncio.gather(*map(router.generate, map(turn, names, prompts, sessions)))
    assert [link.calls.count("open_session") for link in links] == [2, 2]
    assert {item.request_id for item in links[0].engine.sent} == {"a/0/0", "a/1/0"}
    branches = [turn("a/0/0/t1", (1, 2), sessions[0], "a/0/0"), turn("a/0/1/t1", (3,), sessions[0], "a/0/0")]
    branched = await asyncio.gather(*map(router.generate, branches))
    whole = [(*first, *answers[0].token_ids, 1, 2), (*first, *answers[0].token_ids, 3)]
    assert tokens(branched) == tokens(
        await alone([request(str(i), p, 8, ignore_eos=True) for i, p in enumerate(whole)])
    )
    assert (await router.stats()).num_sessions == 4
    for session in (*sessions, sessions[0], "unknown"):
        await router.close_session(session)
    assert (await router.stats()).num_sessions == 0
    with pytest.raises(RequestRejected, match="no session"):
        await router.generate(turn("a/0/0/t2", (1,), sessions[0], "a/0/0/t1"))
    with pytest.raises(RequestRejected, match="holds nothing"):
        await router.open_session(0)


async def test_sessions_that_are_opened_at_once_spread_over_the_engines(make: Make) -> None:
    router, links = make(2, sessions=True)
    sessions = [await router.open_session(100) for _ in range(6)]
    for link in links:
        link.engine.opening.clear()
    requests = [turn(f"{i}/0/0", prompt, sessions[i]) for i, prompt in enumerate(random_prompts(*[10] * 6))]
    running = [asyncio.create_task(router.generate(item)) for item in requests]
    await until(lambda: sum(link.calls.count("open_session") for link in links) == 6)
    for link in links:
        link.engine.opening.set()
    await asyncio.gather(*running)
    assert [link.calls.count("generate") for link in links] == [3, 3]


async def test_a_session_of_an_engine_that_went_asks_for_the_whole_prompt_and_takes_it(make: Make) -> None:
    router, links = make(2, sessions=True)
    (prompt,) = random_prompts(20)
    session = await router.open_session(100)
    first = await router.generate(turn("a/0/0", prompt, session))
    links[0].cut()
    with pytest.raises(RequestRejected, match=r"has lost a/0/0, its engine went out of rotation; send the whole"):
        await router.generate(turn("a/0/0/t1", (1, 2), session, "a/0/0"))
    whole = (*prompt, *first.token_ids, 1, 2)
    second = await router.generate(turn("a/0/0/t1", whole, session))
    assert tokens([second]) == tokens(await alone([request("0", whole, 8, ignore_eos=True)]))
    await router.generate(turn("a/0/0/t2", (5,), session, "a/0/0/t1"))
    # What the engine still holds of us is given back before it serves again.
    assert len(links[0].engine.book) == 1
    links[0].mend()
    await until(lambda: links[0].calls.count("resume"))
    assert len(links[0].engine.book) == 0
    await router.close_session(session)
    assert (await router.stats()).num_sessions == 0


async def test_a_first_turn_under_way_in_a_session_moves_with_it(make: Make) -> None:
    router, links = make(2, sessions=True)
    (prompt,) = random_prompts(20)
    session = await router.open_session(128)
    running = asyncio.create_task(router.generate(turn("a/0/0", prompt, session)))
    await until(lambda: "generate" in links[0].calls)
    links[0].cut()
    answer = await running
    assert tokens([answer]) == tokens(await alone([request("0", prompt, 8, ignore_eos=True)]))
    assert links[1].calls.count("open_session") == 1


async def test_a_cleared_session_moves_to_where_its_next_prompt_is(make: Make) -> None:
    router, links = make(2, sessions=True)
    a, b = random_prompts(20, 20)
    session, other = await router.open_session(100), await router.open_session(100)
    await router.generate(turn("a/0/0", a, session))
    held = asyncio.create_task(router.generate(request("a/1/0", a, 60, ignore_eos=True)))
    await until(lambda: links[0].calls.count("generate") == 2)
    await router.generate(turn("b/0/0", b, other))
    assert links[1].calls.count("generate") == 1
    await router.clear_session(session)
    await router.generate(turn("b/1/0", b, session))
    assert links[1].calls.count("generate") == 2 and len(links[0].engine.book) == 0
    await router.clear_session(session)
    await router.generate(turn("b/2/0", b, session))
    assert links[1].calls.count("open_session") == 2
    with pytest.raises(RequestRejected, match="no session"):
        await router.clear_session("unknown")
    await held


async def test_a_session_that_is_closed_while_it_is_opened_leaves_nothing_behind(make: Make) -> None:
    router, links = make(2, sessions=True)
    session = await router.open_session(100)
    links[0].engine.opening.clear()
    running = asyncio.create_task(router.generate(turn("a/0/0", (1, 2, 3), session)))
    await until(lambda: "open_session" in links[0].calls)
    closing = asyncio.create_task(router.close_session(session))
    await asyncio.sleep(0)
    links[0].engine.opening.set()
    await closing
    with pytest.raises(RequestRejected, match="closed meanwhile"):
        await running
    assert len(links[0].engine.book) == 0 and (await router.stats()).num_sessions == 0


# -- many of everything


@pytest.mark.parametrize("seed", range(4))
async def test_whatever_goes_and_comes_back_every_request_is_answered_once_and_right(make: Make, seed: int) -> None:
    router, links = make(3)
    generator = torch.Generator().manual_seed(seed)
    requests = batch(12, 3, max_new=20)
    running = [asyncio.create_task(router.generate(item)) for item in requests]

    async def disturb() -> None:
        for _ in range(8):
            link = links[int(torch.randint(0, 2, (1,), generator=generator))]
            link.cut()
            await asyncio.sleep(float(torch.rand(1, generator=generator)) * 0.03)
            link.mend()
            await asyncio.sleep(float(torch.rand(1, generator=generator)) * 0.03)

    await disturb()
    assert tokens(await asyncio.gather(*running)) == tokens(await alone(requests))
    await until(lambda: not router.out_of_rotation)
    router.check_integrity()
    stats = await router.stats()
    assert (stats.num_running, stats.num_waiting) == (0, 0)
    for link in links:
        link.engine.core.check_integrity()


async def test_engines_that_differ_are_refused() -> None:
    one, other = embedded("a"), embedded("a")
    with pytest.raises(ConfigError, match="names of their own"):
        RoutedEngine([one, other])
    await asyncio.gather(one.close(), other.close())
