"""A whole run as Prometheus sees it, and the engine's figures in its log."""

from __future__ import annotations

import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from skyrl_train.config.load import load_config
from skyrl_train.entrypoints.run import DONE, REFUSED, run
from skyrl_train.observability.metrics import read_metrics
from tests.entrypoints.letters import LetterEnv
from tests.entrypoints.test_main_job import STEPS, arguments, inputs

__all__ = ["inputs"]

PAGES: list[str] = []
URL: list[str] = []


class ScrapingEnv(LetterEnv):
    """Looks at the run that it is a part of, from a thread of the environments."""

    runs_inline = False

    def step(self, action: str) -> dict[str, Any]:
        with urllib.request.urlopen(URL[0], timeout=30) as answer:
            PAGES.append(answer.read().decode())
        return super().step(action)


@pytest.fixture
def port() -> Iterator[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = int(free.getsockname()[1])
    PAGES.clear()
    URL[:] = [f"http://127.0.0.1:{number}/metrics"]
    yield number


def test_a_run_is_scraped_while_it_runs_and_logs_the_engines_figures(
    inputs: Path, tmp_path: Path, port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    more = (
        "generator.metrics.enabled=true",
        f"generator.metrics.endpoint_port={port}",
        "environment.env_class=tests.entrypoints.test_observed_job:ScrapingEnv",
    )
    assert run(load_config(arguments(inputs, tmp_path / "run", *more))) == DONE
    assert URL[0] in capsys.readouterr().out

    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(PAGES[-1])
        for sample in family.samples
    }
    ours = {name for name in found if name[0].startswith("skyrl_")}
    assert len({name[0] for name in ours}) > 50, "series under names of our own"
    # The last look is at the evaluation after the last step: what it followed is not logged yet.
    assert found["skyrl_train_step",] == STEPS - 1 and found["skyrl_train_total_steps",] == STEPS
    assert found["skyrl_engine_up", "embedded-0"] == 1
    assert found["skyrl_policy_version", "embedded-0"] == 2 * STEPS
    assert found["skyrl_train_phase", "evaluate"] == 1 and found["skyrl_train_phase", "rollout"] == 0

    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")[1:]
    assert found["skyrl_train_rollout_tokens_total",] == sum(row["rollout/num_tokens"] for row in rows[:-1])
    for row in rows:
        assert row["engine/up"] == 1 and row["engine/sessions"] == 0 and row["engine/kv_used_frac"] > 0
    # Evaluations are in the step after them, or in their own.
    trained = sum(row["rollout/num_tokens"] for row in rows)
    assert sum(row["engine/generated_tokens"] for row in rows) > trained


def test_a_port_that_is_taken_is_said_by_its_key(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        more = ("generator.metrics.enabled=true", f"generator.metrics.endpoint_port={port}")
        assert run(load_config(arguments(inputs, tmp_path / "run", *more))) == REFUSED
    assert f"generator.metrics.endpoint_port={port}" in capsys.readouterr().err
