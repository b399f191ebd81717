"""A random life of the engine on a tiny pool: after each step every slot has one owner, in the end answers are right.

The reference is the same request, alone, on an engine with room for it: company, cache, chunks, retraction and pauses
may change nothing but the time.
"""

from __future__ import annotations

import random

import pytest

from skyrl_train.engines.embedded.core import EngineCore
from skyrl_train.types import Completion, GenerateRequest, LocalWeights, WeightUpdate
from tests.engines.embedded.common import make_core, request, run
from tests.tiny import make_model

POOL = 110
CONTEXT = 90


def random_request(rng: random.Random, name: str, prompts: list[list[int]]) -> GenerateRequest:
    shared = rng.choice(prompts)
    prompt = shared[: rng.randint(1, len(shared))] + [rng.randrange(256) for _ in range(rng.randint(0, 5))]
    return request(
        name,
        prompt,
        rng.randint(1, CONTEXT - len(prompt)),
        priority=rng.randint(-1, 1),
        temperature=rng.choice([0.0, 1.0]),
        seed=rng.randrange(100),
        top_k=rng.choice([0, 0, 5]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.2]),
        ignore_eos=True,
    )


@pytest.mark.parametrize("seed", range(4))
def test_nothing_that_happens_around_a_request_changes_its_answer(seed: int) -> None:
    rng = random.Random(seed)
    model = make_model(num_hidden_layers=1)
    core = make_core(
        model,
        kv_cache_tokens=POOL,
        max_context_len=CONTEXT,
        max_num_seqs=rng.choice([2, 5]),
        max_num_batched_tokens=rng.choice([5, 11, 64]),
        enable_prefix_caching=rng.random() < 0.8,
        chunked_prefill=rng.random() < 0.8,
    )
    sent, done = random_life(core, rng, num_events=200)

    assert done.keys() == sent.keys()
    assert core.stats().num_running == core.stats().num_waiting == 0
    core.scheduler.cache.flush()
    assert core.scheduler.pool.num_free == POOL
    assert_answers_as_alone(make_core(model, max_context_len=CONTEXT, max_num_batched_tokens=64), sent, done)


def random_life(
    core: EngineCore, rng: random.Random, *, num_events: int
) -> tuple[dict[str, GenerateRequest], dict[str, Completion]]:
    """Requests come, are aborted, paused and met by weight updates; who was sent and who was answered, by id."""
    prompts = [[rng.randrange(256) for _ in range(rng.randint(3, 25))] for _ in range(3)]
    sent: dict[str, GenerateRequest] = {}
    done: dict[str, Completion] = {}

    def settle(finished: list) -> None:  # type: ignore[type-arg]
        for item in finished:
            assert item.completion.request_id not in done
            done[item.completion.request_id] = item.completion
        core.check_integrity()

    for _ in range(num_events):
        event = rng.random()
        if event < 0.25 and len(sent) < 20:
            for _ in range(rng.choice([1, 1, 4])):
                item = random_request(rng, str(len(sent)), prompts)
                sent[item.request_id] = item
                core.add(item)
        elif event < 0.28 and sent:
            settle(core.abort([rng.choice(list(sent))]))
        elif event < 0.31:
            settle(core.pause(rng.choice(["keep", "keep", "wait"])))
            while core.pause_state == "draining":
                settle(core.step())
            if rng.random() < 0.5:
                core.update_weights(WeightUpdate(version=core.policy_version + 1, source=LocalWeights()))
                assert core.scheduler.pool.num_free == POOL
            core.check_integrity()
            core.resume()
        elif core.has_work:
            settle(core.step())
    while core.has_work:
        settle(core.step())
    return sent, done


def assert_answers_as_alone(roomy: EngineCore, sent: dict[str, GenerateRequest], done: dict[str, Completion]) -> None:
    for name, item in sent.items():
        alone = run(roomy, [item])[0].token_ids
        answer = done[name]
        assert answer.token_ids == alone[: len(answer.token_ids)]
        if answer.finish_reason != "abort":
            assert answer.token_ids == alone
        versions = [span.version for span in answer.versions]
        assert versions == sorted(set(versions))


def test_the_stress_includes_retraction_and_eviction() -> None:
    """The pool above is small enough for what the stress is meant to reach."""
    rng = random.Random(1)
    core = make_core(make_model(num_hidden_layers=1), kv_cache_tokens=POOL, max_context_len=CONTEXT)
    run(core, [random_request(rng, str(i), [[1, 2, 3, 4], [1, 2, 9]]) for i in range(20)])
    stats = core.stats()
    assert stats.num_retractions_total > 0 and stats.num_evicted_tokens_total > 0 and stats.cache_hit_frac > 0
