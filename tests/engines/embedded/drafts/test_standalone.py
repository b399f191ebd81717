"""A small model drafts for a larger one."""

from __future__ import annotations

import pytest
import torch

from skyrl_train.engines.embedded.drafts.build import standalone_source
from skyrl_train.errors import ConfigError
from skyrl_train.types import LocalWeights, WeightUpdate
from tests.engines.embedded.common import make_core, random_prompts, request, run
from tests.engines.embedded.drafts.test_exactness import assert_same, random_requests
from tests.tiny import make_model


def nearly(model: torch.nn.Module, amount: float) -> torch.nn.Module:
    """The same model with a little noise on its weights."""
    other = make_model()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=amount)
    return other


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("draft", ["same", "near", "other"])
def test_answers_are_those_without_guesses(draft: str, caching: bool) -> None:
    model = make_model()
    small = {
        "same": lambda: make_model(),
        "near": lambda: nearly(model, 0.005),
        "other": lambda: make_model(seed=7, num_hidden_layers=1),
    }[draft]()
    requests = random_requests(4, 16)
    settings = {"enable_prefix_caching": caching, "kv_cache_tokens": 200, "max_num_batched_tokens": 40}
    wanted = run(make_core(model, **settings), requests)
    core = make_core(model, drafts=standalone_source(small, model, max_guesses=4), **settings)
    for found, right in zip(run(core, requests), wanted, strict=True):
        assert_same(found, right)
    accept_len = core.stats().accept_len
    assert accept_len is not None
    if draft == "near":
        assert 1.5 < accept_len < 5


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_drafts_for_itself_is_always_right(temperature: float) -> None:
    """So its keys are always those of the right tokens: behind shared, evicted and retracted prefixes."""
    model = make_model()
    draft = standalone_source(make_model(), model, max_guesses=3)
    core = make_core(model, drafts=draft, kv_cache_tokens=150, max_num_batched_tokens=64)
    shared = random_prompts(30, seed=2)[0]
    prompts = [shared + other for other in random_prompts(3, 9, 1, 14, 5, 8, 2, seed=3)]
    items = [
        request(str(i), prompt, 40, temperature=temperature, seed=i, ignore_eos=True)
        for i, prompt in enumerate(prompts * 2)
    ]
    run(core, items)
    assert core.speculation is not None
    stats, counts = core.stats(), core.speculation.counts
    assert stats.num_retractions_total > 0 and stats.num_evicted_tokens_total > 0
    assert counts.accept_rate == 1


def test_it_stays_right_when_now_and_then_nobody_asks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    core = make_core(model, drafts=standalone_source(make_model(), model, max_guesses=3), max_num_batched_tokens=64)
    speculation = core.speculation
    assert speculation is not None
    number, plan = 0, speculation.plan

    def now_and_then(*arguments: object, **more: object) -> object:
        nonlocal number
        number += 1
        return plan(*arguments, **more) if number % 7 < 3 else None  # type: ignore[arg-type]

    monkeypatch.setattr(speculation, "plan", now_and_then)
    prompts = random_prompts(5, 9, 12, seed=3)
    run(core, [request(str(i), prompt, 60, temperature=1.0, seed=i) for i, prompt in enumerate(prompts)])
    assert speculation.counts.guessed > 20 and speculation.counts.accept_rate == 1


def test_after_an_update_it_is_behind_and_drafts_as_before() -> None:
    model = make_model()
    core = make_core(model, drafts=standalone_source(make_model(), model, max_guesses=3), max_num_batched_tokens=64)
    run(core, [request("a", [1, 2, 3], 20)])
    assert core.speculation is not None and core.speculation.num_updates_behind == 0
    core.pause("keep")
    core.update_weights(WeightUpdate(version=1, source=LocalWeights()))
    core.resume()
    assert core.speculation.num_updates_behind == 1
    run(core, [request("b", [1, 2, 3], 20)])
    assert core.speculation.counts.accept_rate == 1, "the weights are the same ones"


def test_a_draft_model_of_another_vocabulary_is_refused() -> None:
    with pytest.raises(ConfigError, match="has 77 words, the model that it drafts for 300"):
        standalone_source(make_model(vocab_size=77, eos_token_id=1, pad_token_id=2), make_model(), max_guesses=3)
