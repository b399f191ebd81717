"""What one embedded engine may use, and how that resolves against the model it serves."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from skyrl_train.engines.embedded.adapters.settings import LoraLimits
from skyrl_train.engines.embedded.packed_linear import packed_bytes
from skyrl_train.errors import ConfigError

PACKED_FRAC = 0.25
"""Of the free memory, for packed copies of the weights."""

AttentionName = Literal["auto", "cpu", "reference"]
CudaKernels = Literal["plain", "fused"]
GrammarBackend = Literal["xgrammar", "none"]
SchedulingPolicy = Literal["fcfs", "lpm"]


@dataclass(frozen=True, kw_only=True)
class EmbeddedConfig:
    """Limits of one engine. None means: derived from the model or the machine (see `resolve_limits`).

    `max_num_seqs` requests run at once. A step computes at most `max_num_batched_tokens` rows (one per decoding
    request, the rest are prompt tokens). `kv_cache_tokens` token slots are shared by running requests and the
    prefix cache; without it, the pool takes `kv_cache_frac` of the memory that is free at construction, and never
    more than `max_num_seqs` full contexts need.
    """

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    max_context_len: int | None = None
    kv_cache_tokens: int | None = None
    kv_cache_frac: float = 0.3
    enable_prefix_caching: bool = True
    chunked_prefill: bool = True
    """Cut prompts to the step's row budget. Off: a prompt is computed in one step, however long it is."""
    host_cache_ratio: float | None = None
    """Keep evicted prefixes in host memory (see host_tier): room for so many times the tokens of the pool, or for
    `host_cache_gb` * 1e9 bytes of them. None, both: what is evicted is gone."""
    host_cache_gb: float | None = None
    sleeps_in_training: bool = False
    """For the synchronous loop: the engine sleeps while the trainer works (see sleep). On the CPU."""
    attention_backend: AttentionName = "auto"
    cuda_kernels: CudaKernels = "plain"
    """On a GPU: transformers' modules as they are, or their small parts fused, projections of one input as one product,
    sampling rules on the device and shared prefixes read once (see fused_runner). A fused engine lays the model's
    projections out side by side at its start; they stay the trainer's own tensors."""
    pack_weights: bool | None = None
    """On a CPU, multiply with a second copy of the weights in the kernels' own order (see packed_linear), two to three
    times as fast for few rows. None: where the copy takes at most a quarter of the memory that is free at the start."""
    deterministic: bool = False
    """The same bits for a request alone or in any batch (see invariant): float32 on the CPU."""
    seed: int = 0
    """Start of the sequence that seeds requests which bring no seed."""
    scheduling_policy: SchedulingPolicy = "fcfs"
    """Which of the waiting requests of one priority is admitted first: the oldest, or the longest cached prefix."""
    preemption_threshold: int | None = None
    """A waiting request whose priority is higher by this takes the place of a running one; None: it never does."""
    low_priority_values_first: bool = False
    grammar_backend: GrammarBackend = "xgrammar"
    json_whitespace: bool = True
    """Answers under a JSON schema may have white space wherever JSON allows it."""
    logit_processors: bool = True
    """Requests may name logit processors: functions that this process imports and runs."""
    lora: LoraLimits | None = None
    """Serve adapters beside the model; on the CPU. None: requests can't name one, and the policy is the model."""
    extra_eos_token_ids: tuple[int, ...] = field(default=())
    """End tokens beyond those that the model's generation config, its config and the tokenizer name."""

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_context_len", "kv_cache_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"embedded engine: {name} must be at least 1, found {value}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"embedded engine: max_num_batched_tokens {self.max_num_batched_tokens} can't hold one row for each of "
                f"max_num_seqs {self.max_num_seqs} requests; raise the first or lower the second"
            )
        if self.deterministic and self.attention_backend != "auto":
            raise ConfigError(
                "embedded engine: deterministic has an attention of its own; leave attention_backend "
                f"{self.attention_backend!r} out"
            )
        if self.cuda_kernels not in ("plain", "fused"):
            raise ConfigError(f"embedded engine: cuda_kernels is plain or fused, found {self.cuda_kernels!r}")
        others = [name for name in ("deterministic", "lora") if getattr(self, name)]
        if self.attention_backend != "auto":
            others.append("attention_backend")
        if self.cuda_kernels == "fused" and others:
            raise ConfigError(
                f"embedded engine: cuda_kernels 'fused' brings its own kernels and does not go with {', '.join(others)}"
            )
        if self.deterministic and self.lora is not None:
            raise ConfigError(
                "embedded engine: deterministic and lora don't go together: what an adapter adds is computed in a way "
                "that depends on the batch; leave one of them out"
            )
        sizes = [size for size in (self.host_cache_ratio, self.host_cache_gb) if size is not None]
        if sizes and not self.enable_prefix_caching:
            raise ConfigError("embedded engine: a host cache keeps prefixes, and enable_prefix_caching=False has none")
        if len(sizes) > 1 or any(size <= 0 for size in sizes):
            raise ConfigError(
                f"embedded engine: one of host_cache_ratio and host_cache_gb sizes the host cache, over 0, found "
                f"{self.host_cache_ratio} and {self.host_cache_gb}"
            )
        if self.scheduling_policy == "lpm" and not self.enable_prefix_caching:
            raise ConfigError(
                "embedded engine: scheduling policy lpm looks for cached prefixes, and prefix caching is off; use fcfs"
            )
        if not 0 < self.kv_cache_frac < 1:
            raise ConfigError(f"embedded engine: kv_cache_frac must be in (0, 1), found {self.kv_cache_frac}")


@dataclass(frozen=True, kw_only=True)
class KVShape:
    """One attention layer's cache: `num_kv_heads` x `head_dim` numbers for keys, as many for values.

    `num_heads` query heads read it.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.num_kv_heads * self.head_dim * self.dtype.itemsize


def resolve_context_len(config: EmbeddedConfig, model_config: Any) -> int:
    """The longest prompt plus completion. Raises ConfigError where the model can't reach what is asked."""
    text_config = model_config.get_text_config()
    limit: int | None = getattr(text_config, "max_position_embeddings", None)
    context_len = config.max_context_len or limit
    if context_len is None:
        raise ConfigError("embedded engine: the model names no max_position_embeddings; set max_context_len")
    if limit is not None and context_len > limit:
        raise ConfigError(f"embedded engine: max_context_len {context_len} is over the model's {limit} positions")
    _refuse_length_dependent_rope(text_config, context_len)
    return context_len


def _refuse_length_dependent_rope(text_config: Any, context_len: int) -> None:
    """`dynamic` and `longrope` change every rotary angle when the longest row of a batch passes a limit.

    A request would then depend on who shares its batch, and cached keys would be wrong; below the limit they
    are constant.
    """
    rope = getattr(text_config, "rope_parameters", None) or getattr(text_config, "rope_scaling", None) or {}
    for entry in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        kind = entry.get("rope_type", entry.get("type"))
        if kind not in {"dynamic", "longrope"}:
            continue
        limit = entry.get("original_max_position_embeddings") or getattr(
            text_config, "original_max_position_embeddings", text_config.max_position_embeddings
        )
        if context_len > limit:
            raise ConfigError(
                f"embedded engine: rope type {kind!r} changes the angles beyond {limit} positions, so max_context_len "
                f"{context_len} can't be served exactly; set max_context_len to at most {limit}"
            )


def resolve_kv_tokens(
    config: EmbeddedConfig, layers: dict[int, KVShape], context_len: int, device: torch.device, draft_bytes: int = 0
) -> int:
    """How many token slots the pool gets; a drafter's own pool takes `draft_bytes` for each of them."""
    if config.kv_cache_tokens is not None:
        return config.kv_cache_tokens
    per_token = sum(shape.bytes_per_token for shape in layers.values()) + draft_bytes
    room = int(free_bytes(device) * config.kv_cache_frac) // per_token
    tokens = min(room, config.max_num_seqs * context_len)
    if tokens < context_len:
        raise ConfigError(
            f"embedded engine: {config.kv_cache_frac:.0%} of the free memory holds {tokens} tokens of "
            f"{per_token} bytes, fewer than one context of {context_len}; lower max_context_len or raise kv_cache_frac"
        )
    return tokens


def resolve_host_tokens(config: EmbeddedConfig, layers: dict[int, KVShape], num_slots: int) -> int | None:
    """How many tokens the host tier has room for; None: there is none."""
    if config.host_cache_ratio is not None:
        return int(config.host_cache_ratio * num_slots)
    if config.host_cache_gb is not None:
        return int(config.host_cache_gb * 1e9) // sum(shape.bytes_per_token for shape in layers.values())
    return None


def resolve_packing(config: EmbeddedConfig, model: torch.nn.Module) -> bool:
    """Whether the engine keeps packed copies of the model's weights."""
    device = next(model.parameters()).device
    if config.pack_weights is not None or device.type != "cpu":
        return bool(config.pack_weights)
    return packed_bytes(model) <= PACKED_FRAC * free_bytes(device)


def free_bytes(device: torch.device) -> int:
    """Memory that is free on the device now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except FileNotFoundError:
        pass  # not Linux: what is installed is the best figure there is
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
