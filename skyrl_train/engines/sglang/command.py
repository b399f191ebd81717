"""From a configuration to SGLang's server arguments and command line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skyrl_train.engines.sglang.args import ARGUMENTS
from skyrl_train.engines.sglang.derived import cpu_arguments, lora_arguments, penalty_arguments

if TYPE_CHECKING:
    # The configuration's checks import this module: at run time the import goes one way.
    from skyrl_train.config.schema import Config

SWITCHES = {
    "generator.speculative_decoding": "generator.speculative_decoding.enabled",
    "generator.metrics.logging": "generator.metrics.logging.enabled",
    "generator.metrics.tracing": "generator.metrics.tracing.enabled",
    "generator.metrics.export_to_file": "generator.metrics.export_to_file.enabled",
    "generator.metrics.buckets": "generator.metrics.enabled",
    "generator.metrics.custom_labels": "generator.metrics.enabled",
    "generator.metrics.enable_for_all_schedulers": "generator.metrics.enabled",
    "generator.metrics.collect_tokens_histogram": "generator.metrics.enabled",
    "generator.metrics.mfu": "generator.metrics.enabled",
    "generator.scheduling.low_priority_values_first": "generator.scheduling.enable_priority",
    "generator.scheduling.preemption_threshold": "generator.scheduling.enable_priority",
    "generator.scheduling.disable_preemption": "generator.scheduling.enable_priority",
    "generator.scheduling.default_priority": "generator.scheduling.enable_priority",
    "generator.hierarchical_cache": "generator.hierarchical_cache.enabled",
    "generator.deterministic_inference.rl_on_policy_target": "generator.deterministic_inference.enabled",
    "generator.lora": "generator.lora.enabled",
    "generator.attention.double_sparsity": "generator.attention.double_sparsity.enabled",
    "generator.cuda_graph": "generator.cuda_graph.enabled",
    "generator.torch_compile.max_bs": "generator.torch_compile.enabled",
    "generator.torch_compile.debug_mode": "generator.torch_compile.enabled",
}
"""Keys at or under the prefix are read only while the switch is on."""


_FLAGS = {row.field: row.flag for row in ARGUMENTS if row.flag}


def switch_of(key: str) -> str | None:
    """The key that turns `key` on, if there is one; a switch has none itself."""
    for prefix, switch in SWITCHES.items():
        if key != switch and (key == prefix or key.startswith(f"{prefix}.")):
            return switch
    return None


def server_arguments(config: Config, *, release: str) -> dict[str, Any]:
    """ServerArgs fields for one engine. Keys that are null follow from others (derived.py) or are left to SGLang; host,
    port and GPUs are set at start.
    """
    arguments: dict[str, Any] = {}
    for argument in ARGUMENTS:
        value = attrgetter(argument.key)(config)
        if not argument.exists_in(release) or value is None or value in ((), {}):
            continue
        switch = switch_of(argument.key)
        if switch is not None and not attrgetter(switch)(config):
            continue
        converted = argument.convert(value)
        if converted is not False:
            arguments[argument.field] = list(converted) if isinstance(converted, tuple) else converted
    if "attn_dp_size" in arguments:
        # One size now says what a flag beside dp_size said before.
        arguments["attn_dp_size"] = arguments.pop("dp_size")
    arguments = lora_arguments(config) | penalty_arguments(config) | arguments
    placement = config.trainer.placement
    if not placement.policy_num_gpus_per_node:
        arguments = cpu_arguments(config, release=release) | arguments
    elif placement.colocate_all:
        arguments["enable_memory_saver"] = True
    return arguments | config.generator.engine_init_kwargs


def own_folders(arguments: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The same with folders of one engine among several: each writes files of one name, and moves them every hour."""
    own = dict(arguments)
    if "export_metrics_to_file_dir" in own:
        own["export_metrics_to_file_dir"] = str(Path(own["export_metrics_to_file_dir"]) / name)
    if "log_requests_target" in own:
        targets = own["log_requests_target"]
        own["log_requests_target"] = [at if at.lower() == "stdout" else str(Path(at) / name) for at in targets]
    return own


def flag_of(field: str) -> str:
    """The option of the command line that sets a field of ServerArgs."""
    return f"--{_FLAGS.get(field) or field.replace('_', '-')}"


def command_line(arguments: Mapping[str, Any], *, python: str) -> list[str]:
    """The server's command; `true` is a bare flag, a list several words, a mapping JSON."""
    words = [python, "-m", "sglang.launch_server"]
    for field, value in arguments.items():
        flag = flag_of(field)
        if value is True:
            words.append(flag)
        elif isinstance(value, (list, tuple)):
            words += [flag, *map(str, value)]
        elif isinstance(value, dict):
            words += [flag, json.dumps(value, sort_keys=True)]
        elif value is not False and value is not None:
            words += [flag, str(value)]
    return words
