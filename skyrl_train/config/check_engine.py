"""Rules of the engines: weight sync, remote servers, adapters, caches, and each server's own table."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from skyrl_train.config.check_server import sglang_findings, vllm_findings
from skyrl_train.config.findings import Checked, Finding, Rule, error, warning
from skyrl_train.config.placement import take_turns

EMBEDDED_KWARGS = (
    "attention_backend",
    "chunked_prefill",
    "cuda_kernels",
    "extra_eos_token_ids",
    "kv_cache_tokens",
    "pack_weights",
    "sleeps_in_training",
)
DETERMINISTIC_KERNELS = ("ascend", "fa3", "fa4", "flashinfer", "intel_xpu", "triton")


def embedded(checked: Checked) -> Iterator[Finding]:
    config = checked.config
    generator = config.generator
    if generator.backend != "embedded":
        return
    if generator.model_dtype != config.trainer.policy.model.dtype:
        yield error(
            f"{checked.show('generator.model_dtype')} and {checked.show('trainer.policy.model.dtype')}: the embedded "
            "engine runs the trainer's own tensors, so they have one type; set the trainer's only"
        )
    if (generator.max_num_batched_tokens or 0) < (generator.max_num_seqs or 0):
        yield error(
            f"{checked.show('generator.max_num_batched_tokens')} can't hold one token for each of "
            f"{checked.show('generator.max_num_seqs')} requests; raise the first or lower the second"
        )
    if generator.gpu_memory_utilization == 1.0:
        yield error(
            f"{checked.show('generator.gpu_memory_utilization')}: the embedded engine shares memory with the trainer, "
            "and this is the fraction of what is free that its KV cache takes; set less than 1"
        )
    if (
        generator.engine_init_kwargs.get("cuda_kernels") == "fused"
        and not config.trainer.placement.policy_num_gpus_per_node
    ):
        yield error(
            "generator.engine_init_kwargs.cuda_kernels=fused wants a GPU, and "
            f"{checked.show('trainer.placement.policy_num_gpus_per_node')}; leave it out"
        )
    for name in generator.engine_init_kwargs:
        if name not in EMBEDDED_KWARGS:
            yield error(
                f"generator.engine_init_kwargs.{name}: the embedded engine takes {', '.join(EMBEDDED_KWARGS)}; "
                "the rest has keys of its own"
            )


def sleeping(checked: Checked) -> Iterator[Finding]:
    """The embedded engine that sleeps while the trainer works."""
    config = checked.config
    if config.generator.backend != "embedded" or not config.generator.engine_init_kwargs.get("sleeps_in_training"):
        return
    name = "generator.engine_init_kwargs.sleeps_in_training=true"
    if config.trainer.placement.policy_num_gpus_per_node:
        yield error(f"{name}: the embedded engine can't sleep on a GPU; leave it out")
    if config.trainer.fully_async.enabled:
        yield error(
            f"{name}: with trainer.fully_async.enabled=true the engine works while the trainer does; leave it out"
        )


def weight_sync(checked: Checked) -> Iterator[Finding]:
    config = checked.config
    generator, placement = config.generator, config.trainer.placement
    how = generator.weight_sync_backend
    name = checked.show("generator.weight_sync_backend")
    if generator.backend == "embedded":
        if how != "local":
            yield error(
                f"{name}: the embedded engine runs the trainer's own tensors and nothing is sent; use auto or local"
            )
    elif how == "local":
        yield error(f"{name}: {generator.backend} is a process of its own; use auto, nccl, gloo, cuda_ipc or disk")
    elif how in ("nccl", "cuda_ipc") and not placement.policy_num_gpus_per_node:
        yield error(f"{name} needs GPUs, and trainer.placement.policy_num_gpus_per_node=0; use gloo or disk")
    elif how == "cuda_ipc" and not placement.colocate_all:
        yield error(f"{name} needs trainer.placement.colocate_all=true: it hands over memory of one GPU; use nccl")
    elif how == "nccl" and placement.colocate_all:
        yield error(
            f"{name} can't join two processes on one GPU, and trainer.placement.colocate_all=true; use cuda_ipc"
        )
    if generator.use_overlapped_weight_sync and how != "disk":
        yield error(
            f"generator.use_overlapped_weight_sync=true needs weight_sync_backend=disk, found {how}: a folder can be "
            "written while requests run; the servers have no room for a second copy that arrives by other ways"
        )
    # Copies of the attention alone are on the same ranks.
    num_copies = 1 if generator.attention.enable_dp_attention else generator.inference_engine_data_parallel_size
    copies = generator.inference_engine_pipeline_parallel_size, num_copies
    if how in ("nccl", "gloo", "cuda_ipc") and copies != (1, 1):
        yield error(
            f"{name} reaches the tensor-parallel ranks of one copy of the model, found pipeline and data parallel "
            f"sizes {copies[0]} and {copies[1]}; use weight_sync_backend=disk"
        )


def remote_engines(checked: Checked) -> Iterator[Finding]:
    generator = checked.config.generator
    urls = generator.remote_inference_engine_urls
    if not generator.run_engines_locally and len(urls) != generator.num_inference_engines:
        yield error(
            f"generator.run_engines_locally=false attaches to generator.num_inference_engines="
            f"{generator.num_inference_engines} engines, found {len(urls)} generator.remote_inference_engine_urls"
        )
    if generator.run_engines_locally and urls:
        yield error(
            f"{checked.show('generator.remote_inference_engine_urls')} needs generator.run_engines_locally=false"
        )
    if generator.run_engines_locally and generator.engine_api_key_env is not None:
        yield error(
            f"{checked.show('generator.engine_api_key_env')} is for generator.run_engines_locally=false: servers "
            "that are started here listen on loopback, without a key"
        )
    if not generator.run_engines_locally and take_turns(checked.config):
        yield error(
            "generator.run_engines_locally=false with trainer.placement.colocate_all=true: engines that somebody else "
            "runs can't share the trainer's GPUs; set trainer.placement.colocate_all=false"
        )


def several_machines(checked: Checked) -> Iterator[Finding]:
    nodes = checked.config.generator.multi_node
    if nodes.nnodes > 1 and nodes.dist_init_addr is None:
        yield error(f"generator.multi_node.nnodes={nodes.nnodes} needs generator.multi_node.dist_init_addr=HOST:PORT")
    if nodes.node_rank >= nodes.nnodes:
        yield error(
            f"generator.multi_node.node_rank={nodes.node_rank} must be under generator.multi_node.nnodes={nodes.nnodes}"
        )


def adapters(checked: Checked) -> Iterator[Finding]:
    config = checked.config
    lora, trained = config.generator.lora, config.trainer.policy.model.lora
    rank = trained.rank
    # The embedded engine shares the model that pissa has taken its start out of.
    served = rank if config.generator.backend == "embedded" else trained.served_rank
    if rank and lora.max_rank is not None and lora.max_rank < served:
        twice = f", and with pissa an engine serves {served}" if served > rank else ""
        yield error(
            f"{checked.show('generator.lora.max_rank')} is under trainer.policy.model.lora.rank={rank}{twice}; "
            "leave it out, or raise it"
        )
    batch = lora.max_loras_per_batch or 8
    if lora.max_loaded_loras is not None and lora.max_loaded_loras < batch:
        yield error(
            f"{checked.show('generator.lora.max_loaded_loras')} is under generator.lora.max_loras_per_batch={batch}"
        )
    if lora.overlap_loading and (lora.max_loaded_loras is None or lora.max_loaded_loras > 2 * batch):
        yield error(
            "generator.lora.overlap_loading=true pins adapters in host memory: generator.lora.max_loaded_loras must "
            f"be at most 2 x max_loras_per_batch = {2 * batch}, found {lora.max_loaded_loras}"
        )


def metrics(checked: Checked) -> Iterator[Finding]:
    keys = checked.config.generator.metrics
    if keys.endpoint_port is not None and not keys.enabled:
        yield warning(
            f"{checked.show('generator.metrics.endpoint_port')} has no effect: generator.metrics.enabled=false"
        )
    if keys.export_to_file.enabled and keys.export_to_file.directory is None:
        yield error("generator.metrics.export_to_file.enabled=true needs generator.metrics.export_to_file.directory")
    for name in ("time_to_first_token", "inter_token_latency", "e2e_request_latency"):
        bounds = getattr(keys.buckets, name)
        if bounds is not None and (not bounds or any(a >= b for a, b in pairwise(bounds))):
            yield error(f"{checked.show(f'generator.metrics.buckets.{name}')} must rise from each bound to the next")
    if keys.logging.enabled and keys.logging.level == 3:
        yield warning("generator.metrics.logging.level=3 writes every prompt and answer to the log")


def _host_cache(checked: Checked) -> Iterator[Finding]:
    cache, drafts = checked.config.generator.hierarchical_cache, checked.config.generator.speculative_decoding
    if cache.enabled and drafts.enabled and drafts.draft_model_path is not None:
        yield error(
            f"{checked.show('generator.hierarchical_cache.enabled')} keeps the model's keys and not those of "
            f"{checked.show('generator.speculative_decoding.draft_model_path')}, whose guesses would be worthless "
            "after it; leave one of them out, or use generator.speculative_decoding.algorithm=ngram"
        )
    if not cache.enabled:
        for name in ("ratio", "size_gb", "write_policy"):
            if checked.is_set(f"generator.hierarchical_cache.{name}"):
                yield warning(
                    f"{checked.show(f'generator.hierarchical_cache.{name}')} has no effect while "
                    "generator.hierarchical_cache.enabled=false"
                )
    elif checked.config.trainer.placement.policy_num_gpus_per_node:
        yield error(
            "generator.hierarchical_cache.enabled=true: the embedded engine has it on the CPU only; set "
            "trainer.placement.policy_num_gpus_per_node=0, or use generator.backend=sglang"
        )


def caches(checked: Checked) -> Iterator[Finding]:
    generator = checked.config.generator
    cache = generator.hierarchical_cache
    if cache.enabled and not generator.enable_prefix_caching:
        yield error(
            "generator.hierarchical_cache.enabled=true keeps prefixes, and generator.enable_prefix_caching=false "
            "has none; turn one of them"
        )
    if cache.ratio is not None and cache.size_gb:
        yield error(
            f"{checked.show('generator.hierarchical_cache.ratio')} and "
            f"{checked.show('generator.hierarchical_cache.size_gb')} both size the host pool; keep one of them"
        )
    if generator.backend == "embedded":
        yield from _host_cache(checked)
    scales, dtype = generator.kv_cache.quantization_param_path, generator.kv_cache.dtype or "auto"
    if scales is not None and not dtype.startswith("fp8"):
        yield error(
            f"generator.kv_cache.quantization_param_path scales an fp8 cache, found generator.kv_cache.dtype={dtype}"
        )


def graphs(checked: Checked) -> Iterator[Finding]:
    generator = checked.config.generator
    graph = generator.cuda_graph
    if graph.disable_padding and generator.torch_compile.enabled:
        yield error("generator.cuda_graph.disable_padding=true does not go with generator.torch_compile.enabled=true")
    if graph.config is not None:
        single = [
            f"generator.cuda_graph.{name}"
            for name in (
                "backend_decode",
                "backend_prefill",
                "max_bs_decode",
                "max_bs_prefill",
                "bs_decode",
                "bs_prefill",
            )
            if getattr(graph, name) is not None
        ]
        if single:
            yield error(f"generator.cuda_graph.config and {', '.join(single)} write the same settings; keep one form")


def determinism(checked: Checked) -> Iterator[Finding]:
    generator = checked.config.generator
    kernel = generator.attention.backend
    if generator.deterministic_inference.enabled and kernel is not None and kernel not in DETERMINISTIC_KERNELS:
        yield error(
            f"{checked.show('generator.attention.backend')} is not batch-invariant; with "
            f"generator.deterministic_inference.enabled use one of {', '.join(DETERMINISTIC_KERNELS)}"
        )


def server_tables(checked: Checked) -> Iterator[Finding]:
    backend = checked.config.generator.backend
    if backend == "sglang":
        yield from sglang_findings(checked)
    elif backend == "vllm":
        yield from vllm_findings(checked)


ENGINE_RULES: tuple[Rule, ...] = (
    embedded,
    sleeping,
    weight_sync,
    remote_engines,
    several_machines,
    adapters,
    metrics,
    caches,
    graphs,
    determinism,
    server_tables,
)
