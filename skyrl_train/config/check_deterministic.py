"""Rules of the embedded engine's deterministic inference, and of the trainer that follows it to the bit."""

from __future__ import annotations

from collections.abc import Iterator

from skyrl_train.config.findings import Checked, Finding, Rule, error

_ENABLED = "generator.deterministic_inference.enabled"
_TARGET = "generator.deterministic_inference.rl_on_policy_target"


def where_it_is_built(checked: Checked) -> Iterator[Finding]:
    config = checked.config
    if config.generator.backend != "embedded" or not config.generator.deterministic_inference.enabled:
        return
    name = checked.show(_ENABLED)
    if config.trainer.placement.policy_num_gpus_per_node:
        yield error(
            f"{name} is built for the CPU in the embedded engine, found "
            f"{checked.show('trainer.placement.policy_num_gpus_per_node')}; set 0, use generator.backend=sglang, or "
            "leave it out"
        )
    elif config.trainer.policy.model.dtype == "bfloat16":
        yield error(
            f"{name} is built for float32 in the embedded engine, found {checked.show('trainer.policy.model.dtype')}"
        )
    if "attention_backend" in config.generator.engine_init_kwargs:
        yield error(f"{name} has an attention of its own; leave generator.engine_init_kwargs.attention_backend out")
    if config.generator.lora.enabled:
        yield error(
            f"{name} and {checked.show('generator.lora.enabled')}: what an adapter adds is computed in a way that "
            "depends on the batch; leave one of them out"
        )


def on_policy_target(checked: Checked) -> Iterator[Finding]:
    config = checked.config
    deterministic = config.generator.deterministic_inference
    if config.generator.backend != "embedded" or deterministic.rl_on_policy_target is None:
        return
    name = checked.show(_TARGET)
    if not deterministic.enabled:
        yield error(f"{name} needs {_ENABLED}=true: without it the engine's bits depend on the batch")
    if config.trainer.policy.model.lora.rank:
        yield error(
            f"{name}: the engine runs merged matrices, the trainer adapters beside the untouched ones, so their bits "
            f"differ; leave out one of it and {checked.show('trainer.policy.model.lora.rank')}"
        )
    if config.trainer.gradient_checkpointing:
        yield error(
            f"{name} is not built with recomputed activations; leave out one of it and "
            f"{checked.show('trainer.gradient_checkpointing')}"
        )


DETERMINISTIC_RULES: tuple[Rule, ...] = (where_it_is_built, on_policy_target)
