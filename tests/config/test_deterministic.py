"""What deterministic inference of the embedded engine goes with."""

from __future__ import annotations

import pytest

from skyrl_train.config import load_config
from tests.config.test_checks import refused

ENABLED = "generator.deterministic_inference.enabled=true"
TARGET = "generator.deterministic_inference.rl_on_policy_target=fsdp"


def test_both_are_taken_on_a_cpu() -> None:
    config = load_config([ENABLED, TARGET]).config.generator.deterministic_inference
    assert config.enabled and config.rl_on_policy_target == "fsdp"


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        ((TARGET,), "needs generator.deterministic_inference.enabled=true"),
        ((ENABLED, "trainer.placement.policy_num_gpus_per_node=1"), "is built for the CPU in the embedded engine"),
        ((ENABLED, "trainer.policy.model.dtype=bfloat16"), "is built for float32 in the embedded engine"),
        (
            (ENABLED, "generator.engine_init_kwargs.attention_backend=reference"),
            "has an attention of its own",
        ),
        ((ENABLED, "generator.lora.enabled=true"), "what an adapter adds is computed in a way that depends on"),
        ((ENABLED, TARGET, "trainer.policy.model.lora.rank=8"), "the engine runs merged matrices"),
        ((ENABLED, TARGET, "trainer.gradient_checkpointing=true"), "not built with recomputed activations"),
    ],
)
def test_what_it_does_not_go_with(overrides: tuple[str, ...], why: str) -> None:
    message = refused(*overrides)
    assert why in message and "generator.deterministic_inference" in message


def test_servers_take_the_target_without_those_limits() -> None:
    load_config(["generator.backend=sglang", ENABLED, TARGET, "trainer.gradient_checkpointing=true"])
