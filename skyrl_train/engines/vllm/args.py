"""One table: configuration key -> option of `vllm serve`. Checked against vLLM 0.26 and 0.32; imports nothing of it.

vLLM has fewer options than the key tree names. A key without a line here is refused when the user sets it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from skyrl_train.engines.vllm.derived import lora_rank, with_derived

if TYPE_CHECKING:
    from skyrl_train.config.schema import Config


@dataclass(frozen=True, kw_only=True)
class Argument:
    """`key` writes `option`; `convert` gives its value, None leaves it out."""

    key: str
    option: str
    convert: Callable[[Any], Any] = lambda value: value


def _arg(key: str, option: str, convert: Callable[[Any], Any] = lambda value: value) -> Argument:
    return Argument(key=f"generator.{key}", option=option, convert=convert)


def _flag_if(condition: Callable[[Any], bool]) -> Callable[[Any], Any]:
    return lambda value: True if condition(value) else None


ARGUMENTS: tuple[Argument, ...] = (
    _arg("inference_engine_tensor_parallel_size", "tensor-parallel-size"),
    _arg("inference_engine_pipeline_parallel_size", "pipeline-parallel-size"),
    _arg("inference_engine_data_parallel_size", "data-parallel-size"),
    _arg("inference_engine_expert_parallel_size", "enable-expert-parallel", _flag_if(lambda size: size > 1)),
    _arg("model_dtype", "dtype"),
    _arg("gpu_memory_utilization", "gpu-memory-utilization"),
    _arg("max_num_batched_tokens", "max-num-batched-tokens"),
    _arg("max_num_seqs", "max-num-seqs"),
    _arg("max_model_len", "max-model-len"),
    _arg("enable_prefix_caching", "enable-prefix-caching", _flag_if(bool)),
    _arg("enable_prefix_caching", "no-enable-prefix-caching", _flag_if(lambda on: not on)),
    _arg("random_seed", "seed"),
    _arg("trust_remote_code", "trust-remote-code"),
    _arg("json_model_override_args", "hf-overrides", json.dumps),
    _arg("scheduling.policy", "scheduling-policy"),
    _arg("scheduling.enable_priority", "scheduling-policy", lambda on: "priority" if on else None),
    _arg("scheduling.stream_interval", "stream-interval"),
    _arg("kv_cache.dtype", "kv-cache-dtype"),
    _arg("kv_cache.page_size", "block-size"),
    _arg("attention.backend", "attention-backend"),
    _arg("cuda_graph.enabled", "enforce-eager", _flag_if(lambda on: not on)),
    _arg("cuda_graph.bs_decode", "cudagraph-capture-sizes"),
    _arg("cuda_graph.max_bs_decode", "max-cudagraph-capture-size"),
    _arg("quantization.method", "quantization"),
    _arg("quantization.load_format", "load-format"),
    _arg("quantization.model_loader_extra_config", "model-loader-extra-config", json.dumps),
    _arg("lora.enabled", "enable-lora", _flag_if(bool)),
    _arg("lora.max_rank", "max-lora-rank", lora_rank),
    _arg("lora.max_loras_per_batch", "max-loras"),
    _arg("lora.max_loaded_loras", "max-cpu-loras"),
    _arg("lora.target_modules", "lora-target-modules"),
    _arg("lora.paths", "lora-modules", lambda paths: [f"{name}={path}" for name, path in paths.items()] or None),
    _arg("metrics.mfu", "enable-mfu-metrics"),
    _arg("multi_node.nnodes", "nnodes", lambda count: count if count > 1 else None),
    _arg("multi_node.node_rank", "node-rank", lambda rank: rank or None),
    _arg("cpu_offload.size_gb", "cpu-offload-gb"),
    _arg("cpu_offload.group_size", "offload-group-size"),
    _arg("cpu_offload.num_in_group", "offload-num-in-group"),
    _arg("cpu_offload.prefetch_step", "offload-prefetch-step"),
)


def server_options(config: Config, *, model: str | None = None) -> dict[str, Any]:
    """Options of `vllm serve` by name, without host and port. A key wins over what follows from others (derived.py),
    and generator.engine_init_kwargs over both.
    """
    options: dict[str, Any] = {}
    for argument in ARGUMENTS:
        value = attrgetter(argument.key)(config)
        if argument.key.startswith("generator.lora.") and not config.generator.lora.enabled:
            continue
        if value is None or (converted := argument.convert(value)) is None or converted is False:
            continue
        options[argument.option] = converted
    own = {name.lstrip("-").replace("_", "-"): value for name, value in config.generator.engine_init_kwargs.items()}
    return with_derived(config, options, own, model=model or config.trainer.policy.model.path) | own


def command_line(config: Config, *, python: str, model: str | None = None) -> list[str]:
    """The server's command, as it is started and as --explain shows it. Host and port are chosen at start.

    `model` is the folder to serve where that isn't trainer.policy.model.path.
    """
    words = [python, "-m", "vllm.entrypoints.cli.main", "serve", model or config.trainer.policy.model.path]
    for name, value in server_options(config, model=model).items():
        if value is False:
            words.append(f"--no-{name}")
        elif value is not None:
            words += [f"--{name}", *_words(value)]
    return words


def _words(value: Any) -> list[str]:
    if value is True:
        return []
    if isinstance(value, dict):
        return [json.dumps(value)]
    if isinstance(value, (list, tuple)):
        return [str(item) for item in value]
    return [str(value)]
