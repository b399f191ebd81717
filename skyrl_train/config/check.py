"""Rules that join several keys. Each yields what it finds; all are run, so that one start shows all mistakes."""

from __future__ import annotations

from collections.abc import Iterator

from skyrl_train.config.check_deterministic import DETERMINISTIC_RULES
from skyrl_train.config.check_drafts import DRAFT_RULES
from skyrl_train.config.check_engine import ENGINE_RULES
from skyrl_train.config.check_lora import LORA_RULES
from skyrl_train.config.check_policy import POLICY_RULES
from skyrl_train.config.check_scheduling import SCHEDULING_RULES
from skyrl_train.config.check_selection import SELECTION_RULES
from skyrl_train.config.check_sessions import SESSION_RULES
from skyrl_train.config.check_speculation import SPECULATION_RULES
from skyrl_train.config.check_training import TRAINING_RULES
from skyrl_train.config.findings import Checked, Finding, Rule, error, warning
from skyrl_train.config.model_shape import BUILTIN_PREFIX, read_model_shape
from skyrl_train.config.placement import count_gpus, gpus_per_engine
from skyrl_train.errors import ConfigError


def check(checked: Checked) -> tuple[str, ...]:
    """The warnings. Raises ConfigError with every contradiction."""
    findings = [finding for rule in RULES for finding in rule(checked)]
    errors = list(dict.fromkeys(finding.message for finding in findings if finding.is_error))
    if errors:
        raise ConfigError(
            errors[0]
            if len(errors) == 1
            else "\n  - ".join([f"{len(errors)} settings contradict each other or can't work:", *errors])
        )
    return tuple(dict.fromkeys(finding.message for finding in findings))


def gpu_arithmetic(checked: Checked) -> Iterator[Finding]:
    config = checked.config
    placement, generator = config.trainer.placement, config.generator
    count = count_gpus(config)
    if generator.backend == "embedded":
        if not placement.colocate_all:
            yield error(
                f"{checked.show('trainer.placement.colocate_all')}: the embedded engine runs inside the trainer and "
                "shares its GPUs; leave it out, or use generator.backend=sglang or vllm"
            )
        return
    if not count.policy or not generator.run_engines_locally:
        return
    if placement.colocate_all and count.engines != count.policy:
        yield error(
            f"trainer.placement.colocate_all=true gives engines and policy the same GPUs, but the policy has "
            f"{placement.policy_num_nodes} nodes x {placement.policy_num_gpus_per_node} GPUs = {count.policy} and the "
            f"engines have {generator.num_inference_engines} engines x {gpus_per_engine(config)} GPUs "
            f"(tensor {generator.inference_engine_tensor_parallel_size} x pipeline "
            f"{generator.inference_engine_pipeline_parallel_size} x data "
            f"{generator.inference_engine_data_parallel_size}) = {count.engines}; "
            f"{_suggest_engines(count.policy, gpus_per_engine(config))}"
        )
    if placement.colocate_policy_ref and count.ref and count.ref != count.policy:
        yield error(
            f"trainer.placement.colocate_policy_ref=true gives policy and reference the same GPUs, but they have "
            f"{count.policy} and {count.ref}; leave trainer.placement.ref_num_gpus_per_node out"
        )


def _suggest_engines(policy: int, per_engine: int) -> str:
    if policy % per_engine == 0:
        return f"set generator.num_inference_engines={policy // per_engine}"
    return f"choose parallel sizes whose product divides {policy}, or trainer.placement.colocate_all=false"


def tensor_parallel_divides_heads(checked: Checked) -> Iterator[Finding]:
    size = checked.config.generator.inference_engine_tensor_parallel_size
    shape = read_model_shape(checked.config.trainer.policy.model.path)
    if shape is None or size == 1:
        return
    name = checked.show("generator.inference_engine_tensor_parallel_size")
    model = checked.config.trainer.policy.model.path
    if shape.num_heads % size:
        yield error(
            f"{name} does not divide the {shape.num_heads} attention heads of {model}; "
            f"possible: {_divisors(shape.num_heads)}"
        )
    elif shape.num_kv_heads % size and size % shape.num_kv_heads:
        yield error(
            f"{name} neither divides nor is a multiple of the {shape.num_kv_heads} key/value heads of {model}; "
            f"possible: {_divisors(shape.num_kv_heads)}"
        )


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


def context_fits(checked: Checked) -> Iterator[Finding]:
    config = checked.config
    generator = config.generator
    longest = max(
        (generator.sampling_params.max_generate_length, "generator.sampling_params.max_generate_length"),
        (generator.eval_sampling_params.max_generate_length, "generator.eval_sampling_params.max_generate_length"),
    )
    need = generator.max_input_length + longest[0]
    shape = read_model_shape(config.trainer.policy.model.path)
    if generator.max_model_len is not None and checked.sources["generator.max_model_len"].by_user:
        if generator.max_model_len < need:
            yield error(
                f"{checked.show('generator.max_model_len')} is less than generator.max_input_length="
                f"{generator.max_input_length} + {longest[1]}={longest[0]} = {need}; raise it, or lower those"
            )
        need = max(need, generator.max_model_len)
    if shape is not None and shape.max_positions is not None and need > shape.max_positions:
        yield error(
            f"a context of {need} tokens (generator.max_input_length={generator.max_input_length} + {longest[1]}="
            f"{longest[0]}) is over the {shape.max_positions} positions of {config.trainer.policy.model.path}; "
            "lower one of them"
        )


def quickstart_numbers_with_another_model(checked: Checked) -> Iterator[Finding]:
    model = checked.config.trainer.policy.model.path
    if model.startswith(BUILTIN_PREFIX):
        return
    tuned = (
        "trainer.policy.optimizer_config.lr",
        "generator.max_input_length",
        "generator.sampling_params.max_generate_length",
    )
    left = [path for path in tuned if checked.sources[path].kind == "base.yaml"]
    if left:
        yield warning(
            f"{' and '.join(f'{path}={checked.value(path)}' for path in left)} come from base.yaml, which is tuned for "
            f"the built-in tiny model, not for {model}; set them"
        )


RULES: tuple[Rule, ...] = (
    gpu_arithmetic,
    tensor_parallel_divides_heads,
    context_fits,
    quickstart_numbers_with_another_model,
    *TRAINING_RULES,
    *POLICY_RULES,
    *LORA_RULES,
    *SELECTION_RULES,
    *ENGINE_RULES,
    *SCHEDULING_RULES,
    *SESSION_RULES,
    *SPECULATION_RULES,
    *DRAFT_RULES,
    *DETERMINISTIC_RULES,
)
