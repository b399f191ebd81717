"""What of generator.metrics a server can't do is refused before it starts, and engines don't share files."""

from __future__ import annotations

import pytest

from skyrl_train.config.load import load_config
from skyrl_train.config.plan import engine_arguments
from skyrl_train.errors import ConfigError

FOLDERS = (
    "generator.backend=sglang",
    "generator.metrics.logging.enabled=true",
    "generator.metrics.logging.targets=[stdout,logs/requests]",
    "generator.metrics.export_to_file.enabled=true",
    "generator.metrics.export_to_file.directory=exported",
)


@pytest.mark.parametrize(
    "keys",
    [
        ("logging.enabled=true",),
        ("export_to_file.enabled=true",),
        ("enabled=true", "buckets.e2e_request_latency=[1,2]"),
        ("tracing.enabled=true", "tracing.modules=request"),
        ("enabled=true", "custom_labels.allowed=[project]"),
    ],
    ids=["log", "export", "buckets", "trace modules", "labels"],
)
def test_what_vllm_has_not_is_refused_by_its_key(keys: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=f"generator.metrics.{keys[-1].partition('=')[0]}.*vLLM has no such option"):
        load_config(["generator.backend=vllm", *(f"generator.metrics.{key}" for key in keys)])


def test_bounds_of_tokens_are_written_as_the_key_says() -> None:
    keys = ("prompt_tokens=[custom,10,50]", "generation_tokens=[tse,1000,2.5,8]")
    config = load_config(
        [
            "generator.backend=sglang",
            "generator.metrics.enabled=true",
            *(f"generator.metrics.buckets.{key}" for key in keys),
        ]
    ).config
    arguments = engine_arguments(config, 0, release="0.5.23")
    assert arguments["prompt_tokens_buckets"] == ["custom", "10", "50"]
    assert arguments["generation_tokens_buckets"] == ["tse", "1000", "2.5", "8"]


def test_an_only_engine_writes_where_it_was_told() -> None:
    arguments = engine_arguments(load_config(FOLDERS).config, 0, release="0.5.23")
    assert arguments["log_requests_target"] == ["stdout", "logs/requests"]
    assert arguments["export_metrics_to_file_dir"] == "exported"


def test_several_engines_write_into_folders_of_their_own() -> None:
    config = load_config([*FOLDERS, "generator.num_inference_engines=2"]).config
    for index in (0, 1):
        arguments = engine_arguments(config, index, release="0.5.23")
        assert arguments["log_requests_target"] == ["stdout", f"logs/requests/sglang-{index}"]
        assert arguments["export_metrics_to_file_dir"] == f"exported/sglang-{index}"
