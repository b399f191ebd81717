"""Attempts as vLLM's requests, and vLLM's answers, refusals and series as ours."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from skyrl_train.engines.server.client import Attempt, ServerBusy
from skyrl_train.engines.vllm.adapters import AdapterFolders
from skyrl_train.engines.vllm.answers import attempt_result, completed_at, refusal
from skyrl_train.engines.vllm.metrics import figures
from skyrl_train.engines.vllm.sampling import completion_body, engine_request_id
from skyrl_train.errors import EngineUnavailable, RequestRejected
from skyrl_train.types import AdapterWeights, Grammar, SamplingParams


def body(attempt: Attempt | None = None, *, by_priority: bool = True, **sampling: Any) -> dict[str, Any]:
    params = SamplingParams(max_new_tokens=4, **sampling)
    attempt = attempt or Attempt(wire_id="a", token_ids=(1, 2), sampling=params, priority=3)
    return completion_body(attempt, model="policy", vocab_size=10, max_model_len=8, by_priority=by_priority)


def test_every_field_that_shapes_the_distribution_is_written_out() -> None:
    """What is left out comes from the model's generation_config.json."""
    sent = body()
    shaping = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    assert [sent[name] for name in shaping] == [1.0, 1.0, -1, 0.0, 1.0, 0.0, 0.0]
    assert (sent["model"], sent["prompt"], sent["max_tokens"], sent["min_tokens"]) == ("policy", [1, 2], 4, 0)
    assert sent["skip_special_tokens"] is False and sent["return_token_ids"] is True and sent["logprobs"] == 0
    assert "seed" not in sent and "structured_outputs" not in sent


def test_higher_is_first_with_us_and_lower_there() -> None:
    assert body()["priority"] == -3
    assert "priority" not in body(by_priority=False)


def test_an_adapter_is_a_model_of_its_own() -> None:
    attempt = Attempt(wire_id="a", token_ids=(1,), sampling=SamplingParams(max_new_tokens=1), adapter="mine")
    assert body(attempt)["model"] == "mine"


@pytest.mark.parametrize(("kind", "field"), [("json_schema", "json"), ("regex", "regex"), ("ebnf", "grammar")])
def test_a_grammar_goes_under_vllms_name(kind: Any, field: str) -> None:
    assert body(grammar=Grammar(kind=kind, text="x"))["structured_outputs"] == {field: "x"}


def test_an_id_outside_the_vocabulary_is_refused_here() -> None:
    attempt = Attempt(wire_id="r-1", token_ids=(1, 10, 12), sampling=SamplingParams(max_new_tokens=1))
    with pytest.raises(RequestRejected, match=r"request r-1: token id 10 is outside .* of 10 \(2 such ids\)"):
        body(attempt)


def test_what_would_be_cut_short_in_silence_is_refused() -> None:
    attempt = Attempt(wire_id="r", token_ids=(1,) * 5, sampling=SamplingParams(max_new_tokens=4))
    with pytest.raises(RequestRejected, match=r"5 \+ 4 = 9 tokens, the server has room for 8"):
        body(attempt)


def test_a_temperature_that_vllm_would_raise_is_refused() -> None:
    with pytest.raises(RequestRejected, match=r"would sample at 0\.01"):
        body(temperature=0.005)
    assert body(temperature=0.0)["temperature"] == 0.0


def test_sampled_drafts_are_refused_where_they_are_verified_wrongly() -> None:
    def greedy_only(temperature: float) -> dict[str, Any]:
        attempt = Attempt(
            wire_id="r", token_ids=(1,), sampling=SamplingParams(max_new_tokens=1, temperature=temperature)
        )
        return completion_body(
            attempt, model="policy", vocab_size=10, max_model_len=8, by_priority=False, greedy_only=True
        )

    assert greedy_only(0.0)["temperature"] == 0.0
    with pytest.raises(RequestRejected, match=r"temperature 1\.0 with speculation on a CPU"):
        greedy_only(1.0)


def test_the_engines_own_name_of_a_request() -> None:
    assert engine_request_id("r-7") == "cmpl-r-7-0"


def answer(**choice: Any) -> dict[str, Any]:
    own = {"token_ids": [1, 2, 3], "finish_reason": "stop", "stop_reason": None}
    return {
        "choices": [{**own, "logprobs": {"token_logprobs": [-0.1, -0.2, -0.3]}, **choice}],
        "usage": {"prompt_tokens_details": {"cached_tokens": 16}},
    }


def letters(ids: Sequence[int]) -> str:
    """1 is "a", 2 "b END", 3 " c"."""
    return "".join({1: "a", 2: "b END", 3: " c"}[token] for token in ids)


def test_an_answer() -> None:
    result = attempt_result(answer(finish_reason="length"), wire_id="r", decode=None)
    assert (result.token_ids, result.logprobs) == ((1, 2, 3), (-0.1, -0.2, -0.3))
    assert (result.finish_reason, result.num_cached_tokens, result.spans) == ("length", 16, None)


def test_tokens_after_the_one_that_completes_a_stop_string_are_cut_off() -> None:
    result = attempt_result(answer(stop_reason="END"), wire_id="r", decode=letters)
    assert (result.token_ids, result.logprobs, result.stop_reason) == ((1, 2), (-0.1, -0.2), "END")
    assert completed_at([1, 2, 3], "nowhere", letters) == 3
    assert completed_at([2], "END", letters) == 1


def test_an_attempt_that_was_aborted_at_once_has_no_tokens() -> None:
    result = attempt_result(answer(token_ids=[], logprobs=None, finish_reason="abort"), wire_id="r", decode=None)
    assert (result.token_ids, result.logprobs, result.finish_reason) == ((), (), "abort")


@pytest.mark.parametrize(
    "broken",
    [
        answer(finish_reason="error"),
        answer(token_ids=[1]),
        answer(logprobs={"token_logprobs": [-0.1, None, -0.3]}),
        {"choices": []},
    ],
)
def test_an_answer_that_is_none_is_the_servers_failure(broken: dict[str, Any]) -> None:
    with pytest.raises(EngineUnavailable, match="request r"):
        attempt_result(broken, wire_id="r", decode=None)


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, RequestRejected), (404, RequestRejected), (503, ServerBusy), (429, ServerBusy), (500, EngineUnavailable)],
)
def test_a_refusal_is_told_by_its_status(status: int, kind: type[Exception]) -> None:
    text = json.dumps({"error": {"message": "no such thing", "code": status}})
    error = refusal(status, text, what="POST /x")
    assert type(error) is kind and str(error) == f"POST /x: vLLM answered {status}: no such thing"


@pytest.mark.parametrize("text", ['{"error": "no such thing"}', '{"detail": "no such thing"}', "no such thing\nmore"])
def test_the_message_of_a_refusal_is_found_in_each_form(text: str) -> None:
    assert str(refusal(400, text, what="POST /x")).endswith(": no such thing")


SERIES = """
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="policy"} 2.0
vllm:num_requests_running{engine="1",model_name="policy"} 1.0
vllm:num_requests_waiting{engine="0"} 5.0
vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 5.0
vllm:kv_cache_usage_perc{engine="0"} 0.25
vllm:prompt_tokens_total{engine="0"} 1.5e+06
vllm:generation_tokens_total{engine="0"} 70.0
vllm:prefix_cache_hits_total{engine="0"} 256.0
vllm:num_preemptions_total{engine="0"} 4.0
vllm:iteration_tokens_total_count{engine="0"} 35.0
vllm:iteration_tokens_total_sum{engine="0"} 99.0
vllm:spec_decode_num_drafts_total{engine="0"} 10.0
vllm:spec_decode_num_accepted_tokens_total{engine="0"} 15.0
"""


def test_figures_are_summed_over_engines() -> None:
    found = figures(SERIES)
    assert (found.num_running, found.num_waiting, found.kv_used_frac) == (3, 5, 0.25)
    assert (found.num_prompt_tokens_total, found.num_generated_tokens_total) == (1_500_000, 70)
    assert (found.num_cached_tokens_total, found.num_retractions_total, found.num_steps_total) == (256, 4, 35)
    assert found.num_evicted_tokens_total is None and found.accept_len == 2.5


def test_without_speculation_there_is_no_accepted_length() -> None:
    without = "\n".join(line for line in SERIES.splitlines() if "spec_decode" not in line)
    assert figures(without).accept_len is None


def test_while_nothing_was_drafted_a_step_makes_one_token() -> None:
    nothing = SERIES.replace('drafts_total{engine="0"} 10.0', 'drafts_total{engine="0"} 0.0')
    nothing = nothing.replace('accepted_tokens_total{engine="0"} 15.0', 'accepted_tokens_total{engine="0"} 0.0')
    assert figures(nothing).accept_len == 1.0


def test_series_that_are_missing_are_named() -> None:
    with pytest.raises(EngineUnavailable, match="vllm:num_requests_running"):
        figures("# nothing\n")


async def test_an_adapter_is_written_as_peft_would_and_removed() -> None:
    weights = torch.arange(6.0).view(2, 3)
    config = {"r": 2, "target_modules": {"v_proj", "q_proj"}, "rank_pattern": {}}
    folders = AdapterFolders()
    folder = Path(await folders.write("mine", AdapterWeights(tensors={"a.lora_A.weight": weights}, config=config)))
    assert torch.equal(load_file(folder / "adapter_model.safetensors")["a.lora_A.weight"], weights)
    assert json.loads((folder / "adapter_config.json").read_text())["target_modules"] == ["q_proj", "v_proj"]
    await folders.remove("mine")
    await folders.remove("mine")
    assert not folder.exists()
