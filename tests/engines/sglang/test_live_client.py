"""The client against a real SGLang server on this machine's CPU; numbers are compared with transformers'."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
import torch
from transformers import PreTrainedModel

from skyrl_train.engines.server.client import Attempt, AttemptResult, ServerBusy, WireSession
from skyrl_train.engines.sglang.args import ARGUMENTS
from skyrl_train.engines.sglang.command import flag_of
from skyrl_train.engines.sglang.errors import SessionLost
from skyrl_train.engines.sglang.installed import read_installed
from skyrl_train.engines.sglang.launch import attach_sglang
from skyrl_train.errors import ConfigError, RequestRejected, WeightUpdateError
from skyrl_train.types import AdapterWeights, Grammar, SamplingParams
from tests.engines.sglang.live import (
    BOS_ID,
    CONTEXT,
    GREEDY,
    PROMPT,
    SHAPE,
    Live,
    ask,
    assert_close,
    chosen,
    logits_of,
    started,
    text_of,
    until_running,
)
from tests.tiny import EOS_ID, make_model

pytestmark = [pytest.mark.engines, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600)]

SEATS, QUEUE = 8, 24
TARGETS = ("q_proj", "v_proj")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def live(sglang_python: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Live]:
    keys = (
        f"max_num_seqs={SEATS}",
        f"scheduling.max_queued_requests={QUEUE}",
        "scheduling.enable_priority=true",
        "metrics.enabled=true",
        "lora.enabled=true",
        "lora.max_rank=8",
        f"lora.target_modules=[{','.join(TARGETS)}]",
    )
    async with started(sglang_python, tmp_path_factory.mktemp("sglang"), *keys) as server:
        yield server


async def test_greedy_is_transformers_greedy_with_its_log_probabilities(live: Live) -> None:
    result = await ask(live, GREEDY())
    logits = logits_of(live.models[0], PROMPT, result.token_ids)
    assert result.token_ids == tuple(logits.argmax(-1).tolist())
    assert_close(result.logprobs, chosen(logits, result.token_ids))
    assert (result.finish_reason, result.stop_reason) == ("length", None)


async def test_log_probabilities_are_after_the_temperature_and_before_truncation(live: Live) -> None:
    result = await ask(
        live,
        SamplingParams(max_new_tokens=60, temperature=0.7, top_p=0.9, top_k=40, min_p=0.01, ignore_eos=True),
    )
    assert_close(result.logprobs, chosen(logits_of(live.models[0], PROMPT, result.token_ids) / 0.7, result.token_ids))


async def an_endless_answer(live: Live, length: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A prompt and its greedy answer, without the end token and with another token second than first."""
    for first in range(60, 200):
        prompt = (first, *PROMPT)
        answer = (await ask(live, GREEDY(max_new_tokens=length), ids=prompt)).token_ids
        if EOS_ID not in answer and answer[0] != answer[1]:
            return prompt, answer
    raise AssertionError("every greedy answer has the end token")


async def test_no_end_before_the_least_length_and_the_end_token_is_masked_until_then(live: Live) -> None:
    prompt, greedy = await an_endless_answer(live, 8)
    end = greedy[1]
    early = await ask(live, GREEDY(ignore_eos=False, stop_token_ids=(end,)), ids=prompt)
    assert (early.token_ids, early.finish_reason, early.stop_reason) == (greedy[:2], "stop", end)
    assert len(early.logprobs) == 2
    late = await ask(live, GREEDY(ignore_eos=False, stop_token_ids=(end,), min_new_tokens=6), ids=prompt)
    logits = logits_of(live.models[0], prompt, late.token_ids)
    logits[:6, [end, EOS_ID]] = -torch.inf
    assert len(late.token_ids) >= 6 and end not in late.token_ids[:6]
    assert_close(late.logprobs, chosen(logits, late.token_ids))


async def test_a_stop_string_is_found_across_tokens_and_kept_whole(live: Live) -> None:
    prompt, greedy = await an_endless_answer(live, 60)
    pairs = {end: text_of(greedy[end - 2 : end]) for end in range(2, len(greedy))}
    end, stop = next((end, pair) for end, pair in pairs.items() if end > 4 and "\ufffd" not in pair and len(pair) > 1)
    assert stop not in text_of(greedy[: end - 1])
    result = await ask(live, GREEDY(max_new_tokens=60, stop=("never that", stop)), ids=prompt)
    assert result.token_ids == greedy[:end]
    assert (result.finish_reason, result.stop_reason) == ("stop", stop)
    assert len(result.logprobs) == end


async def test_the_end_token_is_kept_and_is_no_stop_reason(live: Live) -> None:
    results = await asyncio.gather(
        *(ask(live, SamplingParams(max_new_tokens=400, temperature=1.5), ids=(*PROMPT, i)) for i in range(16))
    )
    ended = [result for result in results if result.finish_reason == "stop"]
    assert ended, "of 16 answers none ended"
    for result in ended:
        assert result.token_ids[-1] == EOS_ID and EOS_ID not in result.token_ids[:-1] and result.stop_reason is None


async def test_stop_ids_hold_past_the_end_token(live: Live) -> None:
    greedy = (await ask(live, GREEDY(max_new_tokens=20))).token_ids
    result = await ask(live, GREEDY(max_new_tokens=20, stop_token_ids=(greedy[5],)))
    end = greedy.index(greedy[5]) + 1
    assert (result.token_ids, result.finish_reason, result.stop_reason) == (greedy[:end], "stop", greedy[5])


@pytest.mark.parametrize(
    ("grammar", "matches"),
    [
        (Grammar(kind="regex", text="[0-9]{3}-[a-c]{4}"), "regex"),
        (Grammar(kind="ebnf", text='root ::= "yes" | "no"'), "yes no"),
        (Grammar(kind="json_schema", text='{"type": "integer", "minimum": 100, "maximum": 999}'), "number"),
    ],
)
async def test_an_answer_follows_its_grammar(live: Live, grammar: Grammar, matches: str) -> None:
    result = await ask(live, SamplingParams(max_new_tokens=40, grammar=grammar))
    text = text_of(tuple(token for token in result.token_ids if token != EOS_ID))
    if matches == "regex":
        assert len(text) == 8 and text[:3].isdigit() and set(text[4:]) <= set("abc")
    elif matches == "number":
        assert 100 <= int(json.loads(text)) <= 999
    else:
        assert text in matches.split()


async def test_all_of_the_context_is_served_and_not_more(live: Live) -> None:
    prompt = tuple(i % 256 for i in range(CONTEXT - 4))
    result = await ask(live, GREEDY(max_new_tokens=4), ids=prompt)
    assert len(result.token_ids) == 4
    with pytest.raises(RequestRejected, match=r"generator\.max_model_len"):
        await ask(live, GREEDY(max_new_tokens=5), ids=prompt)


@pytest.mark.parametrize(
    ("of_sampling", "of_attempt", "message"),
    [
        ({}, {"ids": (1, 2, 300)}, r"token id 300 is not in \[0, 300\)"),
        ({}, {"ids": (1, -1)}, "token id -1"),
        ({}, {"ids": ()}, "no tokens to start from"),
        ({}, {"adapter": "nobody"}, "never been loaded"),
        ({"stop": tuple(map(str, range(40)))}, {}, "at most 32 stop strings"),
        ({"grammar": Grammar(kind="regex", text="(a")}, {}, "Failed to compile regex grammar"),
    ],
)
async def test_what_can_never_be_served_is_refused_and_the_server_lives(
    live: Live, of_sampling: dict[str, Any], of_attempt: dict[str, Any], message: str
) -> None:
    good = asyncio.create_task(ask(live, GREEDY()))
    with pytest.raises(RequestRejected, match=message):
        await ask(live, GREEDY(**of_sampling), **of_attempt)
    assert len((await good).token_ids) == 8


async def test_one_bad_request_of_a_batch_spoils_no_other(live: Live) -> None:
    results = await asyncio.gather(
        *(ask(live, GREEDY(), adapter="nobody" if i == 2 else None) for i in range(5)), return_exceptions=True
    )
    assert [type(result) for result in results].count(RequestRejected) == 1
    assert {r.token_ids for r in results if isinstance(r, AttemptResult)} == {(await ask(live, GREEDY())).token_ids}


async def test_an_abort_gives_what_is_there_and_names_no_neighbour(live: Live) -> None:
    first, second = (
        asyncio.create_task(ask(live, SamplingParams(max_new_tokens=900, ignore_eos=True), wire_id=name))
        for name in ("twin", "twin2")
    )
    await until_running(live, 2)
    await asyncio.sleep(0.2)
    await live.client.abort(["twin", "unknown"])
    result = await first
    assert result.finish_reason == "abort" and 0 < len(result.token_ids) < 900
    assert_close(result.logprobs, chosen(logits_of(live.models[0], PROMPT, result.token_ids), result.token_ids))
    assert not second.done()
    await live.client.abort(["twin2"])
    assert (await second).finish_reason == "abort"


async def test_an_abort_in_the_queue_is_an_empty_answer(live: Live) -> None:
    long = SamplingParams(max_new_tokens=900, ignore_eos=True)
    running = [asyncio.create_task(ask(live, long, wire_id=f"seat-{i}")) for i in range(SEATS)]
    await until_running(live, SEATS)
    waiting = asyncio.create_task(ask(live, long, wire_id="waits"))
    await asyncio.sleep(0.2)
    await live.client.abort(["waits"])
    result = await waiting
    assert (result.token_ids, result.logprobs, result.finish_reason) == ((), (), "abort")
    await live.client.abort([f"seat-{i}" for i in range(SEATS)])
    assert {answer.finish_reason for answer in await asyncio.gather(*running)} == {"abort"}


async def test_a_full_queue_is_busy_and_priority_goes_first(live: Live) -> None:
    long = SamplingParams(max_new_tokens=300, ignore_eos=True)
    running = [asyncio.create_task(ask(live, long, priority=9)) for _ in range(SEATS)]
    await until_running(live, SEATS)
    low = [asyncio.create_task(ask(live, GREEDY(), wire_id=f"low-{i}")) for i in range(QUEUE)]
    await asyncio.sleep(0.3)
    with pytest.raises(ServerBusy, match="queue is full"):
        await ask(live, GREEDY())
    high = await ask(live, GREEDY(), priority=5)
    assert len(high.token_ids) == 8
    outcomes = await asyncio.gather(*low, return_exceptions=True)
    # The one of the lowest priority that came last gave its place to the higher one.
    assert [type(outcome).__name__ for outcome in outcomes].count("ServerBusy") == 1
    await asyncio.gather(*running)


async def test_cancelling_ends_the_request_in_the_server(live: Live) -> None:
    task = asyncio.create_task(ask(live, SamplingParams(max_new_tokens=900, ignore_eos=True)))
    await until_running(live)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    for _ in range(500):
        if (await live.client.figures()).num_running == 0:
            return
        await asyncio.sleep(0.02)
    raise AssertionError("the request still runs")


async def test_a_held_request_goes_on_under_new_weights_and_says_which_token_is_whose(live: Live) -> None:
    await live.client.set_weight_version("4")
    tasks = [asyncio.create_task(ask(live, SamplingParams(max_new_tokens=400, ignore_eos=True))) for _ in range(4)]
    await until_running(live, 4)
    await asyncio.sleep(0.3)
    await live.client.hold()
    before = (await live.client.figures()).num_generated_tokens_total
    await asyncio.sleep(0.3)
    assert (await live.client.figures()).num_generated_tokens_total == before
    await update_from_disk(live, live.folders[1], "5")
    assert await live.client.weight_version() == "5"
    await live.client.release()
    for result in await asyncio.gather(*tasks):
        assert result.spans is not None
        old, new = result.spans
        assert (old.version, old.start, new.version, new.end) == ("4", 0, "5", 400)
        assert 0 < old.end == new.start < 400
        for span, model in zip((old, new), live.models, strict=True):
            expected = chosen(logits_of(model, PROMPT, result.token_ids), result.token_ids)
            assert_close(result.logprobs[span.start : span.end], expected[span.start : span.end])
    await update_from_disk(live, live.folders[0], "6")


async def test_halted_a_server_starts_nothing_and_is_healthy_all_the_same(live: Live) -> None:
    await live.client.halt()
    task = asyncio.create_task(ask(live, GREEDY(), wire_id="early"))
    await asyncio.sleep(0.3)
    assert not task.done() and await live.client.is_healthy()
    await live.client.flush_cache()
    await live.client.abort(["early"])
    assert (await task).finish_reason == "abort"
    await live.client.release()
    assert len((await ask(live, GREEDY())).token_ids) == 8


async def test_a_flush_forgets_prefixes_and_is_refused_while_requests_run(live: Live) -> None:
    prompt = tuple(range(100, 180))
    await ask(live, GREEDY(), ids=prompt)
    assert (await ask(live, GREEDY(), ids=prompt)).num_cached_tokens > 70
    await live.client.flush_cache()
    assert (await ask(live, GREEDY(), ids=prompt)).num_cached_tokens == 0
    task = asyncio.create_task(ask(live, SamplingParams(max_new_tokens=900, ignore_eos=True), wire_id="busy"))
    await until_running(live)
    with pytest.raises(RequestRejected, match="flush"):
        await live.client.flush_cache()
    await live.client.abort(["busy"])
    await task


async def test_a_score_is_the_models_whatever_is_cached(live: Live) -> None:
    ids = (*PROMPT, 3, 5, 7)
    await ask(live, GREEDY(), ids=ids)
    scores = await live.client.score(ids)
    assert_close(scores, chosen(logits_of(live.models[0], ids[:1], ids[1:]), ids[1:]))


async def test_branches_of_a_session_are_the_concatenated_prompts(live: Live) -> None:
    await live.client.open_session("session", 10_000)
    root = await ask(live, GREEDY(), wire_id="root", session=WireSession(session_id="session"))
    for name, more in (("left", (7, 8)), ("right", (BOS_ID, 9))):
        branch = await ask(
            live,
            GREEDY(),
            ids=more,
            wire_id=name,
            session=WireSession(session_id="session", parent_wire_id="root"),
        )
        whole = await ask(live, GREEDY(), ids=PROMPT + root.token_ids + more)
        assert branch.token_ids == whole.token_ids and branch.num_cached_tokens >= len(PROMPT)
        assert_close(branch.logprobs, torch.tensor(whole.logprobs))
    with pytest.raises(SessionLost):
        await ask(live, GREEDY(), session=WireSession(session_id="session", parent_wire_id="nobody"))
    with pytest.raises(RequestRejected, match="still open"):
        await live.client.open_session("session", 10)
    await live.client.close_session("session")
    await live.client.close_session("session")
    with pytest.raises(SessionLost):
        await ask(live, GREEDY(), session=WireSession(session_id="session"))


def adapter(seed: int) -> AdapterWeights:
    generator = torch.Generator().manual_seed(seed)
    hidden, sizes = 64, {"q_proj": 64, "v_proj": 32}
    tensors = {}
    for layer in range(2):
        for module in TARGETS:
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(4, hidden, generator=generator) * 0.2
            tensors[f"{name}.lora_B.weight"] = torch.randn(sizes[module], 4, generator=generator) * 0.2
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8.0,
        "target_modules": list(TARGETS),
        "base_model_name_or_path": "",
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    return AdapterWeights(tensors=tensors, config=config)


@torch.no_grad()
def merged(adapter_weights: AdapterWeights) -> PreTrainedModel:
    model = make_model("qwen3", seed=0, attn_implementation="eager", **SHAPE)
    parameters = dict(model.named_parameters())
    for name, down in adapter_weights.tensors.items():
        if name.endswith("lora_A.weight"):
            up = adapter_weights.tensors[name.replace("lora_A", "lora_B")]
            target = name.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
            parameters[target] += (8.0 / 4) * up @ down
    return model


async def test_adapters_from_tensors_are_the_merged_models_in_one_batch(live: Live) -> None:
    adapters = {f"adapter-{seed}": adapter(seed) for seed in (1, 2)}
    for name, weights in adapters.items():
        await live.client.load_adapter(name, weights)
    names = [None, *adapters, None, *adapters]
    results = await asyncio.gather(*(ask(live, GREEDY(), adapter=name) for name in names))
    models = {None: live.models[0], **{name: merged(weights) for name, weights in adapters.items()}}
    for name, result in zip(names, results, strict=True):
        assert_close(result.logprobs, chosen(logits_of(models[name], PROMPT, result.token_ids), result.token_ids))
    assert len({result.token_ids for result in results}) == 3
    with pytest.raises(WeightUpdateError, match="adapter-1"):
        await live.client.load_adapter("adapter-1", adapters["adapter-1"])
    for name in adapters:
        await live.client.unload_adapter(name)
    with pytest.raises(RequestRejected):
        await ask(live, GREEDY(), adapter="adapter-2")


async def test_memory_that_nothing_frees_is_not_given_back(live: Live) -> None:
    assert "sleep" not in live.client.traits.capabilities
    with pytest.raises(RequestRejected, match="frees nothing"):
        await live.client.sleep(["kv_cache"])


async def test_the_servers_own_series_come_through(live: Live) -> None:
    text = await live.client.metrics_text()
    assert "sglang:num_running_reqs" in text and "sglang:generation_tokens_total" in text
    figures = await live.client.figures()
    assert figures.num_steps_total and figures.num_generated_tokens_total > figures.num_cached_tokens_total > 0


async def test_a_running_server_can_be_attached_to_and_says_what_differs(live: Live) -> None:
    attached = await attach_sglang(live.config, 0, live.url.removeprefix("http://"))
    assert attached.traits == live.client.traits
    assert await attached.is_healthy()
    result = await attached.generate(Attempt(wire_id="attached", token_ids=PROMPT, sampling=GREEDY()))
    assert result.token_ids == (await ask(live, GREEDY())).token_ids
    await attached.close()
    other = live.config.model_copy(
        update={
            "generator": live.config.generator.model_copy(
                update={
                    "speculative_decoding": live.config.generator.speculative_decoding.model_copy(
                        update={"enabled": True}
                    )
                }
            )
        }
    )
    with pytest.raises(ConfigError, match="speculative_algorithm is None"):
        await attach_sglang(other, 0, live.url)


async def test_the_stored_list_of_arguments_is_the_installed_releases(live: Live, sglang_python: Path) -> None:
    installed = read_installed(str(sglang_python), {"SGLANG_USE_CPU_ENGINE": "1"})
    stored = Path(__file__).parents[2] / "config" / "sglang_fields" / f"{installed.release}.txt"
    without_option = {"custom_sigquit_handler", "stat_loggers"}
    assert set(stored.read_text().split()) - without_option <= set(installed.options)
    wrong = [
        row.key
        for row in ARGUMENTS
        if row.exists_in(installed.release) and flag_of(row.field) not in installed.options[row.field].flags
    ]
    assert wrong == []


async def update_from_disk(live: Live, folder: str, version: str) -> None:
    body = {"model_path": folder, "flush_cache": True, "weight_version": version}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{live.url}/update_weights_from_disk", json=body) as response,
    ):
        assert (await response.json())["success"], await response.text()
