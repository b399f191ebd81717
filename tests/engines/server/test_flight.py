"""A request over several attempts: budget, versions, seeds, and what a next attempt has to sample again."""

from __future__ import annotations

from dataclasses import replace

from skyrl_train.engines.server.client import Attempt, AttemptResult, WireSpan
from skyrl_train.engines.server.flight import Flight
from skyrl_train.types import Completion, GenerateRequest, Grammar, SamplingParams, VersionSpan

SAMPLING = SamplingParams(max_new_tokens=10, min_new_tokens=4, seed=7)


def flight(sampling: SamplingParams = SAMPLING, partial: Completion | None = None) -> Flight:
    return Flight(
        request=GenerateRequest(request_id="r", prompt_token_ids=(1, 2), sampling=sampling, partial=partial),
        before=(9,),
    )


def attempt(made: Flight, name: str = "r#1") -> Attempt:
    return made.attempt(name, session=None, adapter=None, with_seed=True, token_ids=made.whole_prompt)


def result(*ids: int, spans: tuple[WireSpan, ...] | None = None) -> AttemptResult:
    return AttemptResult(
        token_ids=ids, logprobs=tuple(-float(i) for i in ids), finish_reason="abort", num_cached_tokens=2, spans=spans
    )


def test_a_second_attempt_has_what_is_left_of_the_budget() -> None:
    made = flight()
    assert attempt(made).token_ids == (9, 1, 2)
    made.add(result(5, 6, 8), version=3)
    second = attempt(made)
    assert second.token_ids == (9, 1, 2, 5, 6, 8)
    assert (second.sampling.max_new_tokens, second.sampling.min_new_tokens) == (7, 1)
    assert second.sampling.seed not in (None, 7)
    made.add(result(4), version=4)
    completion = made.completion("stop", 4)
    assert completion.token_ids == (5, 6, 8, 4)
    assert completion.logprobs == (-5.0, -6.0, -8.0, -4.0)
    assert completion.versions == (
        VersionSpan(version=3, start=0, end=3),
        VersionSpan(version=4, start=3, end=4),
    )
    assert completion.num_cached_tokens == 2


def test_spans_of_the_server_are_shifted_behind_what_was_there_and_joined() -> None:
    made = flight()
    attempt(made)
    made.add(result(5, 6), version=3)
    attempt(made)
    spans = (WireSpan(version="3", start=0, end=1), WireSpan(version="4", start=1, end=3))
    made.add(result(7, 8, 9, spans=spans), version=3)
    assert made.versions == (VersionSpan(version=3, start=0, end=3), VersionSpan(version=4, start=3, end=5))


def test_an_empty_attempt_changes_nothing() -> None:
    made = flight()
    attempt(made)
    made.add(result(spans=(WireSpan(version="default", start=0, end=0),)), version=0)
    assert made.completion("abort").versions == ()
    assert attempt(made).sampling == SAMPLING


def test_an_engine_without_seeds_gets_none() -> None:
    made = flight()
    sent = made.attempt("w", session=None, adapter=None, with_seed=False, token_ids=made.whole_prompt)
    assert sent.sampling == replace(SAMPLING, seed=None)


def test_the_tail_that_could_begin_a_stop_string_is_sampled_again() -> None:
    made = flight(replace(SAMPLING, stop=("ab", "wxyz")))
    attempt(made)
    made.add(result(10, 11, 12, 13, 14), version=1)
    second = attempt(made)
    assert second.token_ids == (9, 1, 2, 10, 11)  # 3 = len("wxyz") - 1 tokens are given up
    assert second.sampling.max_new_tokens == 8
    assert made.versions == (VersionSpan(version=1, start=0, end=2),)


def test_a_grammar_or_penalties_on_the_answer_start_anew() -> None:
    for sampling in (
        replace(SAMPLING, grammar=Grammar(kind="regex", text="[0-9]+")),
        replace(SAMPLING, frequency_penalty=0.5),
        replace(SAMPLING, presence_penalty=0.5),
        replace(SAMPLING, repetition_penalty=1.1),
    ):
        made = flight(sampling)
        attempt(made)
        made.add(result(10, 11), version=1)
        second = attempt(made)
        assert second.token_ids == (9, 1, 2)
        assert second.sampling == sampling


def test_a_partial_answer_counts_into_the_budget_and_stays_until_the_next_attempt() -> None:
    partial = Completion(
        request_id="r",
        token_ids=(3, 4),
        logprobs=(-0.5, -0.25),
        finish_reason="abort",
        versions=(VersionSpan(version=1, start=0, end=2),),
        num_cached_tokens=1,
    )
    made = flight(replace(SAMPLING, stop=("abc",)), partial)
    assert made.completion("abort") == partial
    sent = attempt(made)
    assert sent.token_ids == (9, 1, 2)
    assert sent.sampling.max_new_tokens == 10
