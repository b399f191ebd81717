"""What generator.metrics switches on in one real server: its request log, its series, its spans."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from skyrl_train.engines.joined import joined_metrics
from skyrl_train.observability.tracing import span, traced
from tests.engines.sglang import live as sglang
from tests.engines.vllm import live as vllm
from tests.observability.collector import Collector, Spot, collecting
from tests.observability.series import SCRAPES, outline, series_of

pytestmark = [pytest.mark.engines, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(900)]

LONG = tuple(range(259, 299)) * 18
"""A prompt of 4 characters a token: more of them than the 2048 that level 2 shows."""
TTFT, ITL = ("0.01", "0.1", "1.0"), ("0.002", "0.02", "0.2")


@dataclass(frozen=True, kw_only=True)
class SGLang:
    live: sglang.Live
    collector: Collector
    home: Path

    async def post(self, path: str, body: dict[str, Any], **headers: str) -> None:
        async with aiohttp.ClientSession() as http, http.post(self.live.url + path, json=body, headers=headers) as said:
            assert said.status == 200, await said.text()
            await said.read()

    def logged(self, wire_id: str) -> dict[str, dict[str, Any]]:
        """What the folder's log has of one request, by event."""
        (path,) = (self.home / "requests").iterdir()
        rows = [json.loads(line.partition("] ")[2]) for line in path.read_text().splitlines()]
        return {row["event"]: row for row in rows if row["rid"] == f"{wire_id}$"}


@dataclass(frozen=True, kw_only=True)
class VLLM:
    live: vllm.Live
    collector: Collector
    home: Path


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def watched(sglang_python: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[SGLang]:
    home = tmp_path_factory.mktemp("sglang")
    with collecting() as collector:
        keys = (
            "metrics.enabled=true",
            f"metrics.buckets.time_to_first_token=[{','.join(TTFT)}]",
            f"metrics.buckets.inter_token_latency=[{','.join(ITL)}]",
            "metrics.buckets.prompt_tokens=[custom,10,50,100]",
            "metrics.buckets.generation_tokens=[tse,1000,2,8]",
            "metrics.custom_labels.allowed=[project]",
            "metrics.custom_labels.header=x-skyrl-labels",
            "metrics.logging.enabled=true",
            "metrics.logging.level=0",
            "metrics.logging.format=json",
            f"metrics.logging.targets=[stdout,{home / 'requests'}]",
            "metrics.tracing.enabled=true",
            f"metrics.tracing.otlp_endpoint={collector.endpoint}",
            "metrics.tracing.modules=request",
            "metrics.tracing.service_name=rollouts",
        )
        async with sglang.started(sglang_python, home, *keys) as live:
            yield SGLang(live=live, collector=collector, home=home)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def traced_vllm(vllm_python: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[VLLM]:
    home = tmp_path_factory.mktemp("vllm")
    with collecting() as collector:
        keys = (
            "metrics.enabled=true",
            "metrics.tracing.enabled=true",
            f"metrics.tracing.otlp_endpoint={collector.endpoint}",
            "metrics.tracing.service_name=rollouts",
            "engine_init_kwargs={enable_log_requests: true}",
        )
        async with vllm.started(vllm_python, home, *keys) as live:
            yield VLLM(live=live, collector=collector, home=home)


async def test_the_levels_of_the_request_log_differ_as_their_key_says(watched: SGLang) -> None:
    seen: dict[int, dict[str, dict[str, Any]]] = {}
    for level in (0, 1, 2, 3):
        if level:  # 0 is what it was started with
            await watched.post("/configure_logging", {"log_requests_level": level})
        await sglang.ask(watched.live, sglang.GREEDY(), LONG, wire_id=f"level-{level}")
        seen[level] = watched.logged(f"level-{level}")
        assert seen[level].keys() == {"request.received", "request.finished"}
    await watched.post("/configure_logging", {"log_requests_level": 0})
    for level, events in seen.items():
        asked, out = events["request.finished"]["obj"], events["request.finished"]["out"]
        assert out["meta_info"]["completion_tokens"] == 8, "metadata on every level"
        assert ("sampling_params" in asked) is (level >= 1)
        assert ("input_ids" in asked) is ("output_ids" in out) is (level >= 2)
    partial, everything = (seen[level]["request.finished"]["obj"] for level in (2, 3))
    assert tuple(everything["input_ids"]) == LONG
    assert len(everything["text"]) > len(partial["text"]) and "..." in partial["text"]


async def test_the_request_log_is_on_stdout_too_which_is_the_engines_log(watched: SGLang) -> None:
    await sglang.ask(watched.live, sglang.GREEDY(), wire_id="on-stdout")
    assert '"rid": "on-stdout$"' in (watched.home / "sglang-0.log").read_text()


async def test_buckets_and_labels_of_the_configuration_are_the_servers(watched: SGLang) -> None:
    sampling = {"max_new_tokens": 8, "ignore_eos": True}
    # Between the parts of a stream: an answer that comes whole has no such times.
    await watched.post("/generate", {"input_ids": sglang.PROMPT, "stream": True, "sampling_params": sampling})
    labels = {"x-skyrl-labels": json.dumps({"project": "ours", "unknown": "1"})}
    await watched.post("/v1/completions", {"model": "any", "prompt": "hi", "max_tokens": 2}, **labels)
    page = await watched.live.client.metrics_text()
    assert bounds(page, "sglang:time_to_first_token_seconds") == {*TTFT, "+Inf"}
    assert bounds(page, "sglang:inter_token_latency_seconds") == {*ITL, "+Inf"}
    assert bounds(page, "sglang:prompt_tokens_histogram") == {"10.0", "50.0", "100.0", "+Inf"}
    assert {"984.0", "1000.0", "1016.0"} <= bounds(page, "sglang:generation_tokens_histogram")
    projects = {sample.labels["project"]: sample.value for sample in samples(page, "sglang:num_requests_total")}
    assert projects["ours"] == 1 and projects[""] >= 1
    assert "unknown" not in page
    keep(page, "sglang")


async def test_sglangs_spans_arrive_and_go_on_from_ours(watched: SGLang) -> None:
    collector = watched.collector
    with traced(collector.endpoint), span("request", request_id="spanned"):
        await sglang.ask(watched.live, sglang.GREEDY(), wire_id="spanned")
    (ours,) = collector.named("request")
    # Each of the server's processes sends its own, in its own time; the outermost of a request comes last.
    await asyncio.to_thread(collector.wait_for, lambda spans: any(one.parent_id == ours.span_id for one in spans))
    await asyncio.to_thread(collector.wait_for, lambda spans: {"prefill_forward", "decode_forward"} <= of_ours(spans))
    beyond = [one for one in collector.spans if one.trace_id == ours.trace_id and one is not ours]
    assert {one.service for one in beyond} == {"rollouts"}


async def test_vllms_spans_arrive_and_go_on_from_ours(traced_vllm: VLLM) -> None:
    collector = traced_vllm.collector
    with traced(collector.endpoint), span("request", request_id="spanned"):
        await vllm.ask(traced_vllm.live, vllm.greedy(), wire_id="spanned")
    await asyncio.to_thread(collector.wait_for, lambda spans: "llm_request" in of_ours(spans))
    (ours,) = collector.named("request")
    (theirs,) = (one for one in collector.children(ours) if one.name == "llm_request")
    assert theirs.service == "rollouts" and theirs.attributes["gen_ai.usage.completion_tokens"] == 8
    assert "spanned" in theirs.attributes["gen_ai.request.id"]


async def test_vllms_own_request_log_is_an_argument_of_its_own(traced_vllm: VLLM) -> None:
    await vllm.ask(traced_vllm.live, vllm.greedy(), wire_id="logged")
    log = (traced_vllm.home / "vllm-0.log").read_text()
    assert "Received request cmpl-logged" in log and "max_tokens=8" in log


async def test_vllms_page_stays_its_own_beside_sglangs(watched: SGLang, traced_vllm: VLLM) -> None:
    pages = {
        "sglang-0": await watched.live.client.metrics_text(),
        "vllm-0": await traced_vllm.live.client.metrics_text(),
    }
    keep(pages["vllm-0"], "vllm")
    found = series_of(outline(pages["vllm-0"]))
    assert len([name for name in found if name.startswith("vllm:")]) > 50
    for family in text_string_to_metric_families(joined_metrics(pages)):
        for sample in family.samples:
            kind = family.name.partition(":")[0]
            if kind in ("sglang", "vllm"):
                assert sample.labels["engine"] == f"{kind}-0"


def of_ours(spans: Sequence[Spot]) -> set[str]:
    """The names in the traces that a span of ours began."""
    begun = {one.trace_id for one in spans if one.service == "skyrl_train"}
    return {one.name for one in spans if one.trace_id in begun}


def samples(page: str, name: str) -> list[Sample]:
    return [one for family in text_string_to_metric_families(page) for one in family.samples if one.name == name]


def bounds(page: str, name: str) -> set[str]:
    return {sample.labels["le"] for sample in samples(page, f"{name}_bucket")}


def keep(page: str, name: str) -> None:
    """For tests/observability/test_dashboard.py."""
    if os.environ.get("SKYRL_KEEP_SCRAPES") == "1":
        SCRAPES.mkdir(exist_ok=True)
        (SCRAPES / f"{name}.txt").write_text(outline(page))
