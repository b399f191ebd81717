"""Keys of the embedded engine's scheduling, grammars and logit processors: what they become, and what can't work."""

from __future__ import annotations

from typing import Any

import pytest

from skyrl_train.config import ConfigError, load_config
from skyrl_train.engines.embedded.config import EmbeddedConfig
from skyrl_train.entrypoints.build import engine_over
from skyrl_train.entrypoints.build_rollouts import sampling_params
from skyrl_train.types import LogitProcessor
from tests.tiny import make_model, make_tokenizer

ENABLED = "generator.scheduling.enable_priority=true"
PROCESSOR = "generator.sampling_params.logit_processor"
ALLOWED = "generator.custom_logit_processor.enabled=true"


def embedded(*argv: str) -> EmbeddedConfig:
    """What the engine of this configuration is made with."""
    small = ("generator.max_model_len=96", "+generator.engine_init_kwargs.kv_cache_tokens=96")
    config = load_config([*small, *argv]).config
    return engine_over(make_model(num_hidden_layers=1), config, make_tokenizer()).core.config


def warned(*argv: str) -> str:
    return "\n".join(load_config(list(argv)).warnings)


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        ((), {"scheduling_policy": "fcfs", "preemption_threshold": None, "low_priority_values_first": False}),
        (("generator.scheduling.policy=lpm",), {"scheduling_policy": "lpm", "preemption_threshold": None}),
        ((ENABLED,), {"preemption_threshold": 10}),
        ((ENABLED, "generator.scheduling.preemption_threshold=2"), {"preemption_threshold": 2}),
        ((ENABLED, "generator.scheduling.disable_preemption=true"), {"preemption_threshold": None}),
        ((ENABLED, "generator.scheduling.low_priority_values_first=true"), {"low_priority_values_first": True}),
        ((), {"grammar_backend": "xgrammar", "json_whitespace": True, "logit_processors": False}),
        (("generator.structured_output.grammar_backend=none",), {"grammar_backend": "none"}),
        (("generator.structured_output.disable_any_whitespace=true",), {"json_whitespace": False}),
        ((ALLOWED,), {"logit_processors": True}),
    ],
)
def test_keys_reach_the_engine(argv: tuple[str, ...], wanted: dict[str, Any]) -> None:
    config = embedded(*argv)
    assert {name: getattr(config, name) for name in wanted} == wanted


@pytest.mark.parametrize(
    "setting", ["low_priority_values_first=true", "preemption_threshold=3", "disable_preemption=true"]
)
def test_keys_of_priorities_that_are_off_have_no_effect(setting: str) -> None:
    assert "has no effect while generator.scheduling.enable_priority=false" in warned(f"generator.scheduling.{setting}")
    assert "has no effect" not in warned(f"generator.scheduling.{setting}", ENABLED)


def test_a_threshold_of_what_is_switched_off_is_refused() -> None:
    keys = (ENABLED, "generator.scheduling.preemption_threshold=3", "generator.scheduling.disable_preemption=true")
    with pytest.raises(ConfigError, match=r"preemption_threshold=3 .*disable_preemption=true .*; keep one of them"):
        load_config(list(keys))


def test_cached_prefixes_first_without_a_cache_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"policy=lpm .* looks for cached prefixes, and"):
        load_config(["generator.scheduling.policy=lpm", "generator.enable_prefix_caching=false"])


def test_a_named_processor_reaches_the_request_and_the_run_says_what_it_does_to_the_gradient() -> None:
    argv = [ALLOWED, f"{PROCESSOR}=my.function", f"{PROCESSOR}_kwargs={{token_id: 3}}"]
    loaded = load_config(argv)
    found = sampling_params(loaded.config.generator.sampling_params).logit_processor
    assert found == LogitProcessor(path="my.function", arguments={"token_id": 3})
    assert sampling_params(loaded.config.generator.eval_sampling_params).logit_processor is None
    assert "logit_processor=my.function: rollouts are then drawn from another distribution" in "\n".join(
        loaded.warnings
    )
    with pytest.raises(
        ConfigError, match=r"use_tis=true .* can't correct for generator.sampling_params.logit_processor"
    ):
        load_config([*argv, "trainer.algorithm.use_tis=true"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((f"{PROCESSOR}=a.b",), "needs generator.custom_logit_processor.enabled=true: it is code that the engine runs"),
        ((f"{PROCESSOR}_kwargs={{x: 1}}",), f"are arguments of nothing; set {PROCESSOR}"),
        (
            (f"{PROCESSOR}=a.b", "generator.backend=sglang"),
            "is a function of this process, and sglang samples in another",
        ),
    ],
)
def test_a_processor_that_nobody_would_run_is_refused(argv: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(list(argv))
