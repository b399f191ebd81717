"""LoRA: an adapter's answers are the merged model's, whoever else is in the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from skyrl_train.errors import RequestRejected, WeightUpdateError
from skyrl_train.types import AdapterWeights, WeightUpdate
from skyrl_train.weight_sync.sync import sync_weights
from tests.contract import models
from tests.contract.asking import ask, assert_greedy, prompts
from tests.contract.backends import ADAPTER_SEEDS
from tests.contract.under_test import Case

LORA = pytest.mark.setting("lora")
SERVED = pytest.mark.capability("LoRA: named adapters, mixed with the base model in a batch")
POLICY = pytest.mark.capability("LoRA: the policy as an adapter, updated as tensors")


@SERVED
@LORA
async def test_adapters_and_the_base_model_in_one_batch(case: Case) -> None:
    if case.is_refused():
        return
    wanted = prompts(9, 30, 70, seed=71)
    merged = {name: models.merged(case.reference, models.adapter(seed)) for name, seed in ADAPTER_SEEDS.items()}
    asked = [(name, prompt) for prompt in wanted for name in (None, *ADAPTER_SEEDS)]
    answers = await case.answers([ask(prompt, 16, adapter=name) for name, prompt in asked])
    for (name, prompt), answer in zip(asked, answers, strict=True):
        assert_greedy(case.reference if name is None else merged[name], prompt, answer)
    assert (
        len({answer.token_ids for (_, prompt), answer in zip(asked, answers, strict=True) if prompt == wanted[2]}) == 3
    )


@SERVED
@LORA
async def test_an_adapter_has_a_prefix_cache_of_its_own(case: Case) -> None:
    if case.is_refused():
        return
    (prompt,) = prompts(300, seed=72)
    for name, seed in ADAPTER_SEEDS.items():
        assert_greedy(case.reference, prompt, await case.engine.generate(ask(prompt, 8)))
        model = models.merged(case.reference, models.adapter(seed))
        assert_greedy(model, prompt, await case.engine.generate(ask(prompt, 8, adapter=name)))


@SERVED
@LORA
async def test_an_unknown_adapter_is_rejected(case: Case) -> None:
    if case.is_refused():
        return
    with pytest.raises(RequestRejected, match="no-such-adapter"):
        await case.engine.generate(ask([65, 66], 4, adapter="no-such-adapter"))
    assert len((await case.engine.generate(ask([65, 66], 4))).token_ids) == 4


@POLICY
@LORA
async def test_the_policy_is_the_adapter_of_the_last_update(case: Case) -> None:
    if case.is_refused():
        return
    wanted = prompts(9, 300, seed=73)
    for seed in (91, 92, 93):
        await _update_to(case, models.adapter(seed))
        model = models.merged(case.reference, models.adapter(seed))
        for prompt, answer in zip(wanted, await case.answers([ask(p, 12) for p in wanted]), strict=True):
            assert_greedy(model, prompt, answer)
            assert [span.version for span in answer.versions] == [case.started.version]
        name, named_seed = next(iter(ADAPTER_SEEDS.items()))
        named = await case.engine.generate(ask(wanted[0], 12, adapter=name))
        assert_greedy(models.merged(case.reference, models.adapter(named_seed)), wanted[0], named)
    await case.started.restore()
    assert_greedy(case.reference, wanted[0], await case.engine.generate(ask(wanted[0], 12)))


@POLICY
@LORA
async def test_an_adapter_that_does_not_fit_is_refused(case: Case) -> None:
    if case.is_refused():
        return
    good = models.adapter(91)
    bad = {name: torch.zeros(tensor.shape[0] + 1, tensor.shape[1]) for name, tensor in good.tensors.items()}
    case.started.version += 1
    await case.engine.pause("keep")
    with pytest.raises(WeightUpdateError):
        await case.engine.update_weights(
            WeightUpdate(version=case.started.version, source=AdapterWeights(tensors=bad, config=good.config))
        )
    await case.engine.update_weights(case.started.update_to(case.reference))
    await case.engine.resume()
    (prompt,) = prompts(20, seed=74)
    assert_greedy(case.reference, prompt, await case.engine.generate(ask(prompt, 12)))


@POLICY
async def test_without_adapters_an_adapter_as_policy_is_refused(case: Case) -> None:
    if "adapter_weights" in case.engine.info.capabilities:
        pytest.fail("this engine was started without adapters and says that it takes them")
    case.started.version += 1
    await case.engine.pause("keep")
    with pytest.raises(WeightUpdateError):
        await case.engine.update_weights(WeightUpdate(version=case.started.version, source=models.adapter(91)))
    await case.engine.update_weights(case.started.update_to(case.reference))
    await case.engine.resume()
    with pytest.raises(RequestRejected):
        await case.engine.generate(ask([65, 66], 4, adapter="first"))


async def _update_to(case: Case, adapter: Any) -> None:
    case.started.version += 1
    await sync_weights(case.engine, WeightUpdate(version=case.started.version, source=adapter))
