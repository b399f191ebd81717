"""What is sampled: lengths, ends, stops, and greedy answers that never differ."""

from __future__ import annotations

import pytest

from skyrl_train.errors import RequestRejected
from tests.contract.asking import (
    answer_that_ends,
    ask,
    assert_greedy,
    prompts,
    reference_greedy,
)
from tests.contract.under_test import Case
from tests.tiny import EOS_ID, VOCAB_SIZE

pytestmark = pytest.mark.capability("Generation: lengths, end token, greedy answers")


async def test_an_answer_has_the_asked_length_and_ids_of_the_vocabulary(case: Case) -> None:
    requests = [ask(prompt, 24, temperature=1.0) for prompt in prompts(1, 5, 33, 200)]
    for request, answer in zip(requests, await case.answers(requests), strict=True):
        assert answer.request_id == request.request_id
        assert (len(answer.token_ids), answer.finish_reason, answer.stop_reason) == (24, "length", None)
        assert all(0 <= token < VOCAB_SIZE for token in answer.token_ids)
        version = (await case.engine.stats()).policy_version
        assert [(span.version, span.start, span.end) for span in answer.versions] == [(version, 0, 24)]


async def test_the_end_token_ends_an_answer_and_is_kept(case: Case) -> None:
    prompt, place = answer_that_ends(case.reference)
    answer = await case.engine.generate(ask(prompt, 48, ignore_eos=False))
    assert (answer.finish_reason, answer.stop_reason) == ("stop", None)
    assert answer.token_ids[-1] == EOS_ID
    assert len(answer.token_ids) == place + 1
    assert_greedy(case.reference, prompt, answer)


async def test_an_ignored_end_token_ends_nothing(case: Case) -> None:
    prompt, place = answer_that_ends(case.reference)
    answer = await case.engine.generate(ask(prompt, 48, ignore_eos=True))
    assert (answer.finish_reason, len(answer.token_ids)) == ("length", 48)
    assert answer.token_ids[place] == EOS_ID


async def test_no_end_comes_before_min_new_tokens(case: Case) -> None:
    prompt, place = answer_that_ends(case.reference)
    answer = await case.engine.generate(ask(prompt, 48, ignore_eos=False, min_new_tokens=place + 5))
    assert EOS_ID not in answer.token_ids[: place + 5]
    assert len(answer.token_ids) >= place + 5


async def test_greedy_is_the_same_alone_again_and_in_a_batch(case: Case) -> None:
    wanted = prompts(3, 17, 40, 90, 128, 129, 7, 64)
    alone = [await case.engine.generate(ask(prompt, 16)) for prompt in wanted]
    again = [await case.engine.generate(ask(prompt, 16)) for prompt in wanted[:2]]
    together = await case.answers([ask(prompt, 16) for prompt in wanted])
    assert [answer.token_ids for answer in again] == [answer.token_ids for answer in alone[:2]]
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
    assert alone[1].token_ids == reference_greedy(case.reference, wanted[1], 16)


async def test_sixty_four_at_once_are_all_right(case: Case) -> None:
    wanted = prompts(*range(5, 69), seed=3)
    answers = await case.answers([ask(prompt, 20) for prompt in wanted])
    for prompt, answer in zip(wanted, answers, strict=True):
        assert len(answer.token_ids) == 20
        assert_greedy(case.reference, prompt, answer)


@pytest.mark.capability("Refusals: too long, ids outside the vocabulary")
async def test_a_prompt_that_is_too_long_is_rejected(case: Case) -> None:
    length = case.engine.info.max_context_len
    with pytest.raises(RequestRejected):
        await case.engine.generate(ask([65] * (length + 1), 8))
    assert len((await case.engine.generate(ask([65] * 8, 4))).token_ids) == 4


@pytest.mark.capability("Refusals: too long, ids outside the vocabulary")
async def test_an_answer_that_would_not_fit_is_rejected(case: Case) -> None:
    length = case.engine.info.max_context_len
    with pytest.raises(RequestRejected):
        await case.engine.generate(ask([65] * (length - 4), 8))


@pytest.mark.capability("Refusals: too long, ids outside the vocabulary")
@pytest.mark.parametrize("token", [VOCAB_SIZE, -1])
async def test_an_id_outside_the_vocabulary_is_rejected_and_the_engine_lives(case: Case, token: int) -> None:
    with pytest.raises(RequestRejected):
        await case.engine.generate(ask([65, token, 66], 8))
    assert len((await case.engine.generate(ask([65, 66], 4))).token_ids) == 4
