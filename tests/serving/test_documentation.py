from __future__ import annotations

from pathlib import Path

import pytest

from skyrl_train.engines.base import EngineStats
from skyrl_train.entrypoints.serve import read_arguments
from skyrl_train.serving.bodies import ChatBody, CompletionBody, StreamOptions
from skyrl_train.serving.metrics import ServingMetrics

PAGE = (Path(__file__).parents[2] / "docs" / "SERVING.md").read_text()


@pytest.mark.parametrize("body", [CompletionBody, ChatBody, StreamOptions])
def test_every_field_is_documented(body: type[CompletionBody | ChatBody | StreamOptions]) -> None:
    assert [name for name in body.model_fields if f"`{name}`" not in PAGE] == []


def test_every_option_is_documented() -> None:
    options = [f"--{name.replace('_', '-')}" for name in vars(read_arguments(["folder"])) if name != "model"]
    assert [option for option in options if f"`{option}`" not in PAGE] == []


def test_every_series_is_documented() -> None:
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
        accept_len=1.0,
    )
    text = ServingMetrics("e").render(stats).decode()
    names = {line.split(" ")[2] for line in text.splitlines() if line.startswith("# TYPE skyrl_")}
    names = {name for name in names if not name.endswith("_created")}
    assert len(names) > 20
    assert [name for name in sorted(names) if f"`{name}`" not in PAGE] == []
