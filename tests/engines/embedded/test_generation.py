from __future__ import annotations

from typing import Any

import pytest
import torch

from skyrl_train.engines.embedded.core import EngineCore
from skyrl_train.errors import RequestRejected
from tests.engines.embedded.common import (
    greedy_reference,
    logprob_reference,
    make_core,
    random_prompts,
    request,
    run,
)
from tests.tiny import ARCHITECTURES, EOS_ID, make_model

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((arch, {}) for arch in ARCHITECTURES),
    ("mistral", {"sliding_window": 8}),
    ("gemma3_text", {"sliding_window": 8, "num_hidden_layers": 8}),
    ("qwen2", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    ("llama", {"num_key_value_heads": 1, "head_dim": 32}),
]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("arch", "overrides"), VARIANTS)
def test_greedy_tokens_equal_transformers_generate(arch: str, overrides: dict[str, Any], backend: str) -> None:
    core = make_core(make_model(arch, **overrides), attention_backend=backend)
    eager = make_model(arch, attn_implementation="eager", **overrides)
    prompts = random_prompts(3, 20, 7, 40, 11)
    answers = run(core, [request(str(i), prompt, 20) for i, prompt in enumerate(prompts)])
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.token_ids == greedy_reference(eager, prompt, 20)
        expected = logprob_reference(eager, prompt, answer.token_ids)
        assert torch.allclose(torch.tensor(answer.logprobs), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
def test_logprobs_are_those_of_a_plain_forward_at_the_temperature(temperature: float) -> None:
    core = make_core()
    eager = make_model(attn_implementation="eager")
    prompts = random_prompts(5, 17, 30)
    answers = run(core, [request(str(i), p, 24, temperature=temperature, seed=i) for i, p in enumerate(prompts)])
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = logprob_reference(eager, prompt, answer.token_ids, temperature)
        assert torch.allclose(torch.tensor(answer.logprobs), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "config",
    [
        {"enable_prefix_caching": False},
        {"chunked_prefill": False},
        {"max_num_batched_tokens": 4},
        {"max_num_seqs": 1},
        {"max_num_seqs": 8, "max_num_batched_tokens": 512},
        {"kv_cache_tokens": 70},
        {"kv_cache_tokens": 70, "enable_prefix_caching": False},
    ],
    ids=str,
)
def test_settings_that_change_only_speed_do_not_change_the_tokens(config: dict[str, Any]) -> None:
    prompts = random_prompts(40, 5, 12, 40, 31, 2)
    prompts += [prompts[0][:20] + prompts[1], prompts[0]]
    requests = [
        request(str(i), prompt, 25, temperature=float(i % 2), seed=i, ignore_eos=True)
        for i, prompt in enumerate(prompts)
    ]
    expected = run(make_core(kv_cache_tokens=1024), requests)
    found = run(make_core(**config), requests)
    assert [answer.token_ids for answer in found] == [answer.token_ids for answer in expected]
    for answer, other in zip(found, expected, strict=True):
        assert torch.allclose(torch.tensor(answer.logprobs), torch.tensor(other.logprobs), atol=1e-5)


def test_a_full_pool_retracts_the_youngest_request_and_keeps_its_tokens() -> None:
    prompts = random_prompts(10, 10, 10)
    core = make_core(kv_cache_tokens=90)
    requests = [request(str(i), prompt, 50, ignore_eos=True) for i, prompt in enumerate(prompts)]
    order = []
    for item in requests:
        core.add(item)
    while core.has_work:
        order += [item.completion.request_id for item in core.step()]
        core.check_integrity()
    assert core.stats().num_retractions_total > 0
    assert order == ["0", "1", "2"]
    assert core.stats().num_generated_tokens_total == 150  # nothing was sampled twice


def test_low_priority_is_retracted_before_young_age() -> None:
    core = make_core(kv_cache_tokens=90)
    first, second = random_prompts(10, 10)
    core.add(request("old and unimportant", first, 60, ignore_eos=True, priority=-1))
    core.add(request("young and important", second, 60, ignore_eos=True, priority=5))
    order = []
    while core.has_work:
        order += [item.completion.request_id for item in core.step()]
        core.check_integrity()
    assert core.stats().num_retractions_total > 0
    assert order == ["young and important", "old and unimportant"]


def test_higher_priority_is_served_first() -> None:
    core = make_core(max_num_seqs=1)
    prompts = random_prompts(4, 4, 4)
    for name, prompt, priority in zip("abc", prompts, (0, 1, 7), strict=True):
        core.add(request(name, prompt, 3, priority=priority))
    order = []
    while core.has_work:
        order += [item.completion.request_id for item in core.step()]
    assert order == ["c", "b", "a"]


def test_a_group_submitted_together_computes_its_prompt_once() -> None:
    rows: list[int] = []
    core = make_core(max_num_seqs=16, max_num_batched_tokens=64, kv_cache_tokens=2048)
    count_rows(core, rows)
    (prompt,) = random_prompts(40)
    answers = run(core, [request(str(i), prompt, 4, temperature=1.0, seed=i, ignore_eos=True) for i in range(16)])
    assert rows[0] == 40 + 15  # the others compute their last prompt token only, in the very same step
    assert sum(rows) == 40 + 15 + 3 * 16
    assert [answer.num_cached_tokens for answer in answers] == [0] + [39] * 15
    assert core.stats().cache_hit_frac == 15 * 39 / (16 * 40)


def test_a_group_whose_prompt_is_cut_into_chunks_computes_it_once_too() -> None:
    rows: list[int] = []
    core = make_core(max_num_seqs=8, max_num_batched_tokens=16, kv_cache_tokens=2048)
    count_rows(core, rows)
    (prompt,) = random_prompts(40)
    run(core, [request(str(i), prompt, 2, temperature=1.0, seed=i, ignore_eos=True) for i in range(8)])
    assert rows[:3] == [16, 16, 8 + 7]


def test_a_second_turn_reuses_prompt_and_answer_of_the_first() -> None:
    core = make_core()
    (prompt,) = random_prompts(20)
    (first,) = run(core, [request("turn 1", prompt, 10, ignore_eos=True)])
    longer = (*prompt, *first.token_ids, 1, 2, 3)
    (second,) = run(core, [request("turn 2", longer, 4)])
    assert second.num_cached_tokens == 20 + 10 - 1  # the last sampled token was never computed
    eager = make_model(attn_implementation="eager")
    assert second.token_ids == greedy_reference(eager, longer, 4)


def test_a_prompt_that_is_cached_as_a_whole_still_computes_its_last_token() -> None:
    core = make_core()
    (prompt,) = random_prompts(20)
    first, again = (run(core, [request(name, prompt, 5)])[0] for name in ("a", "b"))
    assert again.num_cached_tokens == 19
    assert again.token_ids == first.token_ids


def test_a_request_that_can_never_fit_is_rejected_with_the_numbers() -> None:
    core = make_core(kv_cache_tokens=100)
    with pytest.raises(RequestRejected, match=r"prompt \(80\) and max_new_tokens \(49\) need 129 tokens.* 128"):
        core.add(request("long", range(80), 49))
    with pytest.raises(RequestRejected, match=r"need 101 tokens.*KV cache of 100"):
        core.add(request("long", range(80), 21))
    core.add(request("fits", range(80), 20))


@pytest.mark.parametrize("token", [-1, 300])
def test_a_token_outside_the_vocabulary_is_rejected(token: int) -> None:
    with pytest.raises(RequestRejected, match=f"token id {token} is outside the vocabulary of 300"):
        make_core().add(request("bad", (1, token)))


def test_two_open_requests_cannot_share_an_id() -> None:
    core = make_core()
    core.add(request("same", (1, 2)))
    with pytest.raises(RequestRejected, match="with this id already"):
        core.add(request("same", (1, 2)))


def test_abort_keeps_the_partial_answer() -> None:
    core = make_core()
    (prompt,) = random_prompts(6)
    whole = greedy_reference(make_model(attn_implementation="eager"), prompt, 20)
    core.add(request("cut", prompt, 20, ignore_eos=True))
    core.add(request("queued", prompt, 20))
    for _ in range(5):
        core.step()
    finished = core.abort(["cut", "never heard of"])
    assert [item.completion.finish_reason for item in finished] == ["abort"]
    assert finished[0].completion.token_ids == whole[:5]
    core.check_integrity()
    core.abort(["queued"])
    core.check_integrity()
    assert not core.has_work and core.stats().num_running == 0


def test_aborting_a_queued_request_gives_an_empty_answer() -> None:
    core = make_core(max_num_seqs=1)
    core.add(request("runs", (1, 2)))
    core.add(request("waits", (3, 4)))
    core.step()
    (finished,) = core.abort(["waits"])
    assert finished.completion.token_ids == () and finished.completion.versions == ()
    core.check_integrity()


def test_the_end_token_is_kept_and_ends_the_answer() -> None:
    core = make_core(constant_model(EOS_ID))
    (answer,) = run(core, [request("a", (1, 2, 3), 10)])
    assert (answer.token_ids, answer.finish_reason, answer.stop_reason) == ((EOS_ID,), "stop", None)
    (answer,) = run(core, [request("b", (1, 2, 3), 4, ignore_eos=True)])
    assert (answer.token_ids, answer.finish_reason) == ((EOS_ID,) * 4, "length")


def constant_model(token: int) -> Any:
    """A model that always says `token`, with probability 1 - 300 exp(-20)."""
    model = make_model("llama")
    with torch.no_grad():
        model.model.norm.weight.zero_()
        model.lm_head.weight.zero_()
    head = model.lm_head
    bias = torch.zeros(head.out_features)
    bias[token] = 20.0
    head.bias = torch.nn.Parameter(bias)
    return model


def count_rows(core: EngineCore, rows: list[int]) -> None:
    """Note the number of rows of each step."""
    inner = core._runner.logits

    def logits(plan: Any) -> torch.Tensor:
        rows.append(plan.num_rows)
        return inner(plan)

    core._runner.logits = logits  # type: ignore[method-assign]
