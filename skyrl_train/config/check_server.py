"""Rules from the servers' own tables: what a release lacks, what is written twice, what a switch leaves unread."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from skyrl_train.config.findings import Checked, Finding, error, warning
from skyrl_train.config.keys import schema_keys
from skyrl_train.engines.sglang import args as sglang
from skyrl_train.engines.sglang.command import switch_of
from skyrl_train.engines.vllm import args as vllm
from skyrl_train.engines.vllm.derived import NUM_POLICY_ADAPTERS, max_adapters

_SGLANG_ALIASES = {
    "tensor_parallel_size": "tp_size",
    "pipeline_parallel_size": "pp_size",
    "data_parallel_size": "dp_size",
    "expert_parallel_size": "ep_size",
    "model": "model_path",
}
_SET_AT_START = {
    "host": "the server is started on loopback",
    "port": "a free port is chosen at start",
    "enable_memory_saver": "it follows trainer.placement.colocate_all",
    "device": "it follows trainer.placement.policy_num_gpus_per_node",
    "base_gpu_id": "it follows trainer.placement",
    "nccl_init_addr": "use generator.multi_node.dist_init_addr",
}


_SPECULATION = ("enabled", "algorithm", "draft_model_path", "num_draft_tokens", "ngram.max_trie_depth")
_VLLM_ALSO_READS = (
    *(f"generator.speculative_decoding.{name}" for name in _SPECULATION),
    "generator.metrics.enabled",
    "generator.metrics.endpoint_port",
    "generator.metrics.tracing.enabled",
    "generator.metrics.tracing.otlp_endpoint",
    "generator.metrics.tracing.service_name",
    "generator.health_checks.startup_timeout_s",
    "generator.health_checks.interval_s",
    "generator.health_checks.max_failures",
)
_SERVER_GROUPS = (
    "speculative_decoding",
    "metrics",
    "scheduling",
    "deterministic_inference",
    "kv_cache",
    "hierarchical_cache",
    "lora",
    "attention",
    "cuda_graph",
    "torch_compile",
    "quantization",
    "structured_output",
    "custom_logit_processor",
    "disaggregation",
    "multi_node",
    "load_balancing",
    "health_checks",
    "cpu_offload",
    "rope_scaling",
    "rope_theta",
)


def sglang_findings(checked: Checked) -> Iterator[Finding]:
    yield from _missing_in_release(checked)
    yield from _written_twice(checked)
    yield from _switched_off(checked)


def vllm_findings(checked: Checked) -> Iterator[Finding]:
    yield from _unknown_to_vllm(checked)
    yield from _vllm_written_twice(checked)
    yield from _vllm_slots(checked)
    yield from _vllm_draft_length(checked)


def _missing_in_release(checked: Checked) -> Iterator[Finding]:
    """Keys that the installed release can't honour; only those that the user set."""
    release = checked.engine_release
    for key, rows in _by(lambda row: row.key).items():
        if not checked.is_set(key) or any(row.exists_in(release) for row in rows):
            continue
        row = rows[0]
        when = f"it came with {row.since}" if row.until is None else f"it is gone since {row.until}"
        way = row.instead or f"install SGLang {row.since} or later"
        if way.startswith("generator."):
            way = f"use {way}"
        yield error(f"{checked.show(key)}: SGLang {release} has no {row.field}, {when}; {way}")

    for (key, value), (since, until) in sglang.VALUE_RELEASES.items():
        row = sglang.Argument(key=key, field=value, since=since, until=until)
        if checked.value(key) == value and not row.exists_in(release):
            when = f"it came with {since}" if since else f"it is gone since {until}"
            yield error(f"{checked.show(key)}: SGLang {release} does not know {value}, {when}")


def _written_twice(checked: Checked) -> Iterator[Finding]:
    """Two keys that write one server argument, engine_init_kwargs included."""
    by_field = _by(lambda row: row.field)
    for field, rows in by_field.items():
        keys = list(dict.fromkeys(row.key for row in rows if row.exists_in(checked.engine_release)))
        given = [key for key in keys if checked.value(key) is not None and checked.sources[key].by_user]
        if len(given) > 1:
            yield error(f"{' and '.join(map(checked.show, given))} both write SGLang's {field}; keep one of them")
    for name in checked.config.generator.engine_init_kwargs:
        field = name.lstrip("-").replace("-", "_")
        field = _SGLANG_ALIASES.get(field, field)
        if field in _SET_AT_START:
            yield error(f"generator.engine_init_kwargs.{name}: not an argument to set, {_SET_AT_START[field]}")
        elif field in by_field:
            keys = list(dict.fromkeys(row.key for row in by_field[field]))
            yield error(
                f"generator.engine_init_kwargs.{name} writes SGLang's {field}, and so does {' and '.join(keys)}; "
                "use that key"
            )
        elif field != name:
            yield error(f"generator.engine_init_kwargs.{name}: write the field's name, {field}")


def _switched_off(checked: Checked) -> Iterator[Finding]:
    """Keys that the user set under a switch that is off."""
    for key in dict.fromkeys(row.key for row in sglang.ARGUMENTS):
        switch = switch_of(key)
        if switch is not None and checked.is_set(key) and not checked.value(switch):
            yield warning(f"{checked.show(key)} has no effect while {checked.show(switch)}")


def _unknown_to_vllm(checked: Checked) -> Iterator[Finding]:
    """Keys of servers that vLLM has no option for; only those that the user set."""
    read_here = {argument.key for argument in vllm.ARGUMENTS} | set(_VLLM_ALSO_READS)
    for path in schema_keys():
        group = path.removeprefix("generator.").partition(".")[0]
        if path.startswith("generator.") and group in _SERVER_GROUPS and path not in read_here and checked.is_set(path):
            yield error(
                f"{checked.show(path)}: vLLM has no such option under this key; leave it out, pass vLLM's own with "
                "generator.engine_init_kwargs, or use generator.backend=sglang"
            )
    scheduling = checked.config.generator.scheduling
    if scheduling.policy not in (None, "fcfs", "priority"):
        yield error(f"{checked.show('generator.scheduling.policy')}: vLLM knows fcfs and priority")
    elif scheduling.policy == "fcfs" and scheduling.enable_priority:
        yield error(
            f"{checked.show('generator.scheduling.policy')} and "
            f"{checked.show('generator.scheduling.enable_priority')} both write vLLM's scheduling-policy; "
            "keep one of them"
        )


def _vllm_written_twice(checked: Checked) -> Iterator[Finding]:
    """engine_init_kwargs that a key writes too."""
    keys = {argument.option.replace("-", "_"): argument.key for argument in vllm.ARGUMENTS}
    for name in checked.config.generator.engine_init_kwargs:
        if key := keys.get(name.replace("-", "_")):
            yield error(f"generator.engine_init_kwargs.{name} writes the same vLLM option as {key}; use that key")


def _vllm_slots(checked: Checked) -> Iterator[Finding]:
    """Adapters that may not be loaded together: on a CPU one slot stays empty."""
    config = checked.config
    lora, may_be = config.generator.lora, max_adapters(config)
    policy = NUM_POLICY_ADAPTERS if config.trainer.policy.model.lora.rank else 0
    if lora.enabled and may_be is not None and may_be < (needed := len(lora.paths) + policy):
        yield error(
            f"{checked.show('generator.lora.max_loras_per_batch')} has room for {may_be} adapters on a CPU, the run "
            f"loads {len(lora.paths)} of generator.lora.paths and {policy} of the policy's (the old one and the new "
            f"one); set it to {needed + 1}"
        )


def _vllm_draft_length(checked: Checked) -> Iterator[Finding]:
    """SGLang has a default for it, vLLM has none."""
    keys = checked.config.generator.speculative_decoding
    if keys.enabled and keys.num_draft_tokens is None:
        yield error("generator.speculative_decoding.num_draft_tokens=null: vLLM has no default for it; 3 to 5 is usual")


def _by(key: Callable[[sglang.Argument], str]) -> dict[str, Sequence[sglang.Argument]]:
    grouped: dict[str, list[sglang.Argument]] = {}
    for row in sglang.ARGUMENTS:
        grouped.setdefault(key(row), []).append(row)
    return dict(grouped)
