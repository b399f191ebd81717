"""One table: configuration key -> argument of SGLang's server, and the releases that have it.

Checked against the `ServerArgs` of SGLang 0.5.5, 0.5.10, 0.5.17 and 0.5.23: `since` is the first of these
with the field, `until` the first without it. `default` is what SGLang does when the key is null.
This module imports nothing of SGLang.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from skyrl_train.engines.sglang.releases import release_number

Convert = Callable[[Any], Any]


@dataclass(frozen=True, kw_only=True)
class Argument:
    """`key` writes `field` in releases [since, until). `instead` is what to use where a release lacks it.

    `flag` is the command line's name where that is not the field's.
    """

    key: str
    field: str
    default: str = ""
    since: str | None = None
    until: str | None = None
    instead: str | None = None
    flag: str | None = None
    convert: Convert = lambda value: value

    def exists_in(self, release: str) -> bool:
        number = release_number(release)
        return (self.since is None or number >= release_number(self.since)) and (
            self.until is None or number < release_number(self.until)
        )


def _inverted(value: Any) -> Any:
    return not value


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


CONTEXT_RESERVE = 7
"""SGLang serves a prompt that is at least 7 tokens shorter than its context, and ends an answer 2 tokens before the
context is full, with finish reason length and without a word: all of max_model_len is served with 7 tokens more."""


def _with_reserve(value: int) -> int:
    return value + CONTEXT_RESERVE


def _upper(value: Any) -> str:
    return str(value).upper()


def _named_paths(value: Any) -> list[str]:
    return [f"{name}={path}" for name, path in value.items()] if isinstance(value, dict) else [str(value)]


def _group(prefix: str, *rows: Argument) -> tuple[Argument, ...]:
    return tuple(
        Argument(
            key=f"{prefix}.{row.key}",
            field=row.field,
            default=row.default,
            since=row.since,
            until=row.until,
            instead=row.instead,
            flag=row.flag,
            convert=row.convert,
        )
        for row in rows
    )


def _arg(key: str, field: str, default: str = "", **more: Any) -> Argument:
    return Argument(key=key, field=field, default=default, **more)


VALUE_RELEASES: dict[tuple[str, str], tuple[str | None, str | None]] = {
    ("generator.scheduling.policy", "hrrn"): ("0.5.23", None),
    ("generator.scheduling.policy", "shortest-prefill-first"): ("0.5.23", None),
    ("generator.kv_cache.eviction_policy", "tlru"): ("0.5.23", None),
    ("generator.kv_cache.dtype", "fp4_e2m1"): (None, "0.5.23"),
    ("generator.lora.backend", "triton_v2"): ("0.5.23", None),
}
"""(key, value) -> (since, until) where only some releases take the value."""

_IN_CONFIG = "generator.cuda_graph.config"
_OVERRIDES = "generator.json_model_override_args"
_TRIE = "generator.speculative_decoding.ngram.max_trie_depth"

ARGUMENTS: tuple[Argument, ...] = (
    _arg("trainer.policy.model.path", "model_path"),
    *_group(
        "generator",
        _arg("inference_engine_tensor_parallel_size", "tp_size", "1"),
        _arg("inference_engine_pipeline_parallel_size", "pp_size", "1"),
        _arg("inference_engine_data_parallel_size", "dp_size", "1"),
        _arg("inference_engine_expert_parallel_size", "ep_size", "1"),
        _arg("model_dtype", "dtype", "auto"),
        _arg("gpu_memory_utilization", "mem_fraction_static", "by free memory"),
        _arg("max_num_batched_tokens", "max_prefill_tokens", "16384"),
        _arg("max_num_seqs", "max_running_requests", "by free memory"),
        _arg("max_model_len", "context_length", "the model's", convert=_with_reserve),
        _arg("enable_prefix_caching", "disable_radix_cache", convert=_inverted),
        _arg("random_seed", "random_seed", "drawn"),
        _arg("trust_remote_code", "trust_remote_code", "false"),
        _arg("json_model_override_args", "json_model_override_args", "{}", convert=_json),
        _arg("rope_scaling", "rope_scaling", until="0.5.5", instead=_OVERRIDES, convert=_json),
        _arg("rope_theta", "rope_theta", until="0.5.5", instead=_OVERRIDES),
    ),
    *_group(
        "generator.speculative_decoding",
        _arg("algorithm", "speculative_algorithm", "none", convert=_upper),
        _arg("draft_model_path", "speculative_draft_model_path", "none"),
        _arg("draft_model_revision", "speculative_draft_model_revision", "main"),
        _arg("draft_load_format", "speculative_draft_load_format", "as the target"),
        _arg("draft_attention_backend", "speculative_draft_attention_backend", "as the target", since="0.5.10"),
        _arg("draft_model_quantization", "speculative_draft_model_quantization", "as the target", since="0.5.10"),
        _arg("draft_window_size", "speculative_draft_window_size", "none", since="0.5.17"),
        _arg("num_steps", "speculative_num_steps", "by algorithm and model"),
        _arg("eagle_topk", "speculative_eagle_topk", "by algorithm and model"),
        _arg("num_draft_tokens", "speculative_num_draft_tokens", "by algorithm and model; ngram 12"),
        _arg("accept_threshold_single", "speculative_accept_threshold_single", "1.0"),
        _arg("accept_threshold_acc", "speculative_accept_threshold_acc", "1.0"),
        _arg("use_rejection_sampling", "speculative_use_rejection_sampling", "false", since="0.5.17"),
        _arg("adaptive", "speculative_adaptive", "false", since="0.5.17"),
        _arg("adaptive_config", "speculative_adaptive_config", "none", since="0.5.17"),
        _arg("token_map", "speculative_token_map", "none"),
        _arg("attention_mode", "speculative_attention_mode", "prefill"),
        _arg("ngram.max_trie_depth", "speculative_ngram_max_trie_depth", "18", since="0.5.10"),
        _arg("ngram.min_bfs_breadth", "speculative_ngram_min_bfs_breadth", "1"),
        _arg("ngram.max_bfs_breadth", "speculative_ngram_max_bfs_breadth", "10"),
        _arg("ngram.match_type", "speculative_ngram_match_type", "BFS"),
        _arg("ngram.capacity", "speculative_ngram_capacity", "10000000"),
        _arg("ngram.external_corpus_path", "speculative_ngram_external_corpus_path", "none", since="0.5.17"),
        _arg("ngram.external_sam_budget", "speculative_ngram_external_sam_budget", "0", since="0.5.17"),
        _arg(
            "ngram.external_corpus_max_tokens",
            "speculative_ngram_external_corpus_max_tokens",
            "10000000",
            since="0.5.17",
        ),
        _arg("ngram.min_match_window_size", "speculative_ngram_min_match_window_size", until="0.5.10", instead=_TRIE),
        _arg("ngram.max_match_window_size", "speculative_ngram_max_match_window_size", until="0.5.10", instead=_TRIE),
        _arg("ngram.branch_length", "speculative_ngram_branch_length", until="0.5.10", instead=_TRIE),
    ),
    *_group(
        "generator.metrics",
        _arg("enabled", "enable_metrics", "false"),
        _arg("enable_for_all_schedulers", "enable_metrics_for_all_schedulers", "false"),
        _arg(
            "collect_tokens_histogram",
            "collect_tokens_histogram",
            until="0.5.17",
            instead="leave it out: the histograms are always on",
        ),
        _arg("decode_log_interval", "decode_log_interval", "40"),
        _arg("mfu", "enable_mfu_metrics", "false", since="0.5.10"),
        _arg("cache_report", "enable_cache_report", "false"),
        _arg(
            "expert_distribution",
            "enable_expert_distribution_metrics",
            "false",
            until="0.5.23",
            instead="generator.engine_init_kwargs.expert_balancedness_report_mode",
        ),
        _arg("log_level", "log_level", "info"),
        _arg("buckets.time_to_first_token", "bucket_time_to_first_token", "SGLang's"),
        _arg("buckets.inter_token_latency", "bucket_inter_token_latency", "SGLang's"),
        _arg("buckets.e2e_request_latency", "bucket_e2e_request_latency", "SGLang's"),
        _arg("buckets.prompt_tokens", "prompt_tokens_buckets", "SGLang's"),
        _arg("buckets.generation_tokens", "generation_tokens_buckets", "SGLang's"),
        _arg("export_to_file.enabled", "export_metrics_to_file", "false", since="0.5.10"),
        _arg("export_to_file.directory", "export_metrics_to_file_dir", "none", since="0.5.10"),
        _arg("custom_labels.allowed", "tokenizer_metrics_allowed_custom_labels", "none"),
        _arg("custom_labels.header", "tokenizer_metrics_custom_labels_header", "x-custom-labels"),
        _arg("custom_labels.extra", "extra_metric_labels", "none", since="0.5.10", convert=_json),
        _arg("tracing.enabled", "enable_trace", "false"),
        _arg("tracing.otlp_endpoint", "otlp_traces_endpoint", "localhost:4317"),
        _arg("tracing.modules", "trace_modules", "request", since="0.5.17"),
        _arg("tracing.service_name", "otlp_service_name", "SGLang's", since="0.5.23"),
        _arg("logging.enabled", "log_requests", "false"),
        _arg("logging.level", "log_requests_level", "2"),
        _arg("logging.format", "log_requests_format", "text", since="0.5.10"),
        _arg("logging.targets", "log_requests_target", "stdout", since="0.5.10"),
    ),
    *_group(
        "generator.scheduling",
        _arg("policy", "schedule_policy", "fcfs"),
        _arg("enable_priority", "enable_priority_scheduling", "false"),
        _arg("low_priority_values_first", "schedule_low_priority_values_first", "false"),
        _arg("preemption_threshold", "priority_scheduling_preemption_threshold", "10"),
        _arg("disable_preemption", "disable_priority_preemption", "false", since="0.5.10"),
        _arg("default_priority", "default_priority_value", "none", since="0.5.10"),
        _arg("conservativeness", "schedule_conservativeness", "1.0"),
        _arg("chunked_prefill_size", "chunked_prefill_size", "by GPU memory"),
        _arg("enable_mixed_chunk", "enable_mixed_chunk", "false"),
        _arg("enable_dynamic_chunking", "enable_dynamic_chunking", "false", since="0.5.10"),
        _arg("max_running_requests", "max_running_requests", "by free memory"),
        _arg("max_queued_requests", "max_queued_requests", "no bound"),
        _arg("max_total_tokens", "max_total_tokens", "by free memory"),
        _arg("max_prefill_tokens", "max_prefill_tokens", "16384"),
        _arg("max_prefill_requests", "prefill_max_requests", "no bound", since="0.5.10"),
        _arg("num_continuous_decode_steps", "num_continuous_decode_steps", "1"),
        _arg("disable_overlap", "disable_overlap_schedule", "false"),
        _arg("recv_interval", "scheduler_recv_interval", "1"),
        _arg("stream_interval", "stream_interval", "1"),
        _arg("retraction_policy", "retraction_policy", "length", since="0.5.17"),
    ),
    *_group(
        "generator.deterministic_inference",
        _arg("enabled", "enable_deterministic_inference", "false"),
        _arg("rl_on_policy_target", "rl_on_policy_target", "none"),
    ),
    *_group(
        "generator.kv_cache",
        _arg("dtype", "kv_cache_dtype", "auto: the model's"),
        _arg("quantization_param_path", "quantization_param_path", "none"),
        _arg("fp8_gemm_backend", "fp8_gemm_runner_backend", "auto", since="0.5.10", flag="fp8-gemm-backend"),
        _arg("page_size", "page_size", "by attention kernel"),
        _arg("eviction_policy", "radix_eviction_policy", "lru"),
        _arg("swa_full_tokens_ratio", "swa_full_tokens_ratio", "0.8"),
    ),
    *_group(
        "generator.hierarchical_cache",
        _arg("enabled", "enable_hierarchical_cache", "false"),
        _arg("ratio", "hicache_ratio", "2.0"),
        _arg("size_gb", "hicache_size", "0: by ratio"),
        _arg("write_policy", "hicache_write_policy", "write_through"),
        _arg("io_backend", "hicache_io_backend", "kernel"),
        _arg("mem_layout", "hicache_mem_layout", "page_first"),
        _arg("storage_backend", "hicache_storage_backend", "none"),
        _arg("storage_prefetch_policy", "hicache_storage_prefetch_policy", "timeout"),
        _arg("storage_backend_extra_config", "hicache_storage_backend_extra_config", "none", convert=_json),
    ),
    *_group(
        "generator.lora",
        _arg("enabled", "enable_lora", "false"),
        _arg("paths", "lora_paths", "none", convert=_named_paths),
        _arg("max_rank", "max_lora_rank", "the greatest loaded"),
        _arg("target_modules", "lora_target_modules", "those loaded"),
        _arg("max_loras_per_batch", "max_loras_per_batch", "8"),
        _arg("max_loaded_loras", "max_loaded_loras", "no bound"),
        _arg("eviction_policy", "lora_eviction_policy", "lru"),
        _arg("backend", "lora_backend", "csgmv"),
        _arg("max_chunk_size", "max_lora_chunk_size", "16"),
        _arg("overlap_loading", "enable_lora_overlap_loading", "false", since="0.5.10"),
        _arg("strict_loading", "lora_strict_loading", "false", since="0.5.17"),
        _arg("drain_wait_threshold_s", "lora_drain_wait_threshold", "0.0: off", since="0.5.17"),
    ),
    *_group(
        "generator.attention",
        _arg("backend", "attention_backend", "by GPU and model"),
        _arg("prefill_backend", "prefill_attention_backend", "backend"),
        _arg("decode_backend", "decode_attention_backend", "backend"),
        _arg("sampling_backend", "sampling_backend", "flashinfer where installed, else pytorch"),
        _arg("mm_backend", "mm_attention_backend", "by GPU"),
        _arg("dsa_prefill_backend", "dsa_prefill_backend", "by GPU", since="0.5.17"),
        _arg("dsa_decode_backend", "dsa_decode_backend", "by GPU", since="0.5.17"),
        _arg(
            "nsa_prefill_backend",
            "nsa_prefill_backend",
            until="0.5.17",
            instead="generator.attention.dsa_prefill_backend",
        ),
        _arg(
            "nsa_decode_backend", "nsa_decode_backend", until="0.5.17", instead="generator.attention.dsa_decode_backend"
        ),
        _arg("triton_num_kv_splits", "triton_attention_num_kv_splits", "8"),
        _arg("triton_split_tile_size", "triton_attention_split_tile_size", "none"),
        _arg("triton_reduce_in_fp32", "triton_attention_reduce_in_fp32", "false"),
        _arg("enable_dp_attention", "enable_dp_attention", "false", until="0.5.23"),
        _arg("enable_dp_attention", "attn_dp_size", "1", since="0.5.23"),
        *(
            _arg(f"double_sparsity.{key}", field, until="0.5.17", instead="generator.attention.dsa_prefill_backend")
            for key, field in (
                ("enabled", "enable_double_sparsity"),
                ("channel_config_path", "ds_channel_config_path"),
                ("heavy_channel_num", "ds_heavy_channel_num"),
                ("heavy_token_num", "ds_heavy_token_num"),
                ("heavy_channel_type", "ds_heavy_channel_type"),
                ("sparse_decode_threshold", "ds_sparse_decode_threshold"),
            )
        ),
    ),
    *_group(
        "generator.cuda_graph",
        _arg("enabled", "disable_cuda_graph", until="0.5.17", convert=_inverted),
        _arg("enabled", "disable_decode_cuda_graph", since="0.5.17", convert=_inverted),
        _arg("enabled", "disable_prefill_cuda_graph", since="0.5.17", convert=_inverted),
        _arg("backend_decode", "cuda_graph_backend_decode", "full", since="0.5.17"),
        _arg("backend_prefill", "cuda_graph_backend_prefill", "by GPU and model", since="0.5.17"),
        _arg("max_bs_decode", "cuda_graph_max_bs_decode", "by GPU memory", since="0.5.17"),
        _arg("max_bs_prefill", "cuda_graph_max_bs_prefill", "by GPU memory", since="0.5.17"),
        _arg("bs_decode", "cuda_graph_bs_decode", "steps up to max_bs_decode", since="0.5.17"),
        _arg("bs_prefill", "cuda_graph_bs_prefill", "steps up to max_bs_prefill", since="0.5.17"),
        _arg("config", "cuda_graph_config", "none", since="0.5.17", convert=_json),
        _arg("disable_padding", "disable_cuda_graph_padding", "false"),
        _arg("enable_profile", "enable_profile_cuda_graph", "false"),
        _arg("enable_gc", "enable_cudagraph_gc", "false"),
        _arg("max_bs", "cuda_graph_max_bs", until="0.5.17", instead="generator.cuda_graph.max_bs_decode"),
        _arg("bs", "cuda_graph_bs", until="0.5.17", instead="generator.cuda_graph.bs_decode"),
        _arg(
            "disable_piecewise",
            "disable_piecewise_cuda_graph",
            since="0.5.10",
            until="0.5.17",
            instead="generator.cuda_graph.backend_prefill=disabled",
        ),
        _arg(
            "enforce_piecewise",
            "enforce_piecewise_cuda_graph",
            since="0.5.10",
            until="0.5.17",
            instead="generator.cuda_graph.backend_prefill=tc_piecewise",
        ),
        _arg("piecewise_max_tokens", "piecewise_cuda_graph_max_tokens", until="0.5.17", instead=_IN_CONFIG),
        _arg("piecewise_tokens", "piecewise_cuda_graph_tokens", until="0.5.17", instead=_IN_CONFIG),
        _arg("piecewise_compiler", "piecewise_cuda_graph_compiler", until="0.5.17", instead=_IN_CONFIG),
    ),
    *_group(
        "generator.torch_compile",
        _arg("enabled", "enable_torch_compile", "false"),
        _arg("max_bs", "torch_compile_max_bs", "32"),
        _arg("debug_mode", "enable_torch_compile_debug_mode", "false", since="0.5.10"),
        _arg("torchao_config", "torchao_config", until="0.5.23", instead="generator.quantization.method"),
    ),
    *_group(
        "generator.quantization",
        _arg("method", "quantization", "none"),
        _arg("load_format", "load_format", "auto"),
        _arg("model_loader_extra_config", "model_loader_extra_config", "{}", convert=_json),
        _arg("rl_quant_profile", "rl_quant_profile", "none", since="0.5.10"),
        _arg("fp32_lm_head", "enable_fp32_lm_head", "false"),
    ),
    *_group(
        "generator.structured_output",
        _arg("grammar_backend", "grammar_backend", "xgrammar"),
        _arg("whitespace_pattern", "constrained_json_whitespace_pattern", "none"),
        _arg("disable_any_whitespace", "constrained_json_disable_any_whitespace", "false"),
    ),
    _arg("generator.custom_logit_processor.enabled", "enable_custom_logit_processor", "false"),
    *_group(
        "generator.disaggregation",
        _arg("mode", "disaggregation_mode", "none"),
        _arg("transfer_backend", "disaggregation_transfer_backend", "mooncake"),
        _arg("bootstrap_port", "disaggregation_bootstrap_port", "8998"),
        _arg("ib_device", "disaggregation_ib_device", "found by itself"),
        _arg("num_reserved_decode_tokens", "num_reserved_decode_tokens", "512"),
        _arg("decode_polling_interval", "disaggregation_decode_polling_interval", "1"),
        _arg("decode_enable_radix_cache", "disaggregation_decode_enable_radix_cache", "false", since="0.5.17"),
        _arg("decode_enable_offload_kvcache", "disaggregation_decode_enable_offload_kvcache", "false"),
        *(
            _arg(key, f"disaggregation_{key}", until=until, instead="leave it out: the halves tell each other")
            for key, until in (
                ("prefill_pp", "0.5.10"),
                ("decode_tp", "0.5.10"),
                ("decode_dp", "0.5.10"),
                ("decode_enable_fake_auto", "0.5.5"),
            )
        ),
    ),
    *_group(
        "generator.multi_node",
        _arg("nnodes", "nnodes", "1"),
        _arg("node_rank", "node_rank", "0"),
        _arg("dist_init_addr", "dist_init_addr", "none"),
        _arg("dist_timeout_s", "dist_timeout", "torch's"),
        _arg("nccl_port", "nccl_port", "drawn"),
    ),
    *_group(
        "generator.load_balancing",
        _arg("method", "load_balance_method", "auto"),
        _arg("enable_dp_lm_head", "enable_dp_lm_head", "false"),
    ),
    *_group(
        "generator.health_checks",
        _arg("watchdog_timeout_s", "watchdog_timeout", "300"),
        _arg("soft_watchdog_timeout_s", "soft_watchdog_timeout", "none", since="0.5.10"),
        _arg("skip_warmup", "skip_server_warmup", "false"),
    ),
    *_group(
        "generator.cpu_offload",
        _arg("size_gb", "cpu_offload_gb", "0"),
        _arg("group_size", "offload_group_size", "-1: off"),
        _arg("num_in_group", "offload_num_in_group", "1"),
        _arg("prefetch_step", "offload_prefetch_step", "1"),
        _arg("mode", "offload_mode", "cpu"),
    ),
)
