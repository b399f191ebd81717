"""Sleep gives memory back to the system, wake gets it again; between the two nothing is computed and nothing lost."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from skyrl_train.attention import ATTENTION_NAME
from skyrl_train.engines.embedded import EmbeddedConfig, EmbeddedEngine
from skyrl_train.engines.embedded.core import EngineCore
from skyrl_train.engines.embedded.drafts.build import standalone_source
from skyrl_train.errors import EngineError, RequestRejected, WeightUpdateError
from skyrl_train.types import GenerateRequest, LocalWeights, SessionRef, WeightUpdate
from skyrl_train.weight_sync.sync import Turns, sync_weights
from tests.engines.embedded.common import make_core, random_prompts, request, run
from tests.tiny import make_model, make_tokenizer

MIB = 2**20


def resident() -> int:
    """Bytes of this process that lie in memory."""
    with open("/proc/self/statm") as fields:
        return int(fields.read().split()[1]) * resource.getpagesize()


def touch_all(core: EngineCore) -> int:
    """As if every slot had been used; how many bytes that is."""
    pool = core.scheduler.pool
    for tensor in (*pool.keys.values(), *pool.values.values()):
        tensor.fill_(1.0)
    return pool.num_bytes


def asking(prompt: tuple[int, ...], name: str = "a", max_new: int = 8) -> GenerateRequest:
    return request(name, prompt, max_new, ignore_eos=True)


def serve(body: Callable[[EmbeddedEngine], Awaitable[None]]) -> None:
    async def whole() -> None:
        settings = EmbeddedConfig(
            max_num_seqs=4, max_num_batched_tokens=16, kv_cache_tokens=250_000, max_context_len=128
        )
        engine = EmbeddedEngine(make_model(num_hidden_layers=1), make_tokenizer(), config=settings)
        try:
            await asyncio.wait_for(body(engine), timeout=60)
        finally:
            await engine.close()

    asyncio.run(whole())


@pytest.mark.parametrize("num_tokens", [20_000, 200_000], ids=["from the heap", "mappings of their own"])
def test_a_sleeping_cache_is_out_of_memory_and_answers_after_it_are_the_same(num_tokens: int) -> None:
    core = make_core(make_model(num_hidden_layers=12 if num_tokens < 100_000 else 2), kv_cache_tokens=num_tokens)
    (prompt,) = random_prompts(40)
    (before,) = run(core, [asking(prompt)])
    size = touch_all(core)
    awake = resident()
    core.sleep(("kv_cache",))
    assert awake - resident() > 0.9 * size > 50 * MIB
    core.rest.end(("kv_cache",))
    assert awake - resident() > 0.9 * size, "memory that no token uses yet costs nothing"
    (after,) = run(core, [asking(prompt, "b")])
    assert after.num_cached_tokens == 0, "all prefixes were forgotten"
    assert (after.token_ids, after.logprobs) == (before.token_ids, before.logprobs)


def test_the_host_tier_sleeps_with_the_cache() -> None:
    core = make_core(make_model(), kv_cache_tokens=1000, host_cache_ratio=200.0)
    tier = core.scheduler.cache.tier
    assert tier is not None
    run(core, [asking(prompt, str(i)) for i, prompt in enumerate(random_prompts(*[100] * 12))])
    assert tier.num_tokens > 0
    for _, host in tier._layers():
        host.fill_(1.0)
    size, awake = sum(host.nbytes for _, host in tier._layers()), resident()
    core.sleep(("kv_cache",))
    assert awake - resident() > 0.9 * size > 50 * MIB
    core.rest.end(("kv_cache",))
    assert tier.num_tokens == 0
    core.check_integrity()


def test_a_draft_model_sleeps_too_and_guesses_as_well_after_it() -> None:
    model = make_model(attn_implementation=ATTENTION_NAME)
    drafts = standalone_source(model, model, max_guesses=3)
    core = EngineCore(model, None, config=EmbeddedConfig(kv_cache_tokens=100_000, max_context_len=128), drafts=drafts)
    assert core.speculation is not None
    drafter = core.speculation.drafter
    (prompt,) = random_prompts(40)
    (before,) = run(core, [asking(prompt, max_new=30)])
    guessed = core.speculation.counts.accept_rate
    assert guessed > 0.9, "it is the model itself"
    for tensors in (drafter.pools[0].keys, drafter.pools[0].values):
        for tensor in tensors.values():
            tensor.fill_(1.0)
    size, awake = touch_all(core) + drafter.pools[0].num_bytes, resident()
    core.sleep(("kv_cache", "weights"))
    assert awake - resident() > 0.9 * size > 50 * MIB
    core.rest.end(("kv_cache", "weights"))
    (after,) = run(core, [asking(prompt, "b", max_new=30)])
    assert after.token_ids == before.token_ids
    assert core.speculation.counts.accept_rate > 0.9


def test_packed_copies_of_the_weights_go_with_the_weights_and_come_again() -> None:
    model = make_model(hidden_size=1024, intermediate_size=4096, num_hidden_layers=2)
    core = make_core(model, pack_weights=True)
    (prompt,) = random_prompts(20)
    (before,) = run(core, [asking(prompt)])
    size = sum(p.nbytes for name, p in model.named_parameters() if "_proj" in name)
    awake = resident()
    core.sleep(("weights",))
    assert awake - resident() > 0.9 * size > 50 * MIB
    core.rest.end(("weights",))
    (after,) = run(core, [asking(prompt, "b")])
    assert after.token_ids == before.token_ids
    assert after.num_cached_tokens == 19, "the cache was awake all the time"


def test_it_sleeps_only_when_drained() -> None:
    async def body(engine: EmbeddedEngine) -> None:
        task = asyncio.create_task(engine.generate(asking((1, 2, 3), max_new=60)))
        while not (await engine.stats()).num_running:
            await asyncio.sleep(0)
        with pytest.raises(RequestRejected, match="1 requests run; it sleeps only when drained"):
            await engine.sleep(("kv_cache",))
        await engine.pause("keep")
        with pytest.raises(RequestRejected, match="it sleeps only when drained"):
            await engine.sleep(("kv_cache",))
        await engine.resume()
        assert len((await task).token_ids) == 60

    serve(body)


def test_requests_that_come_while_it_sleeps_are_served_when_all_is_awake() -> None:
    async def body(engine: EmbeddedEngine) -> None:
        await engine.sleep(("weights", "kv_cache"))
        task = asyncio.create_task(engine.generate(asking((1, 2, 3))))
        await engine.wake(("kv_cache",))
        await engine.wake(("kv_cache",))
        for _ in range(5):
            await asyncio.sleep(0)
        assert (await engine.stats()).num_steps_total == 0, "its weights still sleep"
        await engine.wake(("weights", "kv_cache"))
        assert len((await task).token_ids) == 8

    serve(body)


def test_what_sleeps_is_not_resumed_and_sleeping_weights_are_not_updated() -> None:
    async def body(engine: EmbeddedEngine) -> None:
        update = WeightUpdate(version=1, source=LocalWeights())
        await engine.pause("wait")
        await engine.sleep(("weights", "kv_cache"))
        await engine.sleep(("weights",))
        with pytest.raises(RequestRejected, match=r"sleeps \(kv_cache, weights\); wake it first"):
            await engine.resume()
        with pytest.raises(WeightUpdateError, match="wake them first"):
            await engine.update_weights(update)
        await engine.wake(("weights",))
        await engine.update_weights(update)
        with pytest.raises(RequestRejected, match=r"sleeps \(kv_cache\)"):
            await engine.resume()
        await engine.wake(("kv_cache",))
        await engine.resume()
        assert (await engine.generate(asking((1, 2)))).versions[0].version == 1

    serve(body)


def test_a_turn_of_the_trainer_has_the_memory_and_then_the_new_weights_are_served() -> None:
    async def body(engine: EmbeddedEngine) -> None:
        turns = Turns(releases=("kv_cache", "weights"), make_room=lambda: None)
        for version in (1, 2):
            size, in_rollouts = touch_all(engine.core), resident()
            await turns.to_trainer(engine)
            assert in_rollouts - resident() > 0.9 * size > 50 * MIB
            waiting = asyncio.create_task(engine.generate(asking((1, 2), str(version))))
            await asyncio.sleep(0)
            await sync_weights(engine, WeightUpdate(version=version, source=LocalWeights()), turns=turns)
            assert [span.version for span in (await waiting).versions] == [version]

    serve(body)


def test_a_session_goes_on_after_a_sleep_with_its_keys_computed_again() -> None:
    core = make_core(make_model(num_hidden_layers=1))
    session = core.sessions.open(128)
    (first_new, second_new) = random_prompts(20, 7)

    def turn(name: str, new: tuple[int, ...], parent: str | None) -> GenerateRequest:
        return replace(asking(new, name), session=SessionRef(session_id=session, parent_request_id=parent))

    (first,) = run(core, [turn("first", first_new, None)])
    core.sleep(("kv_cache",))
    core.check_integrity()
    core.rest.end(("kv_cache",))
    (second,) = run(core, [turn("second", second_new, "first")])
    assert second.num_cached_tokens == 0
    (whole,) = run(make_core(make_model(num_hidden_layers=1)), [asking(first_new + first.token_ids + second_new)])
    assert second.token_ids == whole.token_ids


def test_a_wake_without_room_says_so_and_can_be_repeated() -> None:
    core = make_core(make_model(), kv_cache_tokens=2_000_000)
    core.sleep(("kv_cache",))
    with open("/proc/self/statm") as fields:
        mapped = int(fields.read().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + 300 * MIB, limits[1]))
    try:
        with pytest.raises(EngineError, match="no room to wake kv_cache up"):
            core.rest.end(("kv_cache",))
        core.add(asking((1, 2, 3)))
        assert not core.has_work, "it still sleeps"
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    core.rest.end(("kv_cache",))
    while core.has_work:
        finished = core.step()
    assert len(finished[0].completion.token_ids) == 8
