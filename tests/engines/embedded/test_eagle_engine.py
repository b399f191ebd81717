"""EAGLE heads in an engine: with them or without, the answers are the same."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from skyrl_train.engines.embedded.core import EngineCore
from skyrl_train.engines.embedded.drafts.eagle.drafter import EagleDrafter, EagleSettings
from skyrl_train.engines.embedded.drafts.eagle.fresh import fresh_eagle3
from skyrl_train.engines.embedded.drafts.eagle.head import Eagle3Head
from skyrl_train.engines.embedded.drafts.eagle.source import eagle_settings, eagle_source, load_token_map
from skyrl_train.engines.embedded.request import RequestState, Seats
from skyrl_train.errors import ConfigError
from skyrl_train.training.eagle3 import AnsweredSequence, Eagle3Settings, Eagle3Trainer
from skyrl_train.training.optimizer import OptimizerSettings
from skyrl_train.types import Completion, GenerateRequest, LocalWeights, WeightUpdate
from tests.engines.embedded.common import make_core, random_prompts, request, run
from tests.engines.embedded.drafts.test_exactness import assert_same, random_requests
from tests.engines.embedded.test_eagle import make_head
from tests.tiny import make_model

CHAIN = EagleSettings(num_steps=4, topk=1, max_guesses=4)
TREE = EagleSettings(num_steps=3, topk=3, max_guesses=6)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make_model("qwen3", seed=3, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1)


def run_checked(core: EngineCore, requests: Sequence[GenerateRequest]) -> list[Completion]:
    """`run`, with a look at the drafter's own books after each step."""
    assert core.speculation is not None
    drafter = core.speculation.drafter
    assert isinstance(drafter, EagleDrafter)
    for item in requests:
        core.add(item)
    done: dict[str, Completion] = {}
    while core.has_work:
        done |= {item.completion.request_id: item.completion for item in core.step()}
        core.check_integrity()
        drafter.check_integrity(core.scheduler.seats)
    return [done[item.request_id] for item in requests]


@pytest.fixture(scope="module")
def wanted(model: PreTrainedModel) -> list[Completion]:
    return run(make_core(model), random_requests(5, 9))


@pytest.mark.parametrize("settings", [CHAIN, TREE], ids=["chain", "tree"])
@pytest.mark.parametrize("algorithm", ["eagle", "eagle3", "eagle3 of few words"])
def test_answers_are_those_without_drafts(
    model: PreTrainedModel, wanted: list[Completion], algorithm: str, settings: EagleSettings
) -> None:
    """Greedy and seeded, cut off, retracted for lack of room, with prefixes from the cache."""
    head = make_head(model, algorithm.split()[0], words=range(0, 300, 2) if "few" in algorithm else None)
    requests = random_requests(5, 9)
    core = make_core(model, drafts=eagle_source(model, head, settings), max_num_batched_tokens=48)
    for found, right in zip(run_checked(core, requests), wanted, strict=True):
        assert_same(found, right)
    assert core.speculation is not None and core.speculation.counts.verifications > 10


def test_a_trained_head_is_right_far_more_often() -> None:
    policy = make_model("qwen3", seed=5, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    with torch.no_grad():
        policy.lm_head.weight *= 4  # a policy that knows what it wants
    prompts = random_prompts(*[6] * 12, seed=1)

    def accept_len(head: Eagle3Head) -> float:
        core = make_core(policy, drafts=eagle_source(policy, head, CHAIN), kv_cache_tokens=1024)
        run(core, [request(str(i), prompt, 40, seed=i, temperature=1.0) for i, prompt in enumerate(prompts)])
        assert core.speculation is not None
        return core.speculation.counts.accept_len

    untrained, trained = fresh_eagle3(policy, seed=1), fresh_eagle3(policy, seed=1)
    settings = Eagle3Settings(optimizer=OptimizerSettings(lr=5e-3), num_unrolled=4)
    trainer = Eagle3Trainer(policy, trained, settings)
    answers = answered(make_core(policy, kv_cache_tokens=1024))
    for _ in range(60):
        trainer.step(answers)
    assert accept_len(trained) > accept_len(untrained) + 0.5


def answered(core: EngineCore) -> list[AnsweredSequence]:
    prompts = random_prompts(*[6] * 12, seed=1)
    found: list[Completion] = run(
        core, [request(str(i), prompt, 40, seed=i, temperature=1.0) for i, prompt in enumerate(prompts)]
    )
    return [
        AnsweredSequence(
            token_ids=torch.tensor([*prompt, *item.token_ids]),
            is_answer=torch.arange(len(prompt) + len(item.token_ids)) >= len(prompt),
        )
        for prompt, item in zip(prompts, found, strict=True)
    ]


@pytest.mark.parametrize("settings", [CHAIN, TREE], ids=["chain", "tree"])
def test_after_new_weights_the_answers_are_the_new_ones(settings: EagleSettings) -> None:
    policy = make_model("qwen3", seed=5, num_hidden_layers=2)
    head = fresh_eagle3(policy, seed=1)
    core = make_core(policy, drafts=eagle_source(policy, head, settings))
    requests = random_requests(6, 6)
    run(core, requests)
    core.pause("keep")
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(0.9)
    core.update_weights(WeightUpdate(version=1, source=LocalWeights()))
    core.resume()
    for found, right in zip(run(core, requests), run(make_core(policy), requests), strict=True):
        assert found.token_ids == right.token_ids


def test_the_three_keys_of_a_tree_have_a_meaning_together() -> None:
    assert eagle_settings(None, None, None) == EagleSettings(num_steps=3, topk=1, max_guesses=3)
    assert eagle_settings(None, None, 6) == EagleSettings(num_steps=5, topk=1, max_guesses=5)
    assert eagle_settings(3, 2, 6) == EagleSettings(num_steps=3, topk=2, max_guesses=5)
    assert eagle_settings(2, 2, 64) == EagleSettings(num_steps=2, topk=2, max_guesses=6)


def test_a_token_map_narrows_what_eagle_guesses(model: PreTrainedModel, tmp_path: Path) -> None:
    ids = [7, 3, 250, 9]
    torch.save(torch.tensor(ids), tmp_path / "hot.pt")
    words = load_token_map(tmp_path / "hot.pt")
    assert words.tolist() == sorted(ids)
    drafter = eagle_source(model, make_head(model, "eagle"), CHAIN, words=words).make(64, 2)
    seats = Seats(2, 32, [])
    seats.take(
        RequestState(
            request=request("0", (1, 2)),
            order=0,
            seed=0,
            tokens=np.array([1, 2, 3], dtype=np.int32),
            logprobs=np.zeros(3, dtype=np.float32),
        ),
        np.empty(0, dtype=np.int32),
    )
    seats.slots[:] = np.arange(64, dtype=np.int32).reshape(2, 32)
    drafts = drafter.propose(seats, np.array([1 if seats.owners[1] else 0]), np.array([4], dtype=np.int32))
    assert set(drafts.tokens[0].tolist()) <= set(ids)
    with pytest.raises(ConfigError, match="an eagle3 head has a vocabulary of its own"):
        eagle_source(model, fresh_eagle3(model, seed=0), CHAIN, words=words)
    with pytest.raises(ConfigError, match="names token 300, the model has 300"):
        eagle_source(model, make_head(model, "eagle"), CHAIN, words=torch.tensor([1, 300]))
    with pytest.raises(ConfigError, match="can't read token ids"):
        load_token_map(tmp_path / "nowhere.pt")


@pytest.mark.parametrize("settings", [CHAIN, TREE], ids=["chain", "tree"])
def test_a_cached_prefix_is_drafted_from_as_well_as_a_computed_one(settings: EagleSettings) -> None:
    """Siblings, a second turn, a prompt cut short: the same guesses are right with a cache and without."""
    policy = make_model("qwen3", seed=5, num_hidden_layers=2)
    head = fresh_eagle3(policy, seed=1)
    (prompt,) = random_prompts(30, seed=4)
    found = []
    for caching in (True, False):
        core = make_core(
            policy,
            drafts=eagle_source(policy, head, settings),
            enable_prefix_caching=caching,
            max_num_batched_tokens=256,
            kv_cache_tokens=1024,
        )
        first = run(core, [request(str(i), prompt, 20, temperature=1.0, seed=i) for i in range(3)])
        turns = [(*prompt, *item.token_ids, 7, 8, 9) for item in first]
        second = run(core, [request(f"{i} again", turn, 20, temperature=0.5, seed=i) for i, turn in enumerate(turns)])
        third = run(core, [request("short", prompt[:11], 20)])
        assert core.speculation is not None
        found.append(([*first, *second, *third], core.speculation.counts))
        assert (core.scheduler.num_cached_tokens_total > 0) == caching
    (with_cache, counts), (without, plain_counts) = found
    assert [item.token_ids for item in with_cache] == [item.token_ids for item in without]
    assert counts == plain_counts and counts.committed > counts.verifications


@pytest.mark.parametrize("settings", [CHAIN, TREE], ids=["chain", "tree"])
@pytest.mark.parametrize(
    "options", [{"deterministic": True}, {"pack_weights": False}, {"attention_backend": "reference"}]
)
def test_answers_hold_in_every_kind_of_engine(settings: EagleSettings, options: dict[str, Any]) -> None:
    policy = make_model("qwen3", seed=5, num_hidden_layers=2)
    requests = random_requests(7, 5)
    wanted = run(make_core(policy, **options), requests)
    core = make_core(policy, drafts=eagle_source(policy, fresh_eagle3(policy, seed=1), settings), **options)
    for found, right in zip(run(core, requests), wanted, strict=True):
        assert_same(found, right)


def test_a_bfloat16_model_has_a_bfloat16_head() -> None:
    policy = make_model("qwen3", seed=5, num_hidden_layers=2).to(torch.bfloat16)
    head = fresh_eagle3(policy, seed=1)
    core = make_core(policy, drafts=eagle_source(policy, head, CHAIN))
    requests = [request(str(i), prompt, 20) for i, prompt in enumerate(random_prompts(5, 9, 14))]
    assert all(len(item.token_ids) == 20 or item.finish_reason == "stop" for item in run(core, requests))
    assert core.speculation is not None and core.speculation.counts.verifications > 0
    assert core.speculation.counts.accept_len > 1
