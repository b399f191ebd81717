"""Answers under grammars: sampled at temperature 1 from an untrained model, which would write anything.

Judges: json and a schema by hand, Python's re, and a recogniser of its own for EBNF. What shares the batch is judged
by the same requests without the others.
"""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest

from skyrl_train.engines.embedded import EmbeddedConfig, EmbeddedEngine
from skyrl_train.engines.embedded.core import EngineCore
from skyrl_train.errors import RequestRejected
from skyrl_train.types import (
    Completion,
    GenerateRequest,
    Grammar,
    GrammarKind,
    LocalWeights,
    SamplingParams,
    SessionRef,
    WeightUpdate,
)
from tests.engines.embedded.common import logprob_reference, make_core, random_prompts, request, run
from tests.engines.embedded.drafts.drafters import Knowing, source
from tests.tiny import EOS_ID, make_model, make_tokenizer

TOKENIZER = make_tokenizer()
SCHEMA = {
    "type": "object",
    "properties": {
        "n": {"type": "integer", "minimum": 0, "maximum": 99},
        "ok": {"type": "boolean"},
        "name": {"type": "string", "maxLength": 5},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["n", "ok", "name", "tags"],
    "additionalProperties": False,
}
PATTERN = r"(cat|dog)s?: [0-9]{3}(\.[a-f]+)?"
ARITHMETIC = """
root ::= term ("+" term){0,3}
term ::= [0-9]{1,2} | "(" root ")"
"""


def under(kind: GrammarKind, text: str | dict[str, Any]) -> Grammar:
    return Grammar(kind=kind, text=text if isinstance(text, str) else json.dumps(text))


def ask(
    name: str, prompt: tuple[int, ...], grammar: Grammar | None, max_new: int = 100, **more: Any
) -> GenerateRequest:
    return request(name, prompt, max_new, **{"temperature": 1.0, "seed": len(name), "grammar": grammar, **more})


def text_of(answer: Completion) -> str:
    ids = answer.token_ids
    assert EOS_ID not in ids[:-1]
    return str(TOKENIZER.decode(ids[:-1] if ids[-1] == EOS_ID else ids))


def is_arithmetic(text: str) -> bool:
    """A sum of one to four numbers of one or two digits, or of such sums in parentheses."""

    def sums(at: int) -> set[int]:
        ends = result = terms(at)
        for _ in range(3):
            ends = {end for start in ends if text[start : start + 1] == "+" for end in terms(start + 1)}
            result = result | ends
        return result

    def terms(at: int) -> set[int]:
        numbers = {at + size for size in (1, 2) if re.fullmatch(f"[0-9]{{{size}}}", text[at : at + size])}
        inner = sums(at + 1) if text[at : at + 1] == "(" else set()
        return numbers | {end + 1 for end in inner if text[end : end + 1] == ")"}

    return len(text) in sums(0)


def assert_follows(answer: Completion, grammar: Grammar) -> None:
    assert (answer.finish_reason, answer.stop_reason) == ("stop", None)
    text = text_of(answer)
    if grammar.kind == "regex":
        assert re.fullmatch(grammar.text, text), text
    elif grammar.kind == "ebnf":
        assert is_arithmetic(text), text
    else:
        value = json.loads(text)
        assert set(value) == set(SCHEMA["properties"])
        assert isinstance(value["n"], int) and 0 <= value["n"] <= 99 and isinstance(value["ok"], bool)
        # Bytes that are no character count as one for the grammar and may be several for the decoder.
        assert isinstance(value["name"], str) and (len(value["name"]) <= 5 or "\ufffd" in value["name"])
        assert len(value["tags"]) <= 3 and set(value["tags"]) <= {"a", "b"}


GRAMMARS = (under("json_schema", SCHEMA), under("regex", PATTERN), under("ebnf", ARITHMETIC))


def test_the_recogniser_of_sums_is_one() -> None:
    assert all(map(is_arithmetic, ("1", "12", "1+2+3+4", "(1+2)+(3)", "((7))")))
    assert not any(map(is_arithmetic, ("", "123", "1+", "1+2+3+4+5", "(1", "1)", "a")))


@pytest.mark.parametrize("grammar", GRAMMARS, ids=lambda grammar: grammar.kind)
def test_an_answer_follows_its_grammar(grammar: Grammar) -> None:
    core = make_core(max_num_seqs=8, json_whitespace=False, kv_cache_tokens=1100)
    prompts = random_prompts(*range(3, 19), seed=1)
    answers = run(core, [ask("r" * i, prompt, grammar) for i, prompt in enumerate(prompts)])
    ended = [answer for answer in answers if answer.finish_reason == "stop"]
    assert len(ended) >= 12  # the tail of what has no bound is long
    for answer in ended:
        assert_follows(answer, grammar)
    assert len({answer.token_ids for answer in ended}) > 8


def test_a_mixed_batch_leaves_the_others_as_they_are() -> None:
    prompts = random_prompts(5, 9, 13, 4, 7, 11, seed=2)
    plain = [
        ask("free", prompts[0], None, 30, top_p=0.9),
        ask("greedy", prompts[1], None, 30, temperature=0.0),
        ask("punished", prompts[2], None, 30, repetition_penalty=1.3),
    ]
    held = [
        ask(f"held{i}", prompt, grammar) for i, (prompt, grammar) in enumerate(zip(prompts[3:], GRAMMARS, strict=True))
    ]
    alone = run(make_core(), plain)
    mixed = run(make_core(max_num_seqs=6, kv_cache_tokens=900, json_whitespace=False), [*held, *plain])
    assert [(a.token_ids, a.logprobs) for a in mixed[3:]] == [(a.token_ids, a.logprobs) for a in alone]
    for answer, grammar in zip(mixed[:3], GRAMMARS, strict=True):
        assert_follows(answer, grammar)


def test_constrained_answers_get_no_drafts_and_the_others_do() -> None:
    prompts = random_prompts(5, 9, 13, 4, seed=12)
    requests = [
        ask("held", prompts[0], GRAMMARS[1]),
        ask("free", prompts[1], None, 40),
        ask("json", prompts[2], GRAMMARS[0]),
        ask("greedy", prompts[3], None, 40, temperature=0.0),
    ]
    settings: dict[str, Any] = {"json_whitespace": False, "kv_cache_tokens": 600, "max_num_batched_tokens": 48}
    wanted = run(make_core(**settings), requests)
    known = {item.request_id: answer.token_ids for item, answer in zip(requests, wanted, strict=True)}
    core = make_core(drafts=source(Knowing(known, 5)), **settings)
    assert [answer.token_ids for answer in run(core, requests)] == [answer.token_ids for answer in wanted]
    assert core.speculation is not None
    free = sum(len(known[name]) for name in ("free", "greedy"))
    assert free / 2 < core.speculation.counts.committed <= free


def test_truncation_and_penalties_choose_among_what_is_allowed() -> None:
    core = make_core(json_whitespace=False, max_num_seqs=6, kv_cache_tokens=900)
    prompts = random_prompts(4, 6, 8, seed=3)
    requests = [
        ask("likeliest", prompts[0], GRAMMARS[1], top_k=1),
        ask("greedy", prompts[0], GRAMMARS[1], temperature=0.0),
        ask("nucleus", prompts[1], GRAMMARS[1], top_p=0.3, min_p=0.1),
        ask("punished", prompts[2], GRAMMARS[0], repetition_penalty=1.5, frequency_penalty=0.5),
    ]
    answers = run(core, requests)
    for asked, answer in zip(requests, answers, strict=True):
        assert asked.sampling.grammar is not None
        assert_follows(answer, asked.sampling.grammar)
    assert answers[0].token_ids == answers[1].token_ids


def test_the_logprobs_are_those_of_the_model_without_a_grammar() -> None:
    prompt = random_prompts(9, seed=4)[0]
    answer = run(make_core(), [ask("r", prompt, GRAMMARS[1], temperature=0.7)])[0]
    wanted = logprob_reference(make_model(attn_implementation="eager"), prompt, answer.token_ids, 0.7)
    assert abs(wanted.numpy() - answer.logprobs).max() < 1e-4


def test_an_answer_is_the_same_through_retraction_pauses_and_new_weights() -> None:
    """The pool holds two of the six requests at a time."""
    prompts = random_prompts(6, 9, 5, 8, 12, 7, seed=5)
    requests = [
        ask(f"r{i}", prompt, GRAMMARS[i % 3], ignore_eos=True, priority=i % 2) for i, prompt in enumerate(prompts)
    ]
    alone = [run(make_core(json_whitespace=False), [item])[0] for item in requests]
    core = make_core(kv_cache_tokens=128, json_whitespace=False)
    for item in requests:
        core.add(item)
    done: dict[str, Completion] = {}
    for step in range(10_000):
        if not core.has_work:
            break
        done |= {item.completion.request_id: item.completion for item in core.step()}
        core.check_integrity()
        if step % 17 == 16:
            core.pause("keep")
            core.update_weights(WeightUpdate(version=core.policy_version + 1, source=LocalWeights()))
            core.check_integrity()
            core.resume()
    assert core.stats().num_retractions_total > 3
    for item, before in zip(requests, alone, strict=True):
        assert done[item.request_id].token_ids == before.token_ids
        assert done[item.request_id].finish_reason == before.finish_reason


def test_an_aborted_answer_goes_on_where_its_grammar_was() -> None:
    grammar, prompt = GRAMMARS[0], random_prompts(8, seed=6)[0]
    whole = run(make_core(json_whitespace=False), [ask("whole", prompt, grammar, seed=1)])[0]
    assert_follows(whole, grammar)
    core = make_core(json_whitespace=False)
    core.add(ask("first", prompt, grammar, seed=1))
    for _ in range(10):
        core.step()
    part = core.abort(["first"])[0].completion
    core.check_integrity()
    assert (part.finish_reason, part.token_ids) == ("abort", whole.token_ids[: len(part.token_ids)])
    assert 5 < len(part.token_ids) < len(whole.token_ids)
    again = GenerateRequest(
        request_id="again", prompt_token_ids=prompt, sampling=ask("x", prompt, grammar, seed=1).sampling, partial=part
    )
    assert run(core, [again])[0].token_ids == whole.token_ids


def test_a_partial_answer_that_breaks_the_grammar_is_refused() -> None:
    core, prompt = make_core(), (1, 2, 3)
    part = run(core, [ask("r", prompt, None, 3)])[0]
    sampling = ask("x", prompt, GRAMMARS[1]).sampling
    with pytest.raises(RequestRejected, match=r"again: token 0 of its partial answer, id \d+, ends its grammar or"):
        core.add(GenerateRequest(request_id="again", prompt_token_ids=prompt, sampling=sampling, partial=part))
    core.check_integrity()


def test_each_turn_of_a_session_begins_its_grammar_anew() -> None:
    core = make_core()
    session = core.sessions.open(capacity=128)
    parent = None
    for turn, prompt in enumerate(random_prompts(5, 3, 4, seed=7)):
        name = f"t{turn}"
        item = ask(name, prompt, GRAMMARS[1], 20)
        ref = SessionRef(session_id=session, parent_request_id=parent)
        answer = run(
            core, [GenerateRequest(request_id=name, prompt_token_ids=prompt, sampling=item.sampling, session=ref)]
        )
        assert_follows(answer[0], GRAMMARS[1])
        parent = name
    core.close_session(session)
    core.check_integrity()


def test_an_answer_that_ignores_end_tokens_ends_with_its_grammar() -> None:
    prompts = random_prompts(5, 6, seed=8)
    for answer in run(make_core(), [ask(f"r{i}", p, GRAMMARS[1], ignore_eos=True) for i, p in enumerate(prompts)]):
        assert_follows(answer, GRAMMARS[1])


def test_an_answer_that_is_too_long_is_cut_and_says_so() -> None:
    answer = run(make_core(), [ask("r", (1, 2, 3), GRAMMARS[1], 4)])[0]
    assert (answer.finish_reason, len(answer.token_ids)) == ("length", 4)
    assert any(word.startswith(text_of(answer)) for word in ("cat: ", "cats:", "dog: ", "dogs:"))


def test_special_tokens_are_no_text_of_a_json_string() -> None:
    schema = {"type": "array", "items": {"type": "string", "maxLength": 6}, "minItems": 4, "maxItems": 4}
    core = make_core(json_whitespace=False, max_num_seqs=8, kv_cache_tokens=1000)
    prompts = random_prompts(*range(3, 15), seed=9)
    special = set(TOKENIZER.all_special_ids)
    for answer in run(core, [ask("r" * i, p, under("json_schema", schema)) for i, p in enumerate(prompts)]):
        assert not special & set(answer.token_ids[:-1])
        assert len(json.loads(text_of(answer))) == 4


def test_a_stop_id_that_is_a_special_token_ends_an_answer_where_the_grammar_may_end() -> None:
    start = TOKENIZER.convert_tokens_to_ids("<|im_start|>")
    answers = run(
        make_core(),
        [
            ask("r" * i, p, GRAMMARS[1], stop_token_ids=(start,))
            for i, p in enumerate(random_prompts(*[5] * 8, seed=10))
        ],
    )
    for answer in answers:
        assert re.fullmatch(PATTERN, str(TOKENIZER.decode(answer.token_ids[:-1])))
    assert {answer.stop_reason for answer in answers} == {start, None}


@pytest.mark.parametrize("vocab_size", [272, 512])
def test_a_vocabulary_of_another_size_than_the_tokenizer_has_is_no_obstacle(vocab_size: int) -> None:
    """Rows of the logits without a token are never taken, and neither are tokens without a row."""
    core = make_core(make_model(vocab_size=vocab_size), json_whitespace=False, max_num_seqs=6, kv_cache_tokens=900)
    prompts = random_prompts(4, 6, 8, 10, 5, 12, seed=11)
    requests = [ask("r" * i, prompt, GRAMMARS[i % 3]) for i, prompt in enumerate(prompts)]
    for item, answer in zip(requests, run(core, requests), strict=True):
        assert max(answer.token_ids) < min(vocab_size, 300)
        if answer.finish_reason == "stop":
            assert item.sampling.grammar is not None
            assert_follows(answer, item.sampling.grammar)


@pytest.mark.parametrize(
    ("kind", "text", "wanted"),
    [
        ("regex", "(ab", r"its grammar \(regex\) can't be used: Regex parsing error at position 4: The parenthesis"),
        ("regex", r"(a)\1", "Backreference is not supported"),
        ("ebnf", 'start ::= "a"', 'root rule with name "root" is not found'),
        ("ebnf", 'root ::= "a" tail', 'Rule "tail" is not defined'),
        ("ebnf", "root ::= root", "no token of the vocabulary can come next in its grammar"),
        ("json_schema", "{", "Expecting property name enclosed"),
        ("json_schema", '{"type": "nope"}', 'Unsupported type "nope"'),
        (
            "json_schema",
            '{"type": "array", "uniqueItems": true}',
            r"schema has 'uniqueItems' \(#\), which an answer can't",
        ),
    ],
)
def test_a_grammar_that_is_wrong_is_refused_with_what_is_wrong(kind: GrammarKind, text: str, wanted: str) -> None:
    core = make_core()
    with pytest.raises(RequestRejected, match=f"r1: .*{wanted}"):
        core.add(ask("r1", (1, 2), under(kind, text)))
    core.check_integrity()
    assert not core.has_work


@pytest.mark.parametrize(
    "part",
    [{"maxLength": 300}, {"minLength": 3, "maxLength": 6}, {"pattern": "^[a-z]{150,300}$"}, {"pattern": "^.{1,4}$"}],
)
def test_strings_have_the_length_that_is_asked_for_and_no_control_characters(part: dict[str, Any]) -> None:
    grammar = under("json_schema", {"type": "string", **part})
    core = make_core(max_context_len=512, kv_cache_tokens=4096, max_num_seqs=8)
    prompts = random_prompts(*range(3, 11), seed=13)
    answers = run(core, [ask("r" * i, prompt, grammar, 500) for i, prompt in enumerate(prompts)])
    ended = [answer for answer in answers if answer.finish_reason == "stop"]
    assert len(ended) >= 4
    for answer in ended:
        text = json.loads(text_of(answer))
        assert "\ufffd" in text or part.get("minLength", 0) <= len(text) <= part.get("maxLength", 300)
        assert "pattern" not in part or "\ufffd" in text or re.fullmatch(part["pattern"], text)


def test_a_grammar_is_compiled_once_and_old_ones_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    from skyrl_train.engines.embedded.rules import grammar as module

    compiler = module.GrammarCompiler(TOKENIZER, 300, [EOS_ID])
    first = compiler.prepare("r", GRAMMARS[0])
    assert compiler.prepare("r", GRAMMARS[0]) is first
    assert compiler.prepare("r", GRAMMARS[1]) is not first
    assert compiler.num_cached_bytes > first.memory_size_bytes
    monkeypatch.setattr(module, "CACHE_BYTES", first.memory_size_bytes)
    assert compiler.prepare("r", GRAMMARS[0]) is first, "it was used last"
    assert compiler.num_cached_bytes == first.memory_size_bytes
    compiler.prepare("r", GRAMMARS[2])
    assert compiler.prepare("r", GRAMMARS[0]) is not first


@pytest.mark.parametrize("driver", ["inline", "thread"])
async def test_over_asyncio_a_grammar_is_followed_and_a_wrong_one_refused(driver: Any) -> None:
    config = EmbeddedConfig(max_num_seqs=4, kv_cache_tokens=256, max_context_len=128)
    engine = EmbeddedEngine(make_model(num_hidden_layers=1), TOKENIZER, config=config, driver=driver)
    good = [
        engine.generate(ask(f"r{i}", prompt, GRAMMARS[1])) for i, prompt in enumerate(random_prompts(4, 5, seed=14))
    ]
    with pytest.raises(RequestRejected, match=r"bad: its grammar \(regex\) can't be used"):
        await engine.generate(ask("bad", (1, 2), under("regex", "(")))
    for answer in await asyncio.gather(*good):
        assert_follows(answer, GRAMMARS[1])
    engine.core.check_integrity()
    await engine.close()


def test_a_grammar_and_a_least_length_are_refused_together() -> None:
    with pytest.raises(RequestRejected, match="r1: a grammar says where its answer may end, so min_new_tokens=3"):
        make_core().add(ask("r1", (1, 2), GRAMMARS[1], min_new_tokens=3))


def test_an_engine_without_a_backend_or_a_tokenizer_says_so() -> None:
    off = make_core(grammar_backend="none")
    assert "structured_output" not in off.info.capabilities
    with pytest.raises(RequestRejected, match="follows no grammars: it was started with grammar backend none"):
        off.add(ask("r1", (1, 2), GRAMMARS[1]))
    blind = EngineCore(make_model(), None, config=EmbeddedConfig(kv_cache_tokens=64, max_context_len=64))
    assert "structured_output" not in blind.info.capabilities
    with pytest.raises(RequestRejected, match="follows no grammars: it has no tokenizer"):
        blind.add(
            GenerateRequest(
                request_id="r1",
                prompt_token_ids=(1, 2),
                sampling=SamplingParams(max_new_tokens=3, grammar=GRAMMARS[1]),
            )
        )


def test_an_answer_that_the_tokenizer_can_not_write_ends_with_what_it_has() -> None:
    """Nothing can follow the first half of this grammar: the engine goes on, and says why that answer ended."""
    core = make_core()
    other, held = run(
        core,
        [ask("free", (1, 2, 3), None, 8), ask("held", (4, 5), under("ebnf", 'root ::= "ab" dead\ndead ::= dead "c"'))],
    )
    assert len(other.token_ids) == 8 or other.finish_reason == "stop"
    assert (held.finish_reason, text_of(held)) == ("abort", "ab")
    assert "grammar" in str(held.stop_reason)
