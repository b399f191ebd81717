"""Evicted prefixes come back from host memory: fewer tokens computed, the same answers, within its size."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from skyrl_train.config.load import load_config
from skyrl_train.config.schema import Config
from skyrl_train.engines.embedded import EmbeddedConfig
from skyrl_train.engines.embedded.core import EngineCore
from skyrl_train.engines.embedded.drafts.base import Drafter, DraftSource
from skyrl_train.engines.embedded.drafts.build import ngram_source
from skyrl_train.engines.embedded.drafts.ngram import NgramSettings
from skyrl_train.engines.embedded.host_tier import BLOCK, Evicted, HostTier, block_hashes
from skyrl_train.engines.embedded.kv_pool import KVPool
from skyrl_train.engines.embedded.runner import KVShape
from skyrl_train.entrypoints.build import engine_over
from skyrl_train.errors import ConfigError
from skyrl_train.types import Completion, GenerateRequest, LocalWeights, SessionRef, WeightUpdate
from tests.engines.embedded.adapters.common import assert_is_of, make_adapted, merged, random_adapter
from tests.engines.embedded.common import Prompt, make_core, random_prompts, request, run
from tests.engines.embedded.test_sessions import count_prefill
from tests.engines.embedded.test_stress import CONTEXT, POOL, assert_answers_as_alone, random_request
from tests.tiny import make_model

MODEL = make_model(num_hidden_layers=2)
NAMESPACE = 0


def ask(prompt: Prompt, name: str = "a", max_new: int = 4) -> GenerateRequest:
    return request(name, prompt, max_new, ignore_eos=True)


def tier_of(core: EngineCore) -> HostTier:
    tier = core.scheduler.cache.tier
    assert tier is not None
    return tier


def evict_all(core: EngineCore) -> None:
    core.scheduler.cache.evict(core.scheduler.cache.num_evictable)


# -- the tier alone


def make_pool(num_slots: int = 200) -> KVPool:
    """Keys and values say which slot and layer they are of."""
    shape = KVShape(num_heads=2, num_kv_heads=1, head_dim=2, dtype=torch.float32)
    pool = KVPool({0: shape, 3: shape}, num_slots, torch.device("cpu"))
    for i, layer in enumerate((0, 3)):
        for j, tensors in enumerate((pool.keys, pool.values)):
            tensors[layer].copy_((torch.arange(num_slots + 1.0) * 10 + 2 * i + j)[:, None, None].expand(-1, 1, 2))
    return pool


def path(tokens: Prompt, slots: range, begin: int = 0) -> Evicted:
    return Evicted(
        namespace=NAMESPACE,
        tokens=np.asarray(tokens, dtype=np.int32),
        slots=np.asarray(slots, dtype=np.int32),
        begin=begin,
    )


def read(tier: HostTier, tokens: Prompt, begin: int, slots: range) -> int:
    found = tier.find(NAMESPACE, np.asarray(tokens, dtype=np.int32), begin)
    count = found.read_back(np.asarray(slots, dtype=np.int32))
    tier.check_integrity()
    return count


def test_whole_blocks_come_back_to_the_bit_wherever_they_are_put() -> None:
    pool = make_pool()
    tier = HostTier(pool, 100)
    (tokens,) = random_prompts(70)
    tier.keep([path(tokens, range(70), begin=40)])
    wanted = [(tensor[35:64].clone()) for tensors in (pool.keys, pool.values) for tensor in tensors.values()]
    assert read(tier, tokens, 0, range(100, 170)) == 0, "what stands before it is not here"
    assert read(tier, tokens, 35, range(100, 135)) == 64 - 35, "blocks 2 and 3, of the first what was asked for"
    found = [tensor[100:129] for tensors in (pool.keys, pool.values) for tensor in tensors.values()]
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
    assert read(tier, tokens, 40, range(100, 107)) == 7, "no more than there are slots"
    assert tier.num_read_total == 64 - 35 + 7


def test_another_beginning_or_namespace_is_another_block() -> None:
    (tokens,) = random_prompts(3 * BLOCK)
    changed = (tokens[0] ^ 1, *tokens[1:])
    a, b, c = (
        block_hashes(namespace, np.asarray(of, dtype=np.int32))
        for namespace, of in ((0, tokens), (0, changed), (1, tokens))
    )
    assert len({*a, *b, *c}) == 9
    assert block_hashes(0, np.asarray(tokens[:-1], dtype=np.int32)) == a[:2]


def test_the_least_recently_used_blocks_make_room_and_a_path_loses_its_end_first() -> None:
    tier = HostTier(make_pool(), 6 * BLOCK)
    first, second, third = random_prompts(*[3 * BLOCK] * 3)
    tier.keep([path(first, range(3 * BLOCK))])
    tier.keep([path(second, range(50, 50 + 3 * BLOCK))])
    assert read(tier, first, 0, range(100, 100 + 3 * BLOCK)) == 3 * BLOCK, "now the second is the older one"
    tier.keep([path(third[: 2 * BLOCK], range(2 * BLOCK))])
    assert read(tier, second, 0, range(100, 200)) == BLOCK
    assert read(tier, first, 0, range(100, 200)) == 3 * BLOCK
    assert tier.num_tokens == 6 * BLOCK


def test_more_than_it_holds_in_one_go_keeps_the_beginning() -> None:
    pool = make_pool()
    tier = HostTier(pool, 2 * BLOCK)
    (tokens,) = random_prompts(5 * BLOCK)
    tier.keep([path(tokens, range(5 * BLOCK))])
    wanted = pool.keys[3][: 2 * BLOCK].clone()
    assert read(tier, tokens, 0, range(100, 200)) == 2 * BLOCK
    assert torch.equal(pool.keys[3][100 : 100 + 2 * BLOCK], wanted)


def test_a_namespace_is_forgotten_alone() -> None:
    tier = HostTier(make_pool(), 100)
    (tokens,) = random_prompts(2 * BLOCK)
    tier.keep([path(tokens, range(2 * BLOCK)), replace(path(tokens, range(2 * BLOCK)), namespace=1)])
    tier.forget(1)
    assert read(tier, tokens, 0, range(100, 200)) == tier.num_tokens == 2 * BLOCK


# -- behind an engine


def test_a_prefix_that_was_evicted_is_read_back_and_what_is_computed_shrinks_by_that() -> None:
    core = make_core(MODEL, host_cache_ratio=2.0)
    (prompt,) = random_prompts(70)
    (first,) = run(core, [ask(prompt)])
    evict_all(core)
    rows = count_prefill(core)
    (second,) = run(core, [ask(prompt, "b")])
    assert second.num_cached_tokens == core.stats().num_host_cached_tokens_total == 64
    assert sum(rows) == 70 - 64
    assert (second.token_ids, second.logprobs) == (first.token_ids, pytest.approx(first.logprobs, abs=1e-5))


def test_the_last_token_of_a_prompt_is_computed_even_if_its_keys_are_on_the_host() -> None:
    core = make_core(MODEL, host_cache_ratio=2.0)
    (prompt,) = random_prompts(4 * BLOCK)
    (first,) = run(core, [ask(prompt)])
    evict_all(core)
    rows = count_prefill(core)
    (second,) = run(core, [ask(prompt, "b")])
    assert sum(rows) == 1 and second.token_ids == first.token_ids


def test_what_is_on_the_device_is_not_read_from_the_host() -> None:
    core = make_core(MODEL, host_cache_ratio=2.0)
    (prompt,) = random_prompts(96)
    run(core, [ask(prompt, max_new=1)])
    core.scheduler.cache.evict(96 - 40)
    (second,) = run(core, [ask(prompt, "b")])
    assert second.num_cached_tokens == 95
    assert core.stats().num_host_cached_tokens_total == 95 - 40


def test_a_group_reads_its_prefix_back_once() -> None:
    core = make_core(MODEL, host_cache_ratio=2.0)
    (prompt,) = random_prompts(64)
    (first,) = run(core, [ask(prompt)])
    evict_all(core)
    rows = count_prefill(core)
    answers = run(core, [ask(prompt, str(i)) for i in range(4)])
    assert {answer.token_ids for answer in answers} == {first.token_ids}
    assert core.stats().num_host_cached_tokens_total == 63
    assert sum(rows) == 4


def test_a_weight_update_and_a_flush_forget_the_host_too() -> None:
    core = make_core(MODEL, host_cache_ratio=2.0)
    (prompt,) = random_prompts(64)
    run(core, [ask(prompt)])
    evict_all(core)
    assert tier_of(core).num_tokens == 64
    core.pause("keep")
    core.update_weights(WeightUpdate(version=1, source=LocalWeights()))
    core.resume()
    assert tier_of(core).num_tokens == 0
    (second,) = run(core, [ask(prompt, "b")])
    assert second.num_cached_tokens == 0
    evict_all(core)
    core.flush_cache()
    assert tier_of(core).num_tokens == 0
    core.check_integrity()


def test_sessions_that_the_pool_can_not_hold_compute_their_new_tokens_only() -> None:
    core = make_core(MODEL, kv_cache_tokens=200, max_context_len=190, host_cache_ratio=5.0)
    sessions = [core.sessions.open(190) for _ in range(4)]
    prompts = random_prompts(*[33] * 4)
    parent = None
    rows = count_prefill(core)
    for number in range(4):
        for session, prompt in zip(sessions, prompts, strict=True):
            rows.clear()
            turn = ask(prompt, f"{session}-{number}", max_new=7)
            ref = SessionRef(session_id=session, parent_request_id=None if parent is None else f"{session}-{parent}")
            run(core, [replace(turn, session=ref)])
            # The last token was never read, and an evicted path loses what stands behind its last whole block.
            unread = 0 if parent is None else 1
            assert len(prompt) + unread <= sum(rows) <= len(prompt) + unread + BLOCK - 1
        parent = number
    assert core.stats().num_evicted_tokens_total > 0


@pytest.mark.parametrize(("seed", "ratio"), [(0, 4.0), (1, 0.3), (2, 4.0)])
def test_nothing_that_happens_around_a_request_changes_its_answer(seed: int, ratio: float) -> None:
    rng, model = random.Random(seed), make_model(num_hidden_layers=1)
    core = make_core(
        model,
        kv_cache_tokens=POOL,
        max_context_len=CONTEXT,
        max_num_seqs=rng.choice([2, 5]),
        max_num_batched_tokens=rng.choice([5, 11, 64]),
        chunked_prefill=rng.random() < 0.7,
        host_cache_ratio=ratio,
    )
    prompts = [[rng.randrange(256) for _ in range(rng.randint(20, 60))] for _ in range(4)]
    sent: dict[str, GenerateRequest] = {}
    done: dict[str, Completion] = {}

    def settle(finished: list) -> None:  # type: ignore[type-arg]
        done.update({item.completion.request_id: item.completion for item in finished})
        core.check_integrity()
        assert tier_of(core).num_tokens <= ratio * POOL

    for _ in range(150):
        event = rng.random()
        if event < 0.25 and len(sent) < 25:
            item = random_request(rng, str(len(sent)), prompts)
            sent[item.request_id] = item
            core.add(item)
        elif event < 0.27:
            settle(core.pause("keep"))
            core.update_weights(WeightUpdate(version=core.policy_version + 1, source=LocalWeights()))
            core.resume()
        elif event < 0.29 and not core.has_work:
            core.sleep(("kv_cache",))
            core.rest.end(("kv_cache",))
        elif core.has_work:
            settle(core.step())
    while core.has_work:
        settle(core.step())
    assert done.keys() == sent.keys()
    roomy = make_core(model, max_context_len=CONTEXT, max_num_batched_tokens=64)
    assert_answers_as_alone(roomy, sent, done)
    for name, item in sent.items():
        (alone,) = run(roomy, [item])
        assert done[name].logprobs == pytest.approx(alone.logprobs, abs=1e-4)
    assert core.stats().num_host_cached_tokens_total > 0


def test_in_deterministic_mode_log_probabilities_are_those_without_the_tier_to_the_bit() -> None:
    prompts = random_prompts(*[70] * 6)
    wanted = [ask(prompt, f"{i}-{turn}", 6) for turn in range(2) for i, prompt in enumerate(prompts)]
    with_tier, without = (
        make_core(MODEL, kv_cache_tokens=160, deterministic=True, **keys) for keys in ({"host_cache_ratio": 4.0}, {})
    )
    for item in wanted:
        (a,), (b,) = run(with_tier, [item]), run(without, [item])
        assert (a.token_ids, a.logprobs) == (b.token_ids, b.logprobs)
    assert with_tier.stats().num_host_cached_tokens_total >= 6 * 64 - 160


def test_guesses_from_ngrams_go_with_it() -> None:
    drafts = ngram_source(NgramSettings(max_guesses=4))
    config = EmbeddedConfig(kv_cache_tokens=200, max_context_len=128, max_num_seqs=2, host_cache_ratio=4.0)
    core = EngineCore(MODEL, None, config=config, drafts=drafts)
    wanted = [ask((i, *(7, 8, 9) * 20), f"{turn}-{i}", 40) for turn in range(2) for i in range(4)]
    answers = [run(core, [item])[0] for item in wanted]
    alone = make_core(MODEL, kv_cache_tokens=2000)
    assert [answer.token_ids for answer in answers] == [run(alone, [item])[0].token_ids for item in wanted]
    assert core.stats().num_host_cached_tokens_total > 0
    assert core.speculation is not None and core.speculation.counts.guessed > 0


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"host_cache_ratio": 1.0, "enable_prefix_caching": False}, "enable_prefix_caching=False has none"),
        ({"host_cache_ratio": 1.0, "host_cache_gb": 1.0}, "one of host_cache_ratio and host_cache_gb"),
        ({"host_cache_gb": 0.0}, "over 0"),
    ],
)
def test_a_size_that_makes_no_sense_is_refused(keys: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EmbeddedConfig(**keys)  # type: ignore[arg-type]


def test_a_size_below_one_block_is_refused_and_a_size_in_bytes_is_counted_in_tokens() -> None:
    with pytest.raises(ConfigError, match="would hold 12 tokens, and one block has 16"):
        make_core(MODEL, host_cache_ratio=0.05)
    # Two layers, keys and values, 2 heads of 16 numbers of 4 bytes: 512 bytes a token.
    assert tier_of(make_core(MODEL, host_cache_gb=512 * 160 / 1e9)).num_blocks == 10


def test_a_draft_with_keys_of_its_own_is_refused_beside_it() -> None:
    def make(num_slots: int, num_seats: int) -> Drafter:
        raise AssertionError("refused before it is made")

    config = EmbeddedConfig(kv_cache_tokens=256, host_cache_ratio=1.0)
    with pytest.raises(ConfigError, match="not those of a draft model or head"):
        EngineCore(MODEL, None, config=config, drafts=DraftSource(bytes_per_token=8, make=make))


def loaded(*overrides: str) -> Config:
    return load_config(["trainer.placement.policy_num_gpus_per_node=0", *overrides]).config


@pytest.mark.parametrize(
    ("overrides", "num_tokens"),
    [
        ((), None),
        (("enabled=true",), 2 * 1600),
        (("enabled=true", "ratio=0.5"), 800),
        (("enabled=true", "size_gb=1", "write_policy=write_back"), 10**9 // 512),
    ],
)
def test_the_keys_of_the_hierarchical_cache_size_it(overrides: tuple[str, ...], num_tokens: int | None) -> None:
    config = loaded(
        *(f"generator.hierarchical_cache.{override}" for override in overrides),
        "+generator.engine_init_kwargs.kv_cache_tokens=1600",
        "generator.max_model_len=128",
    )
    engine = engine_over(MODEL, config, None)
    tier = engine.core.scheduler.cache.tier
    assert (None if tier is None else tier.num_blocks) == (None if num_tokens is None else num_tokens // BLOCK)


def test_a_host_cache_beside_a_draft_model_is_refused_before_either_is_loaded() -> None:
    with pytest.raises(ConfigError, match=r"worthless after it; .*algorithm=ngram"):
        loaded(
            "generator.hierarchical_cache.enabled=true",
            "generator.speculative_decoding.enabled=true",
            "generator.speculative_decoding.algorithm=standalone",
            "generator.speculative_decoding.draft_model_path=somewhere",
        )


def test_a_host_cache_on_a_gpu_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(ConfigError, match="the embedded engine has it on the CPU only"):
        load_config(["trainer.placement.policy_num_gpus_per_node=1", "generator.hierarchical_cache.enabled=true"])


def test_a_size_without_the_cache_is_said_to_have_no_effect() -> None:
    loaded_config = load_config(
        ["trainer.placement.policy_num_gpus_per_node=0", "generator.hierarchical_cache.ratio=3.0"]
    )
    assert any("ratio" in text and "has no effect" in text for text in loaded_config.warnings)


def test_adapters_find_their_own_prefixes_on_the_host_and_an_unloaded_ones_are_gone() -> None:
    weights = {"first": random_adapter(1), "second": random_adapter(2)}
    core = make_adapted(kv_cache_tokens=100, max_context_len=90, host_cache_ratio=6.0)
    assert core.adapters is not None
    for name, tensors in weights.items():
        core.adapters.load(name, tensors, paused=False)
    (prompt,) = random_prompts(64)
    for turn in range(2):
        for adapter in (None, *weights):
            item = replace(ask(prompt, f"{adapter}-{turn}", 12), adapter=adapter)
            (answer,) = run(core, [item])
            assert answer.num_cached_tokens == 63 * turn
            assert_is_of(merged(weights.get(adapter or "")), item, answer)
    assert core.stats().num_host_cached_tokens_total >= 2 * 63
    held = tier_of(core).num_tokens
    core.adapters.unload("first")
    core.check_integrity()
    assert tier_of(core).num_tokens <= held - 64
