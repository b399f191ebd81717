"""Log-probabilities are the model's, in the space that the engine names."""

from __future__ import annotations

import pytest

from tests.contract.asking import ask, assert_greedy, assert_logprobs, in_space, prompts, reference_rows
from tests.contract.under_test import Case

pytestmark = pytest.mark.capability("Log-probabilities equal transformers' (1e-3, float32)")


async def test_sampled_tokens(case: Case) -> None:
    wanted = prompts(1, 5, 33, 200)
    for prompt, answer in zip(
        wanted, await case.answers([ask(prompt, 24, temperature=1.0) for prompt in wanted]), strict=True
    ):
        assert_logprobs(reference_rows(case.reference, prompt, answer.token_ids), answer)


async def test_greedy_tokens(case: Case) -> None:
    wanted = prompts(1, 5, 33, 200, seed=1)
    for prompt, answer in zip(wanted, await case.answers([ask(prompt, 24) for prompt in wanted]), strict=True):
        assert_greedy(case.reference, prompt, answer)


async def test_temperature_is_in_them_as_the_space_says(case: Case) -> None:
    (prompt,) = prompts(21, seed=2)
    answer = await case.engine.generate(ask(prompt, 64, temperature=0.7))
    rows = reference_rows(case.reference, prompt, answer.token_ids)
    assert_logprobs(in_space(rows, case.engine.info.logprob_space, 0.7), answer)


async def test_truncation_is_in_them_as_the_space_says(case: Case) -> None:
    (prompt,) = prompts(21, seed=3)
    answer = await case.engine.generate(ask(prompt, 64, temperature=1.0, top_k=4))
    rows = reference_rows(case.reference, prompt, answer.token_ids)
    kept = rows.topk(4, dim=-1).values[:, -1:]
    for place, token in enumerate(answer.token_ids):
        assert rows[place, token] >= kept[place] - 1e-3, "a token outside of the four likeliest"
    if case.engine.info.logprob_space == "sampled":
        rows = rows.masked_fill(rows < kept, float("-inf")).log_softmax(-1)
    assert_logprobs(rows, answer)


@pytest.mark.capability("A seed repeats a sample")
async def test_a_seed_repeats_a_sample(case: Case) -> None:
    (prompt,) = prompts(12, seed=4)
    # An engine that can't leaves the seed unread and says so in its capabilities: it is no reason to refuse.
    if not await case.can("seed"):
        assert len((await case.engine.generate(ask(prompt, 8, temperature=1.0, seed=5))).token_ids) == 8
        return
    requests = [ask(prompt, 24, temperature=1.0, seed=seed) for seed in (5, 5, 6)]
    first, second, other = await case.answers(requests)
    assert first.token_ids == second.token_ids
    assert first.token_ids != other.token_ids
