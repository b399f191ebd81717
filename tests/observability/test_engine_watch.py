"""The engine's figures of each step, over a real engine."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from skyrl_train.engines.embedded import EmbeddedConfig, EmbeddedEngine
from skyrl_train.engines.embedded.drafts.build import ngram_source
from skyrl_train.engines.embedded.drafts.ngram import NgramSettings
from skyrl_train.observability.engine_watch import EngineWatch
from skyrl_train.observability.metrics import is_wall_clock
from skyrl_train.rollout.sessions import Sessions
from skyrl_train.types import GenerateRequest, LocalWeights, SamplingParams, WeightUpdate
from skyrl_train.weight_sync.sync import sync_weights
from tests.rollout.test_pipeline import make_engine
from tests.rollout.test_sessions import engine_with_sessions
from tests.tiny import make_model, make_tokenizer

SAMPLING = SamplingParams(max_new_tokens=30, ignore_eos=True)
GREEDY = SamplingParams(max_new_tokens=30, ignore_eos=True, temperature=0.0)


def request(name: str, prompt: tuple[int, ...] = (65, 66, 67, 68)) -> GenerateRequest:
    return GenerateRequest(request_id=name, prompt_token_ids=prompt, sampling=SAMPLING)


def fixed(name: str) -> GenerateRequest:
    return replace(request(name), sampling=GREEDY)


async def test_counters_are_those_of_the_step_and_peaks_are_seen_while_it_runs() -> None:
    engine = make_engine()
    try:
        await engine.generate(request("earlier"))
        async with EngineWatch(engine, every_s=0.0) as watch:
            await asyncio.gather(*(engine.generate(request(f"a{i}", (65, 66, 67, 70 + i))) for i in range(3)))
            first = await watch.step()
            second = await watch.step()
        assert (first["engine/prompt_tokens"], first["engine/generated_tokens"]) == (12, 90)
        assert first["engine/running_max"] == 3 and 0 < first["engine/running"] <= 3
        assert 0 < first["engine/kv_used_frac"] < 1 and first["engine/steps"] >= 30
        assert first["engine/cache_hit_frac"] == first["engine/cached_tokens"] / 12 > 0
        assert (first["engine/up"], first["engine/sessions"], first["engine/restarts"]) == (1, 0, 0)
        assert "engine/accept_len" not in first, "nothing was drafted"
        assert second["engine/generated_tokens"] == second["engine/steps"] == second["engine/running_max"] == 0
        assert all(is_wall_clock(name) for name in first)
    finally:
        await engine.close()


def drafting_engine() -> EmbeddedEngine:
    """Answers of 30 tokens, each prompt's always the same."""
    drafts = ngram_source(NgramSettings(max_guesses=4))
    return EmbeddedEngine(make_model(), make_tokenizer(), config=EmbeddedConfig(kv_cache_tokens=512), drafts=drafts)


async def test_accept_length_is_that_of_the_step() -> None:
    engine = drafting_engine()
    try:
        async with EngineWatch(engine) as watch:
            await engine.generate(fixed("a"))
            first = await watch.step()
            await engine.generate(fixed("b"))
            await engine.generate(fixed("c"))
            again, nothing = await watch.step(), await watch.step()
        assert first["engine/accept_len"] < again["engine/accept_len"] <= 5, "the same prompt again: a sibling knows"
        assert again["engine/accept_frac"] > 0.9 and again["engine/drafted_tokens"] > 30
        assert (nothing["engine/accept_len"], nothing["engine/accept_frac"]) == (1, 0)
        assert "engine/draft_updates_behind" not in again, "n-grams have no weights"
    finally:
        await engine.close()


async def test_a_step_over_an_update_has_the_counters_of_both_sides() -> None:
    engine = make_engine()
    try:
        async with EngineWatch(engine) as watch:
            await engine.generate(request("a"))
            await sync_weights(engine, WeightUpdate(version=1, source=LocalWeights()))
            await engine.generate(request("b"))
            assert (await watch.step())["engine/generated_tokens"] == 60
    finally:
        await engine.close()


async def test_open_sessions_are_seen() -> None:
    async with engine_with_sessions() as engine, EngineWatch(engine) as watch:
        sessions = Sessions(engine, capacity=100)
        async with sessions.one():
            assert (await watch.step())["engine/sessions"] == 1
        assert (await watch.step())["engine/sessions"] == 0


async def test_an_engine_that_is_gone_is_down_and_the_watch_ends_all_the_same() -> None:
    engine = make_engine()
    async with EngineWatch(engine, every_s=0.0) as watch:
        await engine.close()
        await asyncio.sleep(0.01)
        assert await watch.step() == {"engine/up": 0}


@pytest.mark.parametrize("watched", [False, True])
async def test_looking_changes_no_step_of_the_engine(watched: bool) -> None:
    """Requests that come one turn of the loop after the other are batched in the same way, watched or not."""
    engine = make_engine()
    try:
        async with EngineWatch(engine, every_s=0.0):

            async def late(i: int) -> None:
                for _ in range(i):
                    if watched:
                        await engine.stats()
                    await asyncio.sleep(0)
                await engine.generate(request(f"r{i}", (65, 66, 67 + i)))

            await asyncio.gather(*(late(i) for i in range(4)))
            assert (await engine.stats()).num_steps_total == 33
    finally:
        await engine.close()
