"""Keys of sessions, priorities and the metrics endpoint: what can't work is refused, what gains nothing is said."""

from __future__ import annotations

import pytest

from skyrl_train.config import ConfigError, load_config

ON = ("generator.backend=sglang", "generator.sessions.enabled=true", "generator.max_turns=4")
CONTEXT = ("generator.max_input_length=3000", "generator.sampling_params.max_generate_length=1000")


def warned(*argv: str) -> str:
    return "\n".join(load_config(list(argv)).warnings)


def test_sessions_of_one_turn_gain_nothing_and_that_is_said() -> None:
    assert "gains nothing: with generator.max_turns=1" in warned(*ON, "generator.max_turns=1")
    assert "gains nothing" not in warned(*ON)


def test_a_session_holds_a_whole_context_or_is_refused_with_both_numbers() -> None:
    too_small = "generator.sessions.default_capacity=3999"
    with pytest.raises(ConfigError, match=r"default_capacity=3999 .* take up to 4000 tokens"):
        load_config([*ON, *CONTEXT, too_small])
    load_config([*ON, *CONTEXT, "generator.sessions.default_capacity=4000"])
    with pytest.raises(ConfigError, match=r"take up to 40000 tokens"):
        load_config([*ON, *CONTEXT, "generator.max_model_len=40000"])
    load_config([*CONTEXT, "generator.max_turns=4", too_small][:-1])


@pytest.mark.parametrize("setting", ["default_capacity=4096", "pool_sessions=true", "max_pool_size=3"])
def test_keys_of_sessions_that_are_off_have_no_effect(setting: str) -> None:
    off = ("generator.backend=sglang", f"generator.sessions.{setting}")
    assert "generator.sessions.enabled=false opens none" in warned(*off)
    assert "opens none" not in warned(*ON, f"generator.sessions.{setting}")


def test_the_size_of_a_pool_that_is_not_there_has_no_effect() -> None:
    assert "generator.sessions.pool_sessions=false" in warned(*ON, "generator.sessions.max_pool_size=3")


def test_priorities_of_one_turn_are_all_the_same_and_that_is_said() -> None:
    on = ("generator.backend=sglang", "generator.scheduling.enable_priority=true")
    assert "all have 0" in warned(*on)
    assert "all have 0" not in warned(*on, "generator.max_turns=3")


def test_the_endpoint_is_there_for_every_backend_and_a_port_needs_it() -> None:
    for backend in ("embedded", "sglang", "vllm"):
        on = (f"generator.backend={backend}", "generator.metrics.endpoint_port=9400")
        assert "endpoint_port" not in warned(*on, "generator.metrics.enabled=true")
        assert "generator.metrics.enabled=false" in warned(*on)
