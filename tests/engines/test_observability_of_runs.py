"""A whole run on two real SGLang servers with everything that generator.metrics can switch on: what a user finds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from skyrl_train.engines.server.ports import free_port
from skyrl_train.observability.request_export import by_turn, of_rollout, read_request_export
from tests.contract import models
from tests.observability.collector import Collector, collecting
from tests.observability.series import SCRAPES, outline, series_of

pytestmark = [pytest.mark.engines, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
ENGINES = ("sglang-0", "sglang-1")
E2E_BOUNDS = ("0.05", "0.5", "5.0")
TURNS = 3
STEPS = 3


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A run that ended well: the user's folder, which it ran in, the spans, and the last page that was scraped."""

    home: Path
    collector: Collector
    page: str

    @property
    def rollouts(self) -> list[dict[str, Any]]:
        paths = sorted((self.home / "run" / "rollouts").glob("*.jsonl"))
        return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def overrides(home: Path, python: Path, collector: Collector, port: int) -> list[str]:
    rows = [json.dumps({"prompt": f"{number}?"}) for number in range(12)]
    (home / "train.jsonl").write_text("\n".join(rows) + "\n")
    (home / "val.jsonl").write_text("\n".join(rows[:2]) + "\n")
    stops = list(range(0, 256, 4))  # a random model seldom ends an answer
    return [
        f"trainer.policy.model.path={models.save(models.policy(), home / 'model')}",
        "trainer.placement.policy_num_gpus_per_node=0",
        "data.train_data=[train.jsonl]",
        "data.val_data=[val.jsonl]",
        "environment.env_class=tests.entrypoints.test_multi_turn_job:AskingEnv",
        "trainer.run_path=run",
        "trainer.run_name=watched",
        "trainer.train_batch_size=4",
        "trainer.policy_mini_batch_size=4",
        "trainer.epochs=1",
        "trainer.eval_interval=2",
        "trainer.rollout_log_interval=1",
        "trainer.logger=[console,jsonl]",
        "generator.backend=sglang",
        f"generator.engine_python={python}",
        f"generator.num_inference_engines={len(ENGINES)}",
        "generator.max_model_len=512",
        f"generator.max_turns={TURNS}",
        "generator.max_input_length=160",
        "generator.n_samples_per_prompt=2",
        "generator.sessions.enabled=true",
        "generator.sampling_params.max_generate_length=12",
        "generator.eval_sampling_params.max_generate_length=12",
        f"generator.sampling_params.stop_token_ids={stops}",
        f"generator.eval_sampling_params.stop_token_ids={stops}",
        "generator.metrics.enabled=true",
        f"generator.metrics.endpoint_port={port}",
        f"generator.metrics.buckets.e2e_request_latency=[{','.join(E2E_BOUNDS)}]",
        "+generator.metrics.custom_labels.extra.team=math",
        "generator.metrics.logging.enabled=true",
        "generator.metrics.logging.level=1",
        "generator.metrics.logging.format=json",
        "generator.metrics.logging.targets=[stdout,logs/requests]",
        "generator.metrics.export_to_file.enabled=true",
        "generator.metrics.export_to_file.directory=exported",
        "generator.metrics.tracing.enabled=true",
        f"generator.metrics.tracing.otlp_endpoint={collector.endpoint}",
    ]


@pytest.fixture(scope="module")
def finished(sglang_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    home, port, page = tmp_path_factory.mktemp("home"), free_port(), ""
    with collecting() as collector:
        command = [sys.executable, "-m", "skyrl_train.entrypoints.main_base"]
        output = home / "output.txt"
        with output.open("w") as file:
            run = subprocess.Popen(
                [*command, *overrides(home, sglang_python, collector, port)],
                cwd=home,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
        while run.poll() is None:
            page = scraped(port) or page
            time.sleep(0.1)
        assert run.returncode == 0, output.read_text()
        assert f"http://127.0.0.1:{port}/metrics" in output.read_text()
        assert page, "the run was over before it was scraped"
        yield Finished(home=home, collector=collector, page=page)


def scraped(port: int) -> str | None:
    """The page while the run has one that shows a step and its servers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            page = answer.read().decode()
    except OSError:
        return None
    return page if "skyrl_train_reward_mean" in page and "sglang:" in page else None


def test_the_page_has_far_more_than_fifty_series_of_the_run_its_engine_and_its_servers(finished: Finished) -> None:
    found = series_of(outline(finished.page))
    groups = {
        "run": [name for name in found if name.startswith("skyrl_train_")],
        "engine": [name for name in found if name.startswith("skyrl_") and not name.startswith("skyrl_train_")],
        "servers": [name for name in found if name.startswith("sglang:")],
    }
    assert len(groups["run"]) > 50 and len(groups["engine"]) > 10 and len(groups["servers"]) > 50, groups
    assert "skyrl_engine_up" in found and "skyrl_train_weight_sync_seconds_sum" in found
    for name in ("time_to_first_token_seconds", "queue_time_seconds", "e2e_request_latency_seconds"):
        assert f"sglang:{name}_bucket" in found
    if os.environ.get("SKYRL_KEEP_SCRAPES") == "1":
        SCRAPES.mkdir(exist_ok=True)
        (SCRAPES / "run_on_sglang.txt").write_text(outline(finished.page))


def test_servers_are_told_apart_and_carry_the_labels_of_the_configuration(finished: Finished) -> None:
    families = {family.name: family for family in text_string_to_metric_families(finished.page)}
    tokens = families["sglang:generation_tokens"].samples
    assert {sample.labels["engine"] for sample in tokens} == set(ENGINES), "both served some of it"
    for family in families.values():
        for sample in family.samples:
            if family.name.startswith("sglang:"):
                assert sample.labels["engine"] in ENGINES, sample
                # All but the counts of its HTTP side, which know no labels of the user's.
                assert sample.labels.get("team") == ("math" if "engine_type" in sample.labels else None), sample


def test_the_bounds_of_a_histogram_are_those_of_the_configuration(finished: Finished) -> None:
    families = {family.name: family for family in text_string_to_metric_families(finished.page)}
    buckets = {
        sample.labels["le"]
        for sample in families["sglang:e2e_request_latency_seconds"].samples
        if sample.name.endswith("_bucket")
    }
    assert buckets == {*E2E_BOUNDS, "+Inf"}


def test_the_request_log_is_in_the_engines_log_and_in_a_folder_of_the_users(finished: Finished) -> None:
    for engine in ENGINES:
        stdout = finished.home / "run" / "engines" / f"{engine}.log"
        (own,) = (finished.home / "logs" / "requests" / engine).iterdir()
        logged = [json.loads(line.partition("] ")[2]) for line in own.read_text().splitlines()]
        ours = [row for row in logged if row["event"] == "request.finished" and "#" in str(row["rid"])]
        assert ours, engine
        for row in ours:
            assert row["obj"]["sampling_params"]["max_new_tokens"] <= 12, "level 1 has the sampling parameters"
            assert "input_ids" not in row["obj"] and "output_ids" not in row["out"], "and no tokens"
            assert row["rid"] in stdout.read_text()


def test_each_turn_of_each_trajectory_finds_the_line_of_its_request(finished: Finished) -> None:
    exported = read_request_export(finished.home / "exported")
    assert {one.engine for one in exported} == set(ENGINES)
    grouped, joined, turns = by_turn(exported), set(), set()
    rollouts = finished.rollouts
    assert {row["kind"] for row in rollouts} == {"train", "eval"}
    for rollout in rollouts:
        for turn, (made, found) in enumerate(zip(rollout["turns"], of_rollout(rollout, grouped), strict=True)):
            complete = [one for one in found if one.finish_reason != "abort"]
            # Evaluations that the same version answers twice, the last step's and the one at its end, look alike.
            assert complete, (rollout["trajectory_id"], turn)
            assert any(one.num_generated_tokens == len(made["token_ids"]) for one in complete)
            assert all(one.e2e_latency_s is not None and one.e2e_latency_s > 0 for one in complete)
            joined |= {(one.process, one.engine, one.number) for one in found}
            turns.add(turn)
            if rollout["kind"] == "train":
                assert len(complete) == 1 and complete[0].num_generated_tokens == len(made["token_ids"])
    assert len(turns) > 1, "later turns are found too"
    assert joined == {(one.process, one.engine, one.number) for one in exported}, "no line is left over"


def test_a_step_can_be_followed_into_the_servers(finished: Finished) -> None:
    collector = finished.collector
    steps = {span.attributes["skyrl.step"]: span for span in collector.named("step")}
    assert sorted(steps) == list(range(1, STEPS + 1))
    for step in steps.values():
        (rollout,) = (span for span in collector.children(step) if span.name == "rollout")
        trajectories = collector.children(rollout)
        assert len(trajectories) == 8
        for trajectory in trajectories:
            requests = collector.children(trajectory)
            assert 1 <= len(requests) <= TURNS
            for request in requests:
                beyond = collector.children(request)
                assert beyond and {span.trace_id for span in beyond} == {step.trace_id}
                assert {span.service for span in beyond} == {"sglang"}
                wire_ids = {str(span.attributes.get("rid")) for span in beyond}
                assert any(wire.startswith(f"{request.attributes['skyrl.request_id']}#") for wire in wire_ids), wire_ids
