"""Sampling parameters as SGLang's, its answers and refusals as ours; answers are of 0.5.23, shortened."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest

from skyrl_train.engines.base import Capability
from skyrl_train.engines.server.client import ServerBusy, WireSpan
from skyrl_train.engines.sglang.answers import attempt_result, prompt_logprobs
from skyrl_train.engines.sglang.client import rid_of
from skyrl_train.engines.sglang.errors import SessionLost, message_of, refusal
from skyrl_train.engines.sglang.figures import Counts, server_figures
from skyrl_train.engines.sglang.sampling import cut_ids, sampling_fields
from skyrl_train.engines.sglang.submission import _answers
from skyrl_train.errors import EngineError, EngineUnavailable, RequestRejected
from skyrl_train.types import Grammar, SamplingParams

ALL: frozenset[Capability] = frozenset({"min_p", "penalties", "seed", "structured_output"})
PARAMS = partial(SamplingParams, max_new_tokens=9)

STOPPED: dict[str, Any] = {
    "text": "VV",
    "output_ids": [86, 86, 183],
    "meta_info": {
        "id": "r1$",
        "finish_reason": {"type": "stop", "matched": 183},
        "prompt_tokens": 20,
        "weight_version": "default",
        "num_retractions": 1,
        "input_token_logprobs": [],
        "output_token_logprobs": [
            [-2.814826250076294, 86, None],
            [-2.8943185806274414, 86, None],
            [-3.1393744945526123, 183, None],
        ],
        "completion_tokens": 3,
        "cached_tokens": 19,
        "weight_versions": [
            {"version": "4", "start": 0, "end": 2},
            {"version": "5", "start": 2, "end": 3},
        ],
    },
}
IN_QUEUE: dict[str, Any] = {
    "text": "",
    "output_ids": [],
    "meta_info": {
        "id": "w079$",
        "finish_reason": {"type": "abort", "message": "Abort in waiting queue"},
        "weight_versions": [{"version": "default", "start": 0, "end": 0}],
        "input_token_logprobs": [],
        "output_token_logprobs": [],
        "completion_tokens": 0,
    },
}


def with_meta(**changes: Any) -> dict[str, Any]:
    return {**STOPPED, "meta_info": {**STOPPED["meta_info"], **changes}}


def fields(capabilities: frozenset[Capability] = ALL, **sampling: Any) -> dict[str, Any]:
    return sampling_fields(PARAMS(**sampling), capabilities, what="r1")


def test_only_what_is_on_is_sent() -> None:
    assert fields() == {"max_new_tokens": 9, "temperature": 1.0}
    assert fields(temperature=0.0, top_p=0.9, top_k=5, min_p=0.1, repetition_penalty=1.2) == {
        "max_new_tokens": 9,
        "temperature": 0.0,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
    }
    ends = fields(stop=("a", "b"), stop_token_ids=(7,), frequency_penalty=-1.0, presence_penalty=0.5)
    assert (ends["stop"], ends["stop_token_ids"]) == (["a", "b"], [7])
    assert (ends["frequency_penalty"], ends["presence_penalty"]) == (-1.0, 0.5)


def test_a_seed_is_sent_where_it_is_read() -> None:
    assert fields(seed=3)["sampling_seed"] == 3
    assert fields(frozenset(), seed=3) == {"max_new_tokens": 9, "temperature": 1.0}


@pytest.mark.parametrize("kind", ["json_schema", "regex", "ebnf"])
def test_a_grammar_goes_under_its_kind_or_is_refused(kind: Any) -> None:
    grammar = Grammar(kind=kind, text="text")
    assert fields(grammar=grammar)[kind] == "text"
    with pytest.raises(RequestRejected, match="no grammar backend"):
        fields(frozenset(), grammar=grammar)


@pytest.mark.parametrize("setting", [{"min_p": 0.1}, {"min_new_tokens": 2}])
def test_what_a_speculating_server_gets_wrong_is_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(RequestRejected, match=rf"r1: {next(iter(setting))}=.*while it speculates"):
        fields(frozenset({"speculation"}), **setting)


@pytest.mark.parametrize("setting", [{"presence_penalty": 0.5}, {"repetition_penalty": 1.1}])
def test_penalties_that_come_a_step_late_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(RequestRejected, match=rf"r1: {next(iter(setting))}=.*scheduling.disable_overlap=true"):
        fields(frozenset(), **setting)


def test_going_on_past_the_end_token_keeps_the_stop_ids_by_cutting() -> None:
    assert fields(ignore_eos=True, stop_token_ids=(7,)) == {"max_new_tokens": 9, "temperature": 1.0, "ignore_eos": True}
    assert cut_ids(PARAMS(ignore_eos=True, stop_token_ids=(86, 183))) == {86, 183}
    assert cut_ids(PARAMS(stop_token_ids=(86,))) == frozenset()
    cut = attempt_result(with_meta(finish_reason={"type": "length", "length": 3}), what="r1", cut_at=frozenset({183}))
    assert (cut.token_ids, cut.finish_reason, cut.stop_reason) == ((86, 86, 183), "stop", 183)
    first = attempt_result(STOPPED, what="r1", cut_at=frozenset({86}))
    assert (first.token_ids, first.logprobs, first.stop_reason) == ((86,), (-2.814826250076294,), 86)
    assert first.spans == (WireSpan(version="4", start=0, end=1),)


def test_a_least_length_goes_with_what_can_end_the_answer_later() -> None:
    assert fields(min_new_tokens=2)["min_new_tokens"] == 2
    assert "min_new_tokens" not in fields(min_new_tokens=2, ignore_eos=True)
    for setting in ({"stop": ("x",)}, {"ignore_eos": True, "stop_token_ids": (1,)}):
        with pytest.raises(RequestRejected, match="min_new_tokens=2"):
            fields(min_new_tokens=2, **setting)


def test_an_answer_is_its_pairs_with_the_versions_that_sampled_them() -> None:
    result = attempt_result(STOPPED, what="r1", stop_token_ids=(183,))
    assert result.token_ids == (86, 86, 183)
    assert result.logprobs == (-2.814826250076294, -2.8943185806274414, -3.1393744945526123)
    assert (result.finish_reason, result.stop_reason, result.num_cached_tokens) == ("stop", 183, 19)
    assert result.spans == (WireSpan(version="4", start=0, end=2), WireSpan(version="5", start=2, end=3))
    assert attempt_result(STOPPED, what="r1", with_spans=False).spans is None


def test_the_models_end_token_is_no_stop_reason_and_a_stop_string_is() -> None:
    assert attempt_result(STOPPED, what="r1").stop_reason is None
    assert attempt_result(with_meta(finish_reason={"type": "stop", "matched": "ab"}), what="r1").stop_reason == "ab"


def test_an_abort_in_the_queue_is_an_empty_answer() -> None:
    result = attempt_result(IN_QUEUE, what="r1")
    assert (result.token_ids, result.logprobs, result.finish_reason, result.spans) == ((), (), "abort", ())


@pytest.mark.parametrize(
    ("finish", "error"),
    [
        ({"type": "abort", "message": "The request queue is full.", "status_code": 503}, ServerBusy),
        ({"type": "abort", "message": "it broke", "status_code": 500}, EngineUnavailable),
        ({"type": "abort", "message": "Input length (9 tokens) exceeds", "status_code": 400}, RequestRejected),
        ({"type": "stop", "matched": "NaN happened"}, EngineUnavailable),
        ({"type": "nonsense"}, EngineError),
    ],
)
def test_an_end_that_is_an_error_is_no_answer(finish: dict[str, Any], error: type[EngineError]) -> None:
    with pytest.raises(error, match="r1"):
        attempt_result(with_meta(finish_reason=finish), what="r1")


@pytest.mark.parametrize(
    ("pairs", "reason"),
    [
        (None, "no output_token_logprobs"),
        ([[-1.0, 86, None]], "3 ids and 1 log-probabilities"),
        ([[-1.0, 86, None], [None, 86, None], [-1.0, 183, None]], "token 1 is not finite"),
    ],
)
def test_an_answer_without_a_number_for_each_token_is_refused(pairs: Any, reason: str) -> None:
    with pytest.raises(EngineError, match=reason):
        attempt_result(with_meta(output_token_logprobs=pairs), what="r1")


def test_a_prompts_log_probabilities_begin_at_its_second_token() -> None:
    scored = with_meta(input_token_logprobs=[[None, 84, None], [-7.25, 85, None], [-6.75, 148, None]])
    assert prompt_logprobs(scored, what="score") == (-7.25, -6.75)
    with pytest.raises(EngineError, match="of 0 log-probabilities"):
        prompt_logprobs(STOPPED, what="score")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"error": {"message": "input_ids cannot be empty."}}', "input_ids cannot be empty."),
        ('{"error": "unknown field `nonsense`"}', "unknown field `nonsense`"),
        ('{"object": "error", "message": "The request queue is full.", "code": 503}', "The request queue is full."),
        ("Flush cache failed.\n", "Flush cache failed."),
        ("", "no message"),
    ],
)
def test_the_servers_words_are_found_in_each_of_its_envelopes(text: str, said: str) -> None:
    assert message_of(text) == said


@pytest.mark.parametrize(
    ("status", "message", "error", "advice"),
    [
        (400, "Requested token count exceeds the model's maximum context length", RequestRejected, "max_model_len"),
        (400, "Invalid request: session id gone does not exist", SessionLost, ""),
        (400, "Invalid request session id", SessionLost, ""),
        (400, "Got LoRA adapter that has never been loaded: x", RequestRejected, "load the adapter first"),
        (400, "Failed to compile regex grammar: …", RequestRejected, "correct the request's grammar"),
        (503, "The request queue is full.", ServerBusy, ""),
        (500, "Out of memory even after retracting all other requests", RequestRejected, "max_total_tokens"),
        (500, "Internal Server Error", EngineUnavailable, ""),
    ],
)
def test_a_refusal_says_whether_another_try_helps(
    status: int, message: str, error: type[EngineError], advice: str
) -> None:
    made = refusal(status, message, what="sglang-0: request r1")
    assert type(made) is error
    assert f"sglang-0: request r1: SGLang answered {status}: {message}" in str(made) and advice in str(made)


def test_no_name_on_the_wire_begins_with_another() -> None:
    wire_ids = ["r1", "r1$", "r1$2", "r12", "r1%24", "r1%", "r1/0", ""]
    rids = [rid_of(wire_id) for wire_id in wire_ids]
    assert len(set(rids)) == len(rids)
    assert [(a, b) for a in rids for b in rids if a != b and b.startswith(a)] == []


def test_a_stream_gives_whole_answers_only_and_its_error() -> None:
    unfinished = with_meta(finish_reason=None)
    events = [
        b"data: " + json.dumps(event, separators=(",", ":")).encode()
        for event in (unfinished, STOPPED, {"error": {"message": "no"}})
    ]
    assert list(_answers([*events, b"data: [DONE]", b""])) == [STOPPED, {"error": {"message": "no"}}]


def test_tokens_are_counted_from_the_answers_and_the_rest_is_the_servers_own() -> None:
    counts = Counts()
    counts.add(with_meta(spec_verify_ct=2))
    counts.add(IN_QUEUE)
    loads = [
        {"num_running_reqs": 2, "num_waiting_reqs": 1, "num_used_tokens": 30, "max_total_num_tokens": 100},
        {"num_running_reqs": 1, "num_waiting_reqs": 0, "num_used_tokens": 10, "max_total_num_tokens": 100},
    ]
    bare = server_figures(loads, "", counts)
    assert (bare.num_running, bare.num_waiting, bare.kv_used_frac) == (3, 1, 0.2)
    assert (bare.num_prompt_tokens_total, bare.num_cached_tokens_total, bare.num_generated_tokens_total) == (20, 19, 3)
    assert (bare.num_retractions_total, bare.accept_len) == (1, 1.5)
    assert (bare.num_evicted_tokens_total, bare.num_steps_total) == (None, None)
    metrics = (
        '# TYPE x counter\nsglang:cuda_graph_passes_total{mode="decode"} 7.0\n'
        'sglang:cuda_graph_passes_total{mode="prefill"} 5.0\nsglang:fwd_occupancy{a="b"} NaN\n'
    )
    full = server_figures(loads, metrics, counts)
    assert (full.num_evicted_tokens_total, full.num_steps_total) == (0, 12)
