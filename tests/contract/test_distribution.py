"""Sampled answers have the model's distribution, and speculation changes the speed alone."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from itertools import product

import pytest
from transformers import PreTrainedModel

from skyrl_train.errors import RequestRejected
from skyrl_train.types import GenerateRequest
from tests.contract import models
from tests.contract.asking import Ids, ask, assert_greedy, chi_square, prompts, reference_rows
from tests.contract.under_test import Case

NUM_SAMPLES = 2400
AT_ONCE = 48
SPECULATION = pytest.mark.setting("ngram", "standalone", "eagle", "eagle3")


@pytest.mark.capability("Sampling has the model's distribution")
async def test_sampled_pairs_have_the_models_odds(case: Case) -> None:
    await _check_odds(case, temperature=1.0)


@pytest.mark.capability("Sampling has the model's distribution")
async def test_temperature_reshapes_the_odds(case: Case) -> None:
    await _check_odds(case, temperature=0.6)


@pytest.mark.capability("Speculation ({setting}) on a CPU: greedy answers are the same")
@SPECULATION
async def test_speculation_keeps_greedy_answers(case: Case) -> None:
    if case.is_refused():
        return
    assert "speculation" in case.engine.info.capabilities
    # A drafting model is right about the policy now and then, n-grams about a text that repeats itself.
    wanted = [*prompts(5, 33, 200, seed=61), *(prompt * 8 for prompt in prompts(9, 6, seed=62))]
    await _check_greedy(case, case.reference, wanted)
    other = models.few_words()
    async with case.started.serving(other):
        await _check_greedy(case, other, wanted)
    accept_len = (await case.engine.stats()).accept_len
    assert accept_len is not None and accept_len > 1, "no draft was ever right: nothing was tested"


@pytest.mark.capability("Speculation ({setting}) on a CPU: sampled answers keep the distribution")
@SPECULATION
async def test_speculation_keeps_the_distribution(case: Case) -> None:
    """Where a server can't verify sampled drafts it must say so: an answer of another distribution is none."""
    if case.is_refused():
        return
    try:
        await case.engine.generate(ask([65, 66], 2, temperature=1.0))
    except RequestRejected as refusal:
        assert "temperature" in str(refusal)
        case.says_no()
        return
    await _check_odds(case, temperature=1.0)


async def _check_greedy(case: Case, model: PreTrainedModel, wanted: Sequence[Ids]) -> None:
    for prompt, answer in zip(wanted, await case.answers([ask(prompt, 48) for prompt in wanted]), strict=True):
        assert len(answer.token_ids) == 48
        assert_greedy(model, prompt, answer)


async def _check_odds(case: Case, *, temperature: float) -> None:
    """Counts the first two tokens of many answers. With speculation the second one is verified, not sampled: whatever
    the first one is, the prompt has it after the same two, and n-grams draft what followed there.
    """
    model = models.few_words()
    drafted = zip(models.FEW_IDS, (*models.FEW_IDS[3:], *models.FEW_IDS[:3]), strict=True)
    prompt = (*(token for first, second in drafted for token in (88, 89, first, second)), 88, 89)
    async with case.started.serving(model):
        gate = asyncio.Semaphore(AT_ONCE)

        async def one(request: GenerateRequest) -> tuple[int, ...]:
            async with gate:
                return (await case.engine.generate(request)).token_ids

        requests = [ask(prompt, 2, temperature=temperature, seed=number) for number in range(NUM_SAMPLES)]
        counts = Counter(await asyncio.gather(*(one(request) for request in requests)))
    first = (reference_rows(model, prompt, (models.FEW_IDS[0],))[0] / temperature).softmax(-1)
    odds: dict[tuple[int, ...], float] = {}
    for one_id in models.FEW_IDS:
        second = (reference_rows(model, prompt, (one_id, one_id))[1] / temperature).softmax(-1)
        odds |= {(one_id, two_id): float(first[one_id] * second[two_id]) for two_id in models.FEW_IDS}
    assert sum(odds.values()) > 0.999
    assert set(counts) <= set(product(models.FEW_IDS, repeat=2))
    statistic, limit = chi_square(dict(counts), odds)
    assert statistic < limit, f"{statistic:.1f} is over {limit:.1f}"
