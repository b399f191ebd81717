"""What the key tree names and this version doesn't do yet.

A key under one of these prefixes is refused when the user sets it to something other than its default, so
that no setting is ever ignored. A feature that lands takes its line out of the table, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from skyrl_train.config.fields import Backend
from skyrl_train.config.findings import is_set
from skyrl_train.config.keys import read, schema_keys
from skyrl_train.config.schema import Config
from skyrl_train.config.sources import Sources
from skyrl_train.errors import ConfigError

EVERY_BACKEND: tuple[Backend, ...] = ("embedded", "sglang", "vllm")


@dataclass(frozen=True, kw_only=True)
class Unbuilt:
    """Keys at or under `prefix` need `feature`. `values` None refuses every value but the default."""

    prefix: str
    feature: str
    instead: str
    values: Callable[[Any], bool] | None = None
    backends: Collection[str] = EVERY_BACKEND

    def covers(self, path: str) -> bool:
        return path == self.prefix or path.startswith(f"{self.prefix}.")


def _one_of(*values: object) -> Callable[[Any], bool]:
    return lambda value: value in values


def _more_than(bound: int) -> Callable[[Any], bool]:
    return lambda value: value is not None and value > bound


_ONE_DEVICE = "one GPU (trainer.placement.policy_num_gpus_per_node=1) or the CPU (0)"
_SERVERS = "leave it out; it is for generator.backend sglang and vllm"
_EMBEDDED_SCHEDULING = {
    "max_running_requests": "generator.max_num_seqs",
    "max_prefill_tokens": "generator.max_num_batched_tokens",
    "max_total_tokens": "generator.engine_init_kwargs.kv_cache_tokens",
    "chunked_prefill_size": "generator.max_num_batched_tokens, or generator.engine_init_kwargs.chunked_prefill=false",
    "enable_mixed_chunk": "leave it out: prompt chunks and decoding share a step",
    "max_queued_requests": "leave it out: requests wait in this process, and cost nothing there",
    "default_priority": "leave it out: a request that brings no priority has 0",
    **dict.fromkeys(
        (
            *("conservativeness", "enable_dynamic_chunking", "max_prefill_requests", "num_continuous_decode_steps"),
            *("disable_overlap", "recv_interval", "stream_interval"),
        ),
        "leave it out; it is for generator.backend sglang",
    ),
}
"""What stands in the place of each, by key."""

UNBUILT: tuple[Unbuilt, ...] = (
    # Training
    Unbuilt(prefix="trainer.fsdp_config", feature="FSDP2", instead=_ONE_DEVICE),
    Unbuilt(prefix="trainer.sequence_parallel_size", feature="sequence parallelism", instead=_ONE_DEVICE),
    *(
        Unbuilt(
            prefix=f"trainer.placement.{key}",
            feature="training on several GPUs",
            instead=_ONE_DEVICE,
            values=_more_than(1),
            backends=("embedded",),
        )
        for key in (
            *("policy_num_gpus_per_node", "policy_num_nodes", "ref_num_nodes", "ref_num_gpus_per_node"),
            *("critic_num_nodes", "critic_num_gpus_per_node"),
        )
    ),
    Unbuilt(
        prefix="trainer.micro_forward_batch_size_per_gpu",
        feature="a batch size of its own for forward passes",
        instead="trainer.micro_train_batch_size_per_gpu or trainer.max_tokens_per_micro_batch, which hold for both",
    ),
    Unbuilt(prefix="trainer.eval_batch_size", feature="evaluation in parts", instead="leave it out"),
    # Rollouts
    Unbuilt(
        prefix="generator.batched", feature="rollouts in batches", instead="leave it out: requests run on their own"
    ),
    Unbuilt(
        prefix="generator.chat_template",
        feature="another chat template",
        instead="the tokenizer's own, with generator.chat_template_kwargs",
    ),
    Unbuilt(
        prefix="generator.enable_http_endpoint",
        feature="an endpoint during training",
        instead="skyrl_train.entrypoints.serve on the exported model",
    ),
    *(
        Unbuilt(prefix=f"generator.{key}", feature="an endpoint during training", instead="leave it out")
        for key in ("http_endpoint_host", "http_endpoint_port")
    ),
    Unbuilt(
        prefix="generator.disaggregation.mode",
        feature="starting both halves and what routes between them",
        instead="generator.remote_inference_engine_urls with the address of your own router",
        backends=("sglang", "vllm"),
    ),
    # The embedded engine
    Unbuilt(
        prefix="generator.speculative_decoding.algorithm",
        feature="measuring where drafts lose on a server",
        instead="ngram, standalone, eagle or eagle3",
        values=_one_of("auto"),
        backends=("sglang", "vllm"),
    ),
    *(
        Unbuilt(
            prefix=f"generator.speculative_decoding.{key}",
            feature="a server's own way of drafting in the embedded engine",
            instead="leave it out",
            backends=("embedded",),
        )
        for key in (
            *("draft_model_revision", "draft_load_format", "draft_attention_backend", "draft_model_quantization"),
            *("use_rejection_sampling", "adaptive", "adaptive_config", "draft_window_size", "attention_mode"),
            *("ngram.min_bfs_breadth", "ngram.external_corpus_path", "ngram.external_sam_budget"),
            *("ngram.external_corpus_max_tokens", "ngram.min_match_window_size", "ngram.max_match_window_size"),
            "ngram.branch_length",
        )
    ),
    Unbuilt(
        prefix="generator.speculative_decoding.ngram.max_bfs_breadth",
        feature="trees of n-grams in the embedded engine",
        instead="1",
        values=_more_than(1),
        backends=("embedded",),
    ),
    Unbuilt(
        prefix="generator.speculative_decoding.ngram.match_type",
        feature="the most frequent continuation in the embedded engine",
        instead="BFS, the most recent one",
        values=_one_of("PROB"),
        backends=("embedded",),
    ),
    *(
        Unbuilt(
            prefix=f"generator.lora.{key}",
            feature="a server's own way of computing and loading adapters in the embedded engine",
            instead="leave it out",
            backends=("embedded",),
        )
        for key in ("backend", "max_chunk_size", "overlap_loading", "drain_wait_threshold_s")
    ),
    Unbuilt(
        prefix="generator.lora.strict_loading",
        feature="adapters that fit the model in part only",
        instead="leave it out: each tensor of an adapter is checked by name",
        values=_one_of(False),
        backends=("embedded",),
    ),
    *(
        Unbuilt(
            prefix=f"generator.metrics.{key}",
            feature="a server's own metrics and logs in the embedded engine",
            instead="generator.metrics.enabled for the run's own, or runs/<run_name>/metrics.jsonl",
            backends=("embedded",),
        )
        for key in (
            *("enable_for_all_schedulers", "collect_tokens_histogram", "decode_log_interval", "mfu", "cache_report"),
            *("expert_distribution", "log_level", "buckets", "export_to_file", "custom_labels", "tracing", "logging"),
        )
    ),
    Unbuilt(
        prefix="generator.scheduling.policy",
        feature="this policy in the embedded engine",
        instead="fcfs or lpm; priorities come first in both",
        values=lambda policy: policy not in ("fcfs", "lpm"),
        backends=("embedded",),
    ),
    Unbuilt(
        prefix="generator.scheduling.retraction_policy",
        feature="retracting the request that loses least, in the embedded engine",
        instead="priority",
        values=_one_of("length"),
        backends=("embedded",),
    ),
    *(
        Unbuilt(
            prefix=f"generator.scheduling.{key}",
            feature="this key of a server's scheduler in the embedded engine",
            instead=instead,
            backends=("embedded",),
        )
        for key, instead in _EMBEDDED_SCHEDULING.items()
    ),
    Unbuilt(
        prefix="generator.structured_output.grammar_backend",
        feature="another grammar library in the embedded engine",
        instead="xgrammar or none",
        values=_one_of("outlines", "llguidance"),
        backends=("embedded",),
    ),
    Unbuilt(
        prefix="generator.structured_output.whitespace_pattern",
        feature="a pattern of white space in the embedded engine",
        instead="generator.structured_output.disable_any_whitespace",
        backends=("embedded",),
    ),
    Unbuilt(
        prefix="generator.hierarchical_cache.write_policy",
        feature="copying prefixes to the host before they are evicted, in the embedded engine",
        instead="write_back",
        values=_one_of("write_through", "write_through_selective"),
        backends=("embedded",),
    ),
    *(
        Unbuilt(
            prefix=f"generator.hierarchical_cache.{key}",
            feature="a server's own way of moving and storing prefixes in the embedded engine",
            instead="leave it out",
            backends=("embedded",),
        )
        for key in (
            *("io_backend", "mem_layout", "storage_backend", "storage_prefetch_policy"),
            "storage_backend_extra_config",
        )
    ),
    *(
        Unbuilt(prefix=f"generator.{group}", feature="a server of its own", instead=_SERVERS, backends=("embedded",))
        for group in (
            "kv_cache",
            "attention",
            "cuda_graph",
            "torch_compile",
            "quantization",
            "disaggregation",
            "multi_node",
            "load_balancing",
            "health_checks",
            "cpu_offload",
            "num_inference_engines",
            "inference_engine_tensor_parallel_size",
            "inference_engine_pipeline_parallel_size",
            "inference_engine_data_parallel_size",
            "inference_engine_expert_parallel_size",
            "run_engines_locally",
            "remote_inference_engine_urls",
            "engine_python",
            "engine_api_key_env",
            "engine_environment",
            "rope_scaling",
            "rope_theta",
            "json_model_override_args",
            "trust_remote_code",
            "use_overlapped_weight_sync",
        )
    ),
)

MAX_POLICY_GPUS = 1
"""GPUs that the trainer can use. With a server backend more are planned and explained, and refused at the start."""


def refuse_unbuilt(config: Config, sources: Sources) -> None:
    """Raises ConfigError naming every key that asks for something this version can't do."""
    messages = []
    for path, unbuilt, value in _asked(config, sources):
        advice = unbuilt.instead if unbuilt.instead.startswith("leave") else f"use {unbuilt.instead}"
        messages.append(f"{path}={_shown(value)} ({sources[path]}): not built yet: {unbuilt.feature}; {advice}")
    if messages:
        raise ConfigError(
            messages[0]
            if len(messages) == 1
            else "\n  - ".join([f"{len(messages)} settings are not built yet:", *messages])
        )


def _asked(config: Config, sources: Sources) -> list[tuple[str, Unbuilt, Any]]:
    asked = []
    for path in schema_keys():
        for unbuilt in UNBUILT:
            if config.generator.backend not in unbuilt.backends or not unbuilt.covers(path):
                continue
            value = read(config, path)
            if is_set(path, config, sources) and (unbuilt.values is None or unbuilt.values(value)):
                asked.append((path, unbuilt, value))
                break
    return asked


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
