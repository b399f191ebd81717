"""What ends an answer on request: kept in ids and log-probabilities."""

from __future__ import annotations

import pytest

from tests.contract.asking import Ids, ask, assert_greedy, prompts, reference_greedy
from tests.contract.under_test import Case


@pytest.mark.capability("Stop strings, over borders of tokens, kept in the answer")
async def test_a_stop_string_over_two_tokens_ends_the_answer_and_is_kept(case: Case) -> None:
    prompt, answer_ids, place, stop = _stop_over_two_tokens(case)
    request = ask(prompt, 24, stop=(stop,))
    if not await case.can("stop_strings", request):
        return
    answer = await case.engine.generate(request)
    assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)
    assert answer.token_ids == answer_ids[: place + 2]
    assert_greedy(case.reference, prompt, answer)


@pytest.mark.capability("Stop strings, over borders of tokens, kept in the answer")
async def test_the_first_of_several_stop_strings_ends_the_answer(case: Case) -> None:
    prompt, answer_ids, place, stop = _stop_over_two_tokens(case)
    request = ask(prompt, 24, stop=("never said", stop))
    if not await case.can("stop_strings", request):
        return
    answer = await case.engine.generate(request)
    assert (answer.token_ids, answer.stop_reason) == (answer_ids[: place + 2], stop)


@pytest.mark.capability("Stop token ids, kept in the answer")
async def test_a_stop_token_ends_the_answer_and_is_kept(case: Case) -> None:
    (prompt,) = prompts(14, seed=5)
    answer_ids = reference_greedy(case.reference, prompt, 24)
    place = next(i for i in range(4, 24) if answer_ids[i] not in answer_ids[:i])
    answer = await case.engine.generate(ask(prompt, 24, stop_token_ids=(answer_ids[place],)))
    assert (answer.finish_reason, answer.stop_reason) == ("stop", answer_ids[place])
    assert answer.token_ids == answer_ids[: place + 1]
    assert_greedy(case.reference, prompt, answer)


def _stop_over_two_tokens(case: Case) -> tuple[Ids, Ids, int, str]:
    """A prompt, its greedy answer, and printable text that starts in token `place` and ends with the next one."""
    decode = case.started.tokenizer.decode
    for prompt in prompts(*[10] * 100, seed=6):
        answer = reference_greedy(case.reference, prompt, 24)
        for place in range(3, 22):
            first, second = decode([answer[place]]), decode([answer[place + 1]])
            stop = first[-2:] + second
            printable = stop.isascii() and stop.isprintable() and first and second
            if printable and len(second) == 1 and len(first) > 1 and stop not in decode(list(answer[: place + 1])):
                return prompt, answer, place, stop
    raise AssertionError("no answer of 100 has two neighbours that are plain text")
