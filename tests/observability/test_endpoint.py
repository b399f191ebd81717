"""A run's /metrics over HTTP, read by Prometheus' own parser."""

from __future__ import annotations

import asyncio
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from skyrl_train.engines.embedded.engine import EmbeddedEngine
from skyrl_train.errors import ConfigError
from skyrl_train.observability import endpoint as endpoint_module
from skyrl_train.observability.endpoint import MetricsEndpoint
from skyrl_train.observability.run_series import RunSeries, series_name
from skyrl_train.types import GenerateRequest, SamplingParams
from tests.rollout.test_pipeline import make_engine

ROW = {
    "reward/mean": 0.25,
    "policy/loss": float("nan"),
    "rollout/num_tokens": 100,
    "train/num_loss_tokens": 80,
    "timing/rollout_s": 1.5,
    "timing/weight_sync_s": 0.25,
    "timing/step_s": 4.0,
    "policy/version": 3,
}


def make_series() -> RunSeries:
    return RunSeries(run_name="r", backend="embedded", model="m", total_steps=7)


def fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=20) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain")
        return str(answer.read().decode())


def values(text: str) -> dict[tuple[Any, ...], float]:
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_a_scrape_has_the_runs_series_and_the_engines() -> None:
    series, engine = make_series(), make_engine()
    try:
        async with MetricsEndpoint(series, engine) as endpoint:
            assert endpoint.url.startswith("http://127.0.0.1:")
            series.phase("rollout")
            series.log(1, ROW)
            series.phase("train")
            series.log(2, {**ROW, "reward/mean": 0.5})
            sampling = SamplingParams(max_new_tokens=5, ignore_eos=True)
            await engine.generate(GenerateRequest(request_id="a", prompt_token_ids=(5, 6), sampling=sampling))
            found = values(await asyncio.to_thread(fetch, endpoint.url))
        wanted = {
            ("skyrl_train_step",): 2,
            ("skyrl_train_total_steps",): 7,
            ("skyrl_train_info", "embedded", "m", "r"): 1,
            ("skyrl_train_reward_mean",): 0.5,
            ("skyrl_train_policy_version",): 3,
            ("skyrl_train_phase", "rollout"): 0,
            ("skyrl_train_phase", "train"): 1,
            ("skyrl_train_phase_seconds_total", "rollout"): 3.0,
            ("skyrl_train_step_seconds_sum",): 8.0,
            ("skyrl_train_weight_sync_seconds_count",): 2,
            ("skyrl_train_rollout_tokens_total",): 200,
            ("skyrl_train_loss_tokens_total",): 160,
            ("skyrl_engine_up", "embedded-0"): 1,
            ("skyrl_generated_tokens_total", "embedded-0"): 5,
            ("skyrl_sessions_open", "embedded-0"): 0,
        }
        assert {name: found.get(name) for name in wanted} == wanted
        assert str(found["skyrl_train_policy_loss",]) == "nan"
        assert found["skyrl_engine_figures_age_seconds",] < endpoint_module.ANSWER_S
        assert not any(name[0].startswith("skyrl_train_timing") for name in found)
    finally:
        await engine.close()


class WithItsOwn(EmbeddedEngine):
    """An engine whose server says something of itself."""

    OWN = (
        "# HELP sglang:num_running_reqs Running.\n# TYPE sglang:num_running_reqs gauge\n"
        'sglang:num_running_reqs{tp="0"} 3.0'
    )

    async def metrics_text(self) -> str:
        return self.OWN


async def test_what_servers_say_of_themselves_is_passed_on_as_it_is() -> None:
    engine = make_engine(WithItsOwn)
    try:
        async with MetricsEndpoint(make_series(), engine) as endpoint:
            text = await asyncio.to_thread(fetch, endpoint.url)
        assert WithItsOwn.OWN in text
        assert values(text)["sglang:num_running_reqs", "0"] == 3
    finally:
        await engine.close()


async def test_an_engine_that_is_gone_is_down_and_the_runs_series_stay() -> None:
    series, engine = make_series(), make_engine()
    series.log(1, ROW)
    async with MetricsEndpoint(series, engine) as endpoint:
        await engine.close()
        found = values(await asyncio.to_thread(fetch, endpoint.url))
    assert found["skyrl_engine_up", "embedded-0"] == 0 and found["skyrl_train_reward_mean",] == 0.25
    assert ("skyrl_generated_tokens_total", "embedded-0") not in found


async def test_a_busy_run_is_scraped_with_what_was_known_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "ANSWER_S", 0.05)
    series, engine = make_series(), make_engine()
    try:
        async with MetricsEndpoint(series, engine) as endpoint:
            await asyncio.to_thread(fetch, endpoint.url)
            with ThreadPoolExecutor() as threads:
                scrape = threads.submit(fetch, endpoint.url)
                found = values(scrape.result(timeout=20))  # blocks the event loop, as a training step does
        assert found["skyrl_engine_up", "embedded-0"] == 1
        assert found["skyrl_engine_figures_age_seconds",] >= 0.05
    finally:
        await engine.close()


async def test_other_paths_are_not_there_and_the_port_is_free_again_afterwards() -> None:
    engine = make_engine()
    try:
        async with MetricsEndpoint(make_series(), engine) as endpoint:
            with pytest.raises(urllib.error.HTTPError, match="404"):
                await asyncio.to_thread(fetch, endpoint.url.replace("/metrics", "/"))
            port = int(endpoint.url.split(":")[2].split("/")[0])
            with pytest.raises(ConfigError, match=f"generator.metrics.endpoint_port={port}"):
                MetricsEndpoint(make_series(), engine, port=port)
        with pytest.raises(urllib.error.URLError):
            await asyncio.to_thread(fetch, endpoint.url)
        async with MetricsEndpoint(make_series(), engine, port=port) as again:
            assert again.url == endpoint.url
    finally:
        await engine.close()


def test_names_are_prometheus_own() -> None:
    assert series_name("throughput/rollout_tokens_per_s") == "skyrl_train_throughput_rollout_tokens_per_s"
    assert series_name("environment/köln-1.x") == "skyrl_train_environment_k_ln_1_x"
