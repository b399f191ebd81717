"""Answers that follow a grammar, and nothing but."""

from __future__ import annotations

import json
import re

import pytest

from skyrl_train.types import Grammar
from tests.contract.asking import ask, prompts
from tests.contract.under_test import Case

SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}, "ok": {"type": "boolean"}},
    "required": ["n", "ok"],
    "additionalProperties": False,
}


@pytest.mark.capability("Structured output: regular expressions")
async def test_an_answer_follows_a_regular_expression(case: Case) -> None:
    pattern = r"(cat|dog): [0-9]{3}"
    requests = [
        ask(prompt, 32, temperature=1.0, ignore_eos=False, grammar=Grammar(kind="regex", text=pattern))
        for prompt in prompts(5, 20, 33, seed=91)
    ]
    if not await case.can("structured_output", requests[0]):
        return
    for answer in await case.answers(requests):
        assert answer.finish_reason == "stop"
        assert re.fullmatch(pattern, _text(case, answer.token_ids))


@pytest.mark.capability("Structured output: JSON schema")
async def test_an_answer_follows_a_json_schema(case: Case) -> None:
    request = ask(
        prompts(12, seed=92)[0],
        96,
        temperature=1.0,
        ignore_eos=False,
        grammar=Grammar(kind="json_schema", text=json.dumps(SCHEMA)),
    )
    if not await case.can("structured_output", request):
        return
    value = json.loads(_text(case, (await case.engine.generate(request)).token_ids))
    assert set(value) == {"n", "ok"} and isinstance(value["ok"], bool) and 0 <= value["n"] <= 9


@pytest.mark.capability("Structured output: EBNF")
async def test_an_answer_follows_a_grammar_in_ebnf(case: Case) -> None:
    grammar = Grammar(kind="ebnf", text='root ::= ("yes" | "no") " " [0-9]')
    request = ask(prompts(12, seed=93)[0], 16, temperature=1.0, ignore_eos=False, grammar=grammar)
    if not await case.can("structured_output", request):
        return
    answer = await case.engine.generate(request)
    assert re.fullmatch(r"(yes|no) [0-9]", _text(case, answer.token_ids))


def _text(case: Case, token_ids: tuple[int, ...]) -> str:
    return str(case.started.tokenizer.decode(list(token_ids), skip_special_tokens=True))
