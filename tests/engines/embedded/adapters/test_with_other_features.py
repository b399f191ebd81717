"""Adapters beside drafts, sleep, the host tier, queue orders, preemption and low precision."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from skyrl_train.attention import ATTENTION_NAME
from skyrl_train.engines.embedded.adapters.settings import LoraLimits
from skyrl_train.engines.embedded.core import EngineCore
from skyrl_train.engines.embedded.drafts.base import DraftSource
from skyrl_train.engines.embedded.drafts.build import ngram_source, standalone_source
from skyrl_train.engines.embedded.drafts.ngram import NgramSettings
from skyrl_train.errors import RequestRejected
from skyrl_train.types import GenerateRequest, SessionRef, WeightUpdate
from tests.engines.embedded.adapters.common import ask, assert_is_of, base, make_adapted, merged, random_adapter, save
from tests.engines.embedded.common import make_core, random_prompts, run

ADAPTERS = {"a": random_adapter(1), "b": random_adapter(2, rank=2, modules=("q_proj", "up_proj"))}
NAMES = (None, *ADAPTERS)
PROMPTS = random_prompts(40, 9, 22, seed=3)


def filled(core: EngineCore) -> EngineCore:
    assert core.adapters is not None
    for name, weights in ADAPTERS.items():
        core.adapters.load(name, weights, paused=False)
    return core


def requests(max_new: int = 24) -> list[GenerateRequest]:
    """Greedy and drawn ones of each adapter and of none."""
    return [
        ask(f"{name}-{i}-{k}", name, prompt, max_new, temperature=k, seed=i)
        for i, prompt in enumerate(PROMPTS)
        for name in NAMES
        for k in range(2)
    ]


def answers(core: EngineCore) -> dict[str, tuple[int, ...]]:
    return {answer.request_id: answer.token_ids for answer in run(core, requests())}


@pytest.fixture(scope="module")
def wanted() -> dict[str, tuple[int, ...]]:
    return answers(filled(make_adapted()))


def ngrams() -> DraftSource:
    return ngram_source(NgramSettings(max_guesses=4))


def draft() -> DraftSource:
    return standalone_source(base(ATTENTION_NAME), base(ATTENTION_NAME), max_guesses=3)


@pytest.mark.parametrize("source", [ngrams, draft])
def test_drafts_change_no_answer_of_an_adapter(source, wanted: dict) -> None:  # type: ignore[no-untyped-def, type-arg]
    core = make_core(
        base(ATTENTION_NAME), drafts=source(), lora=LoraLimits(), max_num_seqs=8, max_num_batched_tokens=64,
        kv_cache_tokens=1024,
    )  # fmt: skip
    assert answers(filled(core)) == wanted
    accept_len = core.stats().accept_len
    assert accept_len is not None and accept_len > 1, "guesses were made, and some were right"


def test_evicted_prefixes_come_back_under_their_own_adapter_alone(wanted: dict) -> None:  # type: ignore[type-arg]
    core = filled(make_adapted(host_cache_ratio=4.0))
    for _ in range(2):
        for name in NAMES:
            item = ask(f"{name}-0-0", name, PROMPTS[0], 24)
            (answer,) = run(core, [item])
            assert answer.token_ids == wanted[item.request_id]
            core.scheduler.cache.evict(core.scheduler.cache.num_evictable)
            core.check_integrity()
    assert answer.num_cached_tokens >= 32, "two blocks of the prompt were read back"
    assert core.adapters is not None
    core.adapters.load("b", random_adapter(7), paused=False)
    item = ask("new", "b", PROMPTS[0])
    (answer,) = run(core, [item])
    assert answer.num_cached_tokens == 0
    assert_is_of(merged(random_adapter(7)), item, answer)


@pytest.mark.parametrize(
    "settings", [{"scheduling_policy": "lpm"}, {"preemption_threshold": 1, "max_num_seqs": 2}, {"max_num_seqs": 2}]
)
def test_the_order_of_the_queue_changes_no_answer(settings: dict, wanted: dict) -> None:  # type: ignore[type-arg]
    core = filled(make_adapted(LoraLimits(max_in_batch=2), **settings))
    items = requests()
    pending, done = list(items), {}
    while pending or core.has_work:
        if pending:
            item = pending.pop(0)
            urgent = GenerateRequest(
                request_id=item.request_id, prompt_token_ids=item.prompt_token_ids, sampling=item.sampling,
                adapter=item.adapter, priority=len(pending) % 3,
            )  # fmt: skip
            core.add(urgent)
        for finished in core.step():
            done[finished.completion.request_id] = finished.completion.token_ids
        core.check_integrity()
        assert len({state.request.adapter for state in core.scheduler.running()}) <= 2
    assert done == wanted


def test_an_engine_that_slept_serves_its_adapters(wanted: dict) -> None:  # type: ignore[type-arg]
    core = filled(make_adapted(pack_weights=True))
    core.pause("keep")
    core.update_weights(WeightUpdate(version=1, source=random_adapter(5)))
    core.sleep(("weights", "kv_cache"))
    core.rest.end(("weights", "kv_cache"))
    core.resume()
    item = ask("policy", None, PROMPTS[0])
    assert_is_of(merged(random_adapter(5)), item, run(core, [item])[0])
    named = [item for item in requests() if item.adapter]
    for item, answer in zip(named, run(core, named), strict=True):
        assert answer.token_ids == wanted[item.request_id]


def test_a_session_goes_on_after_its_adapter_left_memory_as_the_answer_ended(tmp_path: Path) -> None:
    paths = {name: save(weights, tmp_path / name) for name, weights in ADAPTERS.items()}
    core = make_adapted(LoraLimits(paths=paths, max_loaded=1))
    session = core.sessions.open(200)
    turns = [
        replace(ask(name, "a", PROMPTS[1]), session=SessionRef(session_id=session, parent_request_id=parent))
        for name, parent in (("one", None), ("two", "one"))
    ]
    longer = ask("longer", "b", PROMPTS[1], 24)  # so there is one adapter too many when the first turn ends
    first, _ = run(core, [turns[0], longer])
    second = run(core, [turns[1]])[0]
    whole = (*PROMPTS[1], *first.token_ids, *PROMPTS[1])
    assert second.token_ids == run(filled(make_adapted()), [ask("plain", "a", whole)])[0].token_ids
    core.close_session(session)
    core.check_integrity()


def test_an_adapter_that_was_read_for_a_refused_request_leaves_again(tmp_path: Path) -> None:
    paths = {name: save(weights, tmp_path / name) for name, weights in ADAPTERS.items()}
    core = make_adapted(LoraLimits(paths=paths, max_loaded=1))
    session = core.sessions.open(4)
    for name in ADAPTERS:
        with pytest.raises(RequestRejected, match="more capacity"):
            core.add(replace(ask(name, name, PROMPTS[1]), session=SessionRef(session_id=session)))
        core.check_integrity()


def test_in_bfloat16_answers_are_near_those_of_the_merged_model() -> None:
    model = base(ATTENTION_NAME).bfloat16()
    core = filled(make_core(model, lora=LoraLimits(), max_num_seqs=8, max_num_batched_tokens=64, kv_cache_tokens=1024))
    items = [ask(f"{name}", name, PROMPTS[0], 8) for name in NAMES]
    for item, answer in zip(items, run(core, items), strict=True):
        judge = merged(None if item.adapter is None else ADAPTERS[item.adapter])
        ids = torch.tensor([[*item.prompt_token_ids, *answer.token_ids]])
        with torch.no_grad():
            rows = judge(input_ids=ids).logits[0, len(item.prompt_token_ids) - 1 : -1].log_softmax(-1)
        expected = rows.gather(-1, torch.tensor(answer.token_ids)[:, None])[:, 0].numpy()
        np.testing.assert_allclose(answer.logprobs, expected, atol=0.25)
