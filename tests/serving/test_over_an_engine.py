"""The app over an engine that the test holds: pauses, failures, clients that hang up, metrics."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest
import torch
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from skyrl_train.engines.base import Engine, EngineInfo, EngineStats
from skyrl_train.engines.embedded import EmbeddedEngine
from skyrl_train.serving.app import create_app
from skyrl_train.serving.metrics import ServingMetrics
from skyrl_train.serving.protocol import StreamingEngine
from skyrl_train.serving.service import Service
from skyrl_train.types import Completion, GenerateRequest, LocalWeights, SamplingParams, WeightUpdate
from tests.serving.running import app_running, make_engine
from tests.tiny import make_model, make_tokenizer

TOKENIZER = make_tokenizer()
ENDLESS = {"prompt": "12+7=", "max_tokens": 1900, "ignore_eos": True, "seed": 1}


@pytest.fixture
async def engine() -> AsyncIterator[EmbeddedEngine]:
    opened = make_engine()
    yield opened
    await opened.close()


@pytest.fixture
async def client(engine: EmbeddedEngine) -> AsyncIterator[httpx.AsyncClient]:
    async with (
        app_running(create_app(engine, TOKENIZER, "tiny")) as url,
        httpx.AsyncClient(base_url=url, timeout=60) as opened,
    ):
        yield opened


async def samples(client: httpx.AsyncClient) -> dict[str, float]:
    """Every sample of /metrics, labels other than the engine's in the name."""
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    found = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            labels = {name: value for name, value in sample.labels.items() if name != "engine"}
            found[sample.name + "".join(f"|{value}" for value in labels.values())] = sample.value
    return found


async def eventually(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(30):
        while not await condition():
            await asyncio.sleep(0.01)


def engine_is(engine: Engine, **wanted: Any) -> Callable[[], Awaitable[bool]]:
    async def check() -> bool:
        stats = await engine.stats()
        return all(getattr(stats, name) == value for name, value in wanted.items())

    return check


async def test_a_client_that_hangs_up_frees_its_request(client: httpx.AsyncClient, engine: EmbeddedEngine) -> None:
    waiting = asyncio.ensure_future(client.post("/v1/completions", json={**ENDLESS, "n": 2}))
    await eventually(engine_is(engine, num_running=2))
    await engine.pause()  # from here on the requests can't end by themselves
    assert (await engine.stats()).num_running == 2
    waiting.cancel()
    await eventually(engine_is(engine, num_running=0, num_waiting=0))
    engine.core.check_integrity()
    assert (await samples(client))["skyrl_answers_total|dropped"] == 2


async def test_a_client_that_leaves_a_stream_frees_its_request(
    client: httpx.AsyncClient, engine: EmbeddedEngine
) -> None:
    async with client.stream("POST", "/v1/completions", json={**ENDLESS, "stream": True, "n": 3}) as response:
        lines = response.aiter_lines()
        await anext(lines)
        await engine.pause()
        assert (await engine.stats()).num_running == 3
    await eventually(engine_is(engine, num_running=0, num_waiting=0))
    assert (await samples(client))["skyrl_answers_total|dropped"] == 3


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_hangs_up_in_the_queue_leaves_it(
    client: httpx.AsyncClient, engine: EmbeddedEngine, stream: bool
) -> None:
    await engine.pause()
    waiting = asyncio.ensure_future(client.post("/v1/completions", json={**ENDLESS, "stream": stream}))
    await eventually(engine_is(engine, num_waiting=1))
    waiting.cancel()
    await eventually(engine_is(engine, num_waiting=0))


async def test_requests_wait_while_the_engine_is_paused_and_health_says_so(
    client: httpx.AsyncClient, engine: EmbeddedEngine
) -> None:
    assert (await client.get("/health")).json() == {"status": "ok"}
    await engine.pause()
    waiting = asyncio.ensure_future(client.post("/v1/completions", json={"prompt": "a", "seed": 1}))
    await eventually(engine_is(engine, num_waiting=1))
    response = await client.get("/health")
    assert response.status_code == 503 and "paused" in response.json()["reason"]
    await engine.update_weights(WeightUpdate(version=7, source=LocalWeights()))
    await engine.resume()
    answer = (await waiting).json()
    assert answer["system_fingerprint"] == "policy-7"
    assert (await client.get("/health")).status_code == 200
    assert (await samples(client))["skyrl_policy_version"] == 7


async def test_an_answer_across_a_weight_update_names_both_versions(
    client: httpx.AsyncClient, engine: EmbeddedEngine
) -> None:
    body = {**ENDLESS, "max_tokens": 400, "return_token_ids": True}
    waiting = asyncio.ensure_future(client.post("/v1/completions", json=body))
    await eventually(engine_is(engine, num_running=1))
    await engine.pause()
    await engine.update_weights(WeightUpdate(version=1, source=LocalWeights()))
    await engine.resume()
    answer = (await waiting).json()
    first, second = answer["choices"][0]["policy_versions"]
    assert (first["version"], second["version"]) == (0, 1) and first["end"] == second["start"] and second["end"] == 400
    assert answer["system_fingerprint"] == "policy-0-1"


async def test_an_aborted_answer_keeps_what_it_has(client: httpx.AsyncClient, engine: EmbeddedEngine) -> None:
    waiting = asyncio.ensure_future(client.post("/v1/completions", json=ENDLESS))

    async def began() -> bool:
        return (await engine.stats()).num_generated_tokens_total > 5

    await eventually(began)
    await engine.pause("abort")
    answer = (await waiting).json()
    assert answer["choices"][0]["finish_reason"] == "abort" and answer["usage"]["completion_tokens"] > 5


async def test_an_engine_that_fails_answers_503_and_says_why() -> None:
    model = make_model()
    broken = threading.Event()

    def fail(*_: object) -> None:
        if broken.is_set():
            raise RuntimeError("the device is lost")

    model.register_forward_pre_hook(fail)
    engine = make_engine(model)
    app = create_app(engine, TOKENIZER, "tiny")
    async with app_running(app) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        async with client.stream("POST", "/v1/completions", json={**ENDLESS, "stream": True}) as response:
            lines = response.aiter_lines()
            await anext(lines)
            broken.set()
            rest = [line.removeprefix("data: ") async for line in lines if line]
        assert json.loads(rest[-1])["error"]["code"] == "engine_unavailable" and "[DONE]" not in rest
        for body in (ENDLESS, {**ENDLESS, "stream": True}):
            answer = await client.post("/v1/completions", json=body)
            assert answer.status_code == 503 and "the device is lost" in answer.json()["error"]["message"]
            assert answer.json()["error"]["type"] == "server_error"
        health = await client.get("/health")
        assert health.status_code == 503 and "the device is lost" in health.json()["reason"]
        found = await samples(client)
        assert found["skyrl_engine_up"] == 0 and "skyrl_requests_running" not in found
        assert found["skyrl_http_requests_total|/v1/completions|503"] == 2
    await engine.close()


async def test_an_engine_that_hangs_is_unhealthy() -> None:
    model = make_model()
    stuck, entered = threading.Event(), threading.Event()

    def hang(*_: object) -> None:
        entered.set()
        stuck.wait(60)

    engine = make_engine(model)
    model.register_forward_pre_hook(hang)
    service = Service(engine, TOKENIZER, "tiny", ServingMetrics("embedded-0"), health_timeout_s=0.1)
    request = GenerateRequest(request_id="r", prompt_token_ids=(1,), sampling=SamplingParams(max_new_tokens=2))
    waiting = asyncio.ensure_future(engine.generate(request))
    await asyncio.to_thread(entered.wait, 30)
    reason = await service.why_unhealthy()
    assert reason is not None and "has not answered for 0.1 s" in reason
    assert b"skyrl_engine_up" in await service.render_metrics()
    stuck.set()
    await waiting
    assert await service.why_unhealthy() is None
    await engine.close()


async def test_metrics_count_what_was_served(client: httpx.AsyncClient) -> None:
    prompt = "a prompt of some length"
    for _ in range(2):
        answer = await client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 4, "ignore_eos": True})
        assert answer.status_code == 200
    await client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 9, "stream": True, "ignore_eos": True})
    await client.post("/v1/completions", json={"prompt": prompt, "nonsense": 1})
    await client.get("/v1/no/such/path")
    found = await samples(client)
    n = len(prompt)
    expected = {
        "skyrl_engine_up": 1,
        "skyrl_engine_paused": 0,
        "skyrl_requests_running": 0,
        "skyrl_requests_waiting": 0,
        "skyrl_policy_version": 0,
        "skyrl_prompt_tokens_total": 3 * n,
        "skyrl_cached_tokens_total": 2 * (n - 1),
        "skyrl_cache_hit_frac": 2 * (n - 1) / (3 * n),
        "skyrl_generated_tokens_total": 4 + 4 + 9,
        "skyrl_retractions_total": 0,
        "skyrl_evicted_tokens_total": 0,
        "skyrl_answers_total|length": 3,
        "skyrl_http_requests_total|/v1/completions|200": 3,
        "skyrl_http_requests_total|/v1/completions|400": 1,
        "skyrl_http_requests_total|other|404": 1,
        "skyrl_time_to_first_token_seconds_count": 1,
        "skyrl_inter_token_seconds_count": 8,
        "skyrl_request_seconds_count": 3,
        "skyrl_request_prompt_tokens_sum": 3 * n,
        "skyrl_request_generated_tokens_sum": 17,
        "skyrl_request_generated_tokens_bucket|4.0": 2,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found["skyrl_steps_total"] >= 17 and 0 < found["skyrl_kv_used_frac"] < 1
    assert found["process_cpu_seconds_total"] > 0 and found["process_resident_memory_bytes"] > 2**20
    assert found["skyrl_request_seconds_sum"] >= found["skyrl_time_to_first_token_seconds_sum"] > 0


def test_speculation_has_a_series_only_where_there_is_any() -> None:
    stats = EngineStats(
        policy_version=0,
        paused=False,
        num_running=0,
        num_waiting=0,
        kv_used_frac=0.0,
        num_prompt_tokens_total=0,
        num_cached_tokens_total=0,
        num_generated_tokens_total=0,
        num_retractions_total=0,
        num_evicted_tokens_total=0,
        num_steps_total=0,
        accept_len=2.5,
    )
    metrics = ServingMetrics("e")
    assert isinstance(metrics.registry, CollectorRegistry)
    assert b'skyrl_accept_len{engine="e"} 2.5' in metrics.render(stats)
    assert b"skyrl_accept_len" not in metrics.render(None)


CYCLE = "é€😀日".encode()
"""Twelve bytes, each of them once."""


def model_that_says(cycle: bytes) -> torch.nn.Module:
    """Says these bytes in turn, for ever: each token's embedding points at the next one's row of the head."""
    model: Any = make_model()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                weight.zero_()
        embedding = model.get_input_embeddings().weight
        head = model.lm_head.weight
        head.zero_()
        for byte, following in zip(cycle, cycle[1:] + cycle[:1], strict=True):
            head[following] = embedding[byte] * 100
    return model


async def test_streamed_text_is_cut_between_characters_and_never_within() -> None:
    engine = make_engine(model_that_says(CYCLE))
    body = {"prompt": [CYCLE[-1]], "max_tokens": 27, "temperature": 0, "stream": True}
    async with (
        app_running(create_app(engine, TOKENIZER, "tiny")) as url,
        httpx.AsyncClient(base_url=url, timeout=60) as client,
        client.stream("POST", "/v1/completions", json=body) as response,
    ):
        lines = [line.removeprefix("data: ") async for line in response.aiter_lines() if line]
    texts = [json.loads(line)["choices"][0]["text"] for line in lines[:-1]]
    assert "".join(texts) == "é€😀日" * 2 + "é\ufffd", "the last answer token is the first third of €"
    assert len(texts) > 2 and not any("\ufffd" in text for text in texts[:-1])
    await engine.close()


class WholeOnly:
    """An engine that is no StreamingEngine: it gives answers only whole."""

    def __init__(self, inner: EmbeddedEngine) -> None:
        self._inner = inner
        self.info: EngineInfo = inner.info

    def __getattr__(self, name: str) -> Any:
        if name == "stream":
            raise AttributeError(name)
        return getattr(self._inner, name)

    async def generate(self, request: GenerateRequest) -> Completion:
        return await self._inner.generate(request)


async def test_an_engine_without_streams_streams_one_piece(engine: EmbeddedEngine, client: httpx.AsyncClient) -> None:
    plain: Any = WholeOnly(engine)
    assert isinstance(engine, StreamingEngine) and not isinstance(plain, StreamingEngine)
    body = {"prompt": "a", "seed": 1, "max_tokens": 20, "stream": True}
    transport = httpx.ASGITransport(app=create_app(plain, TOKENIZER, "tiny"))
    async with httpx.AsyncClient(transport=transport, base_url="http://plain") as other:
        lines = [line for line in (await other.post("/v1/completions", json=body)).text.split("\n") if line]
    assert len(lines) == 2 and lines[1] == "data: [DONE]"
    [choice] = json.loads(lines[0].removeprefix("data: "))["choices"]
    whole = (await client.post("/v1/completions", json={**body, "stream": False})).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (whole["text"], whole["finish_reason"])


async def test_what_an_engine_cannot_do_is_refused_by_field(engine: EmbeddedEngine) -> None:
    plain: Any = WholeOnly(engine)
    plain.info = replace(engine.info, capabilities=frozenset())
    transport = httpx.ASGITransport(app=create_app(plain, TOKENIZER, "tiny"))
    async with httpx.AsyncClient(transport=transport, base_url="http://plain") as client:
        wishes = {"min_p": 0.1, "repetition_penalty": 1.1, "presence_penalty": 1, "frequency_penalty": 1, "seed": 0}
        for name, value in {**wishes, "stop": "x"}.items():
            response = await client.post("/v1/completions", json={"prompt": "a", name: value})
            assert response.status_code == 400 and response.json()["error"]["param"] == name
        off = {"min_p": 0, "repetition_penalty": 1, "presence_penalty": 0, "seed": None, "stop": None}
        assert (await client.post("/v1/completions", json={"prompt": "a", **off})).status_code == 200
