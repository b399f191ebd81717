"""The client against a real vLLM server on this machine's CPU; numbers are compared with transformers'."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from transformers import PreTrainedModel

from skyrl_train.engines.vllm.client import VLLMClient
from skyrl_train.engines.vllm.launch import attach_vllm
from skyrl_train.engines.vllm.weights import vllm_channel
from skyrl_train.errors import ConfigError, EngineUnavailable, RequestRejected
from skyrl_train.types import AdapterWeights, Grammar, SamplingParams
from skyrl_train.weight_sync.plan import WeightPlan
from tests.engines.vllm.live import (
    BLOCK,
    CONTEXT,
    LIMIT,
    PROMPT,
    Live,
    ask,
    assert_of,
    chosen,
    greedy,
    logits_of,
    started,
    until_idle,
)
from tests.tiny import EOS_ID, VOCAB_SIZE, make_tokenizer

pytestmark = [pytest.mark.engines, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600)]

NUM_SLOTS = 3
NUM_SEATS = 8


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def live(vllm_python: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Live]:
    keys = (
        "scheduling.enable_priority=true",
        "lora.enabled=true",
        "lora.max_rank=8",
        f"lora.max_loras_per_batch={NUM_SLOTS}",
    )
    async with started(vllm_python, tmp_path_factory.mktemp("vllm"), *keys) as server:
        yield server


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
async def test_log_probabilities_are_those_at_the_temperature(live: Live, temperature: float) -> None:
    result = await ask(live, SamplingParams(max_new_tokens=20, temperature=temperature, ignore_eos=True))
    expected = chosen(logits_of(live.models[0], PROMPT, result.token_ids) / temperature, result.token_ids)
    torch.testing.assert_close(torch.tensor(result.logprobs), expected, rtol=0, atol=LIMIT)
    assert result.finish_reason == "length" and len(result.token_ids) == 20


async def test_greedy_answers_have_the_models_own_log_probabilities_also_beside_sampled_ones(live: Live) -> None:
    sampled = SamplingParams(max_new_tokens=20, temperature=1.5, top_p=0.5, ignore_eos=True)
    results = await asyncio.gather(*(ask(live, params) for params in (greedy(20), sampled, greedy(20, top_p=0.5))))
    for result in (results[0], results[2]):
        assert_of(live.models[0], result)
        rows = logits_of(live.models[0], PROMPT, result.token_ids)
        picked = rows.gather(1, torch.tensor(result.token_ids)[:, None])[:, 0]
        assert (rows.max(-1).values - picked).max() < LIMIT


async def test_truncation_is_in_the_log_probabilities(live: Live) -> None:
    result = await ask(live, SamplingParams(max_new_tokens=20, temperature=1.0, top_k=5, ignore_eos=True))
    rows = logits_of(live.models[0], PROMPT, result.token_ids)
    kept = rows.masked_fill(rows < rows.topk(5).values[:, -1:], float("-inf"))
    torch.testing.assert_close(torch.tensor(result.logprobs), chosen(kept, result.token_ids), rtol=0, atol=LIMIT)


async def test_penalties_are_in_the_log_probabilities(live: Live) -> None:
    result = await ask(live, SamplingParams(max_new_tokens=20, temperature=1.0, presence_penalty=1.5, ignore_eos=True))
    rows = logits_of(live.models[0], PROMPT, result.token_ids).clone()
    for place in range(1, len(rows)):
        rows[place, list(set(result.token_ids[:place]))] -= 1.5
    torch.testing.assert_close(torch.tensor(result.logprobs), chosen(rows, result.token_ids), rtol=0, atol=LIMIT)


async def test_equal_seeds_give_equal_answers(live: Live) -> None:
    one, two, other = await asyncio.gather(
        *(ask(live, SamplingParams(max_new_tokens=20, seed=seed, ignore_eos=True)) for seed in (3, 3, 4))
    )
    assert one.token_ids == two.token_ids != other.token_ids


async def test_a_stop_id_is_kept_and_named(live: Live) -> None:
    ids = (await ask(live, greedy())).token_ids
    stop = next(token for token in ids if token != ids[0])
    result = await ask(live, greedy(stop_token_ids=(stop,)))
    assert result.token_ids == ids[: ids.index(stop) + 1] and len(result.logprobs) == len(result.token_ids)
    assert (result.finish_reason, result.stop_reason) == ("stop", stop)


async def test_a_stop_string_is_kept_in_the_ids_whatever_the_tokens_it_lies_in(live: Live) -> None:
    letters = Grammar(kind="regex", text="[a-z]{30}")
    text = make_tokenizer().decode((await ask(live, greedy(40, ignore_eos=False, grammar=letters))).token_ids)
    stop = text[4:7]
    result = await ask(live, greedy(40, ignore_eos=False, grammar=letters, stop=(stop,)))
    assert make_tokenizer().decode(result.token_ids) == text[: text.index(stop) + 3]
    assert (result.finish_reason, result.stop_reason) == ("stop", stop)


async def test_the_end_token_is_kept_and_has_no_name(live: Live) -> None:
    result = await ask(
        live, SamplingParams(max_new_tokens=9, temperature=0.0, grammar=Grammar(kind="regex", text="[0-9]{3}"))
    )
    assert result.token_ids[-1] == EOS_ID and len(result.token_ids) == 4
    assert (result.finish_reason, result.stop_reason) == ("stop", None)


async def test_grammars_hold(live: Live) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    kinds = {"json_schema": json.dumps(schema), "ebnf": 'root ::= "yes" | "no"'}
    texts = {}
    for kind, text in kinds.items():
        grammar = Grammar(kind=kind, text=text)  # type: ignore[arg-type]
        result = await ask(live, SamplingParams(max_new_tokens=200, temperature=0.0, grammar=grammar))
        texts[kind] = make_tokenizer().decode(result.token_ids, skip_special_tokens=True)
    assert texts["ebnf"] in ("yes", "no")
    assert isinstance(json.loads(texts["json_schema"])["a"], bool)


async def test_min_new_tokens_keeps_the_end_token_away(live: Live) -> None:
    result = await ask(live, SamplingParams(max_new_tokens=30, min_new_tokens=25, temperature=0.0))
    assert len(result.token_ids) >= 25 and EOS_ID not in result.token_ids[:24]


async def test_a_long_prefix_is_found_again(live: Live) -> None:
    prompt = [(7 * i) % 256 for i in range(2 * BLOCK + 10)]
    first = await ask(live, greedy(2), prompt)
    again = await ask(live, greedy(2), prompt)
    assert (first.num_cached_tokens, again.num_cached_tokens) == (0, 2 * BLOCK)
    await live.client.flush_cache()
    assert (await ask(live, greedy(2), prompt)).num_cached_tokens == 0


async def test_aborted_attempts_return_what_they_have(live: Live) -> None:
    """The server alone decides how far it got: other moments are tried until one is in the middle."""
    long = greedy(CONTEXT - len(PROMPT))
    for number, moment in enumerate((0.05, 0.2, 0.5, 1.0, 2.0)):
        running = asyncio.ensure_future(ask(live, long, wire_id=f"long-{number}"))
        await asyncio.sleep(moment)
        await live.client.abort([f"long-{number}", "never-sent"])
        result = await running
        if result.finish_reason == "abort" and result.token_ids:
            break
    assert result.finish_reason == "abort"
    assert 0 < len(result.token_ids) == len(result.logprobs) < CONTEXT - len(PROMPT)
    assert_of(live.models[0], result)


async def test_cancelling_the_caller_ends_the_request_in_the_server(live: Live) -> None:
    before = (await live.client.figures()).num_generated_tokens_total
    running = asyncio.ensure_future(ask(live, greedy(CONTEXT - len(PROMPT))))
    await asyncio.sleep(0.1)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await until_idle(live)
    assert (await live.client.figures()).num_generated_tokens_total - before < CONTEXT - len(PROMPT)


async def test_a_halted_server_starts_nothing_until_it_is_released(live: Live) -> None:
    await live.client.halt()
    waiting = asyncio.ensure_future(ask(live, greedy()))
    done, _ = await asyncio.wait({waiting}, timeout=0.5)
    assert not done
    await live.client.release()
    assert len((await waiting).token_ids) == 8


async def test_scores_are_the_models_also_while_halted(live: Live) -> None:
    ids = [*PROMPT, *range(100, 200)]
    expected = chosen(logits_of(live.models[0], ids[:1], ids[1:]), ids[1:])
    free = await live.client.score(ids)
    await live.client.halt()
    halted = await live.client.score(ids)
    waiting = asyncio.ensure_future(ask(live, greedy()))
    done, _ = await asyncio.wait({waiting}, timeout=0.5)
    assert not done, "the server goes on after a score"
    await live.client.release()
    await waiting
    for scores in (free, halted):
        torch.testing.assert_close(torch.tensor(scores), expected, rtol=0, atol=LIMIT)


async def test_higher_priority_is_served_first(live: Live) -> None:
    """More wait than have seats when the server goes on; the last to come are the most important."""
    order: list[int] = []

    async def wait_in_line(priority: int) -> None:
        await ask(live, greedy(100), priority=priority)
        order.append(priority)

    await live.client.halt()
    line = [asyncio.ensure_future(wait_in_line(priority)) for priority in (*[0] * NUM_SEATS, 5, 6, 7)]
    await asyncio.sleep(0.5)
    assert order == []
    await live.client.release()
    await asyncio.gather(*line)
    assert order[-3:] == [0, 0, 0]


@pytest.mark.parametrize(
    ("ids", "sampling", "message"),
    [
        ((5, VOCAB_SIZE), greedy(), "token id 300 is outside the model's vocabulary of 300"),
        (tuple([5] * CONTEXT), greedy(), f"{CONTEXT} + 8 = {CONTEXT + 8} tokens, the server has room for {CONTEXT}"),
        (PROMPT, SamplingParams(max_new_tokens=2, temperature=0.001), "use 0 (greedy) or at least 0.01"),
        (PROMPT, SamplingParams(max_new_tokens=2, stop_token_ids=(5000,)), "out-of-vocab"),
        (PROMPT, SamplingParams(max_new_tokens=2, grammar=Grammar(kind="regex", text="((")), "regex"),
        (PROMPT, SamplingParams(max_new_tokens=2, grammar=Grammar(kind="json_schema", text="{")), "JSON"),
        (PROMPT, SamplingParams(max_new_tokens=2, grammar=Grammar(kind="ebnf", text="root ::= (")), "grammar"),
    ],
)
async def test_what_can_never_be_served_is_refused_and_the_server_lives(
    live: Live, ids: tuple[int, ...], sampling: SamplingParams, message: str
) -> None:
    with pytest.raises(RequestRejected) as caught:
        await ask(live, sampling, ids)
    assert message in str(caught.value)
    assert len((await ask(live, greedy())).token_ids) == 8


async def test_an_unknown_adapter_is_refused(live: Live) -> None:
    with pytest.raises(RequestRejected, match="nobody"):
        await ask(live, greedy(), adapter="nobody")
    with pytest.raises(RequestRejected, match="No adapter found"):
        await live.client.load_adapter("nowhere", "/no/such/folder")
    await live.client.unload_adapter("never-there")
    assert await live.client.adapters() == []


def adapter_of(model: PreTrainedModel, seed: int) -> AdapterWeights:
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "v_proj")):
            key = f"base_model.model.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(8, module.in_features, generator=generator) * 0.2
            tensors[f"{key}.lora_B.weight"] = torch.randn(module.out_features, 8, generator=generator) * 0.2
    config: dict[str, Any] = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16, "bias": "none"}
    return AdapterWeights(tensors=tensors, config={**config, "target_modules": {"q_proj", "v_proj"}})


def merged(model: PreTrainedModel, adapter: AdapterWeights) -> PreTrainedModel:
    result = copy.deepcopy(model)
    for key, a in adapter.tensors.items():
        if ".lora_A." in key:
            name = key.removeprefix("base_model.model.").replace(".lora_A", "")
            result.get_parameter(name).data += 2 * (adapter.tensors[key.replace("lora_A", "lora_B")] @ a)
    return result


async def test_base_and_adapters_in_one_batch_are_each_right_however_many_came_and_went(live: Live) -> None:
    """vLLM answers base requests with the adapter in the last slot, if there is one: it must never be filled."""
    base = live.models[0]
    served: dict[str | None, PreTrainedModel] = {None: base}
    try:
        for seed in range(5):
            name = f"adapter-{seed}"
            adapter = adapter_of(base, seed)
            if len(served) == NUM_SLOTS:
                with pytest.raises(RequestRejected, match=f"{NUM_SLOTS - 1} may be"):
                    await live.client.load_adapter(name, adapter)
                oldest = f"adapter-{seed - 2}"
                await live.client.unload_adapter(oldest)
                del served[oldest]
            await live.client.load_adapter(name, adapter)
            served[name] = merged(base, adapter)
            results = await asyncio.gather(*(ask(live, greedy(24), adapter=name) for name in served))
            for model, result in zip(served.values(), results, strict=True):
                assert_of(model, result)
    finally:
        for name in await live.client.adapters():
            await live.client.unload_adapter(name)


async def test_figures_count_what_was_served(live: Live) -> None:
    before = await live.client.figures()
    await ask(live, greedy(10))
    after = await live.client.figures()
    assert after.num_generated_tokens_total - before.num_generated_tokens_total == 10
    assert after.num_prompt_tokens_total - before.num_prompt_tokens_total == len(PROMPT)
    assert after.num_running == after.num_waiting == 0 and after.accept_len is None
    assert "vllm:num_requests_running" in await live.client.metrics_text()


async def test_an_attached_server_must_be_what_the_run_expects(live: Live) -> None:
    launch = await attach_vllm(live.config, 0, live.url, vocab_size=VOCAB_SIZE)
    client = launch.client(live.url)
    await client.check_identity()
    await client.close()
    for changed, message in (
        (replace(launch, traits=replace(launch.traits, release="0.26.0")), "planned for 0.26.0"),
        (replace(launch, options={**launch.options, "served-model-name": "other"}), "serves policy, not other"),
        (replace(launch, options={**launch.options, "max-model-len": CONTEXT + 1}), f"--max-model-len {CONTEXT + 1}"),
        (replace(launch, traits=replace(launch.traits, logprob_space="raw")), "gives processed_logprobs"),
    ):
        client = changed.client(live.url)
        with pytest.raises(ConfigError, match=message):
            await client.check_identity()
        await client.close()


async def test_part_of_a_fused_layer_is_completed_from_the_checkpoint(live: Live, tmp_path: Path) -> None:
    """Nothing else updates this server: what the update does not name is what the checkpoint has."""
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors = {name: live.models[1].get_parameter(name).detach()}
    mixed = copy.deepcopy(live.models[0])
    mixed.get_parameter(name).data.copy_(tensors[name])
    channel = vllm_channel("gloo", live.url, model_folder=live.folders[0], disk_root=tmp_path)
    await channel.open()
    try:
        for model, part in ((mixed, tensors), (live.models[0], {name: live.models[0].get_parameter(name).detach()})):
            await live.client.halt()
            await channel.push(WeightPlan.of(part, dtype=torch.float32), part, version=7)
            await live.client.release()
            assert_of(model, await ask(live, greedy(12)))
    finally:
        await channel.close()


async def test_weights_can_be_named_without_an_update(live: Live) -> None:
    await live.client.set_weight_version("41")
    assert await live.client.weight_version() == "41"


async def test_a_server_that_is_not_there_is_unavailable(live: Live) -> None:
    client = VLLMClient("http://127.0.0.1:9", traits=live.client.traits, model="policy")
    assert not await client.is_healthy()
    with pytest.raises(EngineUnavailable):
        await client.figures()
    await client.close()
    assert await live.client.is_healthy()
