"""Server options that follow from others: what the client and the weight channel need, adapters, a CPU."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from skyrl_train.config.schema import Config

RECEIVER_FOLDER = Path(__file__).parent / "inside"
"""On the PYTHONPATH of every server."""
SERVED_NAME = "policy"
PROCESSED_LOGPROBS = "processed_logprobs"
TRANSFER_BACKEND = "skyrl"
WORKER_EXTENSION = "skyrl_receiver.worker.WorkerExtension"

CPU_MAX_RUNNING = 64
CPU_MAX_CACHE_TOKENS = 2**16
"""The cache is allocated at start, whatever is used of it."""
CPU_BLOCK_TOKENS = 128
UNKNOWN_CACHE_BYTES = 2**30
"""For a model whose shape can't be read before the start: the built-in one takes a small part of it."""

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What --max-lora-rank takes."""
NUM_POLICY_ADAPTERS = 2
"""During an update the new one is loaded before the old one goes."""

_METHODS = {"ngram": "ngram", "standalone": "draft_model", "eagle": "eagle", "eagle3": "eagle3"}


def with_derived(config: Config, options: Mapping[str, Any], own: Mapping[str, Any], *, model: str) -> dict[str, Any]:
    """`options` come from keys and stay as they are; `own` are generator.engine_init_kwargs, written later."""
    on_cpu = not config.trainer.placement.policy_num_gpus_per_node
    derived: dict[str, Any] = {}
    if config.generator.speculative_decoding.enabled:
        derived["speculative-config"] = _speculation(config)
    if config.generator.metrics.tracing.enabled:
        derived["otlp-traces-endpoint"] = config.generator.metrics.tracing.otlp_endpoint
    if not on_cpu and config.trainer.placement.colocate_all:
        derived["enable-sleep-mode"] = True
    if config.generator.lora.enabled:
        derived |= _lora(config, {**options, **own})
    if on_cpu:
        derived |= _cpu(config, {**options, **own}, model)
        # Of all memory of the machine, there; kv-cache-memory-bytes says it exactly.
        options = {name: value for name, value in options.items() if name != "gpu-memory-utilization"}
    return {
        **options,
        **{name: value for name, value in derived.items() if name not in options},
        "served-model-name": SERVED_NAME,
        # What was drawn from, so that a temperature can be trained at: raw ones are at temperature 1 whatever it is.
        "logprobs-mode": PROCESSED_LOGPROBS,
        "enable-prompt-tokens-details": True,
        "disable-uvicorn-access-log": True,
        "worker-extension-cls": WORKER_EXTENSION,
        "weight-transfer-config": {"backend": TRANSFER_BACKEND},
    }


def lora_rank(rank: int) -> int:
    """The smallest that vLLM takes and that holds `rank`."""
    return next((allowed for allowed in LORA_RANKS if allowed >= rank), rank)


def num_lora_slots(config: Config) -> int:
    """--max-loras: adapters in one batch, and the base model's. The policy's two, and those that are named."""
    lora = config.generator.lora
    return lora.max_loras_per_batch or len(lora.paths) + NUM_POLICY_ADAPTERS + 1


def max_adapters(config: Config) -> int | None:
    """How many may be loaded at once; None is any number.

    On a CPU, vLLM 0.32 answers base-model requests with the adapter in the last slot: its kernels read index -1 as
    the last. That slot must stay empty. GPU kernels skip such rows, and slots are filled by turns.
    """
    if config.trainer.placement.policy_num_gpus_per_node:
        return None
    return num_lora_slots(config) - 1


def _lora(config: Config, known: Mapping[str, Any]) -> dict[str, Any]:
    slots = num_lora_slots(config)
    derived: dict[str, Any] = {"max-loras": slots, "max-cpu-loras": max(slots, known.get("max-cpu-loras") or 0)}
    if rank := config.trainer.policy.model.lora.served_rank:
        derived["max-lora-rank"] = lora_rank(rank)
    return derived


def _cpu(config: Config, known: Mapping[str, Any], model: str) -> dict[str, Any]:
    running = known.get("max-num-seqs") or CPU_MAX_RUNNING
    derived = {"max-num-seqs": running, "kv-cache-memory-bytes": _cache_bytes(config, running, model)}
    if "compilation-config" not in known:
        # Compiling takes tens of seconds at each start, and pays for no small model.
        derived["enforce-eager"] = True
    if (known.get("max-num-batched-tokens") or sys.maxsize) >= (config.generator.max_model_len or sys.maxsize):
        # Else a seeded request whose prompt two steps share ends the engine: see traits.loses_seeds.
        derived["enable-chunked-prefill"] = False
    return derived


def _cache_bytes(config: Config, running: int, model: str) -> int:
    """Room for all that may run at once, within bounds; for one whole context at least, and a last block each."""
    # The configuration's checks import this module: at the top the import would go round.
    from skyrl_train.config.model_shape import BYTES_PER_NUMBER, read_model_shape

    generator = config.generator
    shape = read_model_shape(model)
    if shape is None or generator.max_model_len is None:
        return UNKNOWN_CACHE_BYTES
    context = -(-generator.max_model_len // CPU_BLOCK_TOKENS) * CPU_BLOCK_TOKENS
    tokens = max(min(running * context, CPU_MAX_CACHE_TOKENS), context) + CPU_BLOCK_TOKENS
    return tokens * shape.kv_bytes_per_token(BYTES_PER_NUMBER[generator.model_dtype or "float32"])


def _speculation(config: Config) -> dict[str, Any]:
    keys = config.generator.speculative_decoding
    options = {
        "method": _METHODS.get(keys.algorithm, keys.algorithm),
        "model": keys.draft_model_path,
        "num_speculative_tokens": keys.num_draft_tokens,
    }
    if keys.algorithm == "ngram" and keys.ngram.max_trie_depth is not None:
        # Left out, the shortest match is as long as the longest.
        options |= {"prompt_lookup_max": keys.ngram.max_trie_depth, "prompt_lookup_min": 1}
    return {name: value for name, value in options.items() if value is not None}
