"""Groups of generator that describe how a server uses its hardware: kernels, graphs, caches, many machines."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from skyrl_train.config.fields import Fraction, Group, Ints, NonNegative, Positive


class KvCache(Group):
    """The paged store of keys and values."""

    dtype: Literal["auto", "bfloat16", "float16", "float32", "fp8_e5m2", "fp8_e4m3", "fp4_e2m1"] | None = Field(
        None, description="Type of its entries; null is the model's."
    )
    quantization_param_path: str | None = Field(None, description="Scaling factors for an fp8 cache.")
    fp8_gemm_backend: str | None = Field(None, description="Kernel of fp8 matrix products.")
    page_size: Positive | None = Field(None, description="Tokens of one page.")
    eviction_policy: Literal["lru", "lfu", "slru", "priority", "tlru"] | None = Field(
        None, description="Which cached prefix leaves first."
    )
    swa_full_tokens_ratio: Fraction | None = Field(None, description="Share of sliding-window layers.")


class HierarchicalCache(Group):
    """Prefixes that leave the GPU wait in host memory, or further out."""

    enabled: bool = Field(False, description="Turn it on.")
    ratio: float | None = Field(None, gt=0, description="Host pool over GPU pool.")
    size_gb: NonNegative | None = Field(None, description="Host pool in GB; wins over ratio.")
    write_policy: Literal["write_back", "write_through", "write_through_selective"] | None = Field(
        None, description="When entries are copied out."
    )
    io_backend: Literal["direct", "kernel", "kernel_ascend"] | None = Field(None, description="How they are copied.")
    mem_layout: str | None = Field(None, description="Layout of the host pool.")
    storage_backend: str | None = Field(None, description="A third tier: file, mooncake, hf3fs, nixl, aibrix.")
    storage_prefetch_policy: Literal["best_effort", "wait_complete", "timeout"] | None = Field(
        None, description="When to stop waiting for it."
    )
    storage_backend_extra_config: dict[str, Any] | None = Field(None, description="Its own options.")


class DoubleSparsity(Group):
    """Sparse attention by channel, in releases before 0.5.17."""

    enabled: bool = Field(False, description="Turn it on; later releases have dsa_prefill_backend instead.")
    channel_config_path: str | None = Field(None, description="Its calibrated channels.")
    heavy_channel_num: Positive | None = Field(None, description="Channels kept.")
    heavy_token_num: Positive | None = Field(None, description="Tokens kept.")
    heavy_channel_type: str | None = Field(None, description="Which of q, k, qk is measured.")
    sparse_decode_threshold: Positive | None = Field(None, description="Shorter contexts stay dense.")


class Attention(Group):
    """Attention kernels."""

    backend: str | None = Field(None, description="Kernel of attention: fa3, fa4, flashinfer, triton, torch_native, ….")
    prefill_backend: str | None = Field(None, description="Kernel for prompts; wins over backend.")
    decode_backend: str | None = Field(None, description="Kernel for decoding; wins over backend.")
    sampling_backend: Literal["flashinfer", "pytorch", "ascend"] | None = Field(None, description="Kernel of sampling.")
    mm_backend: str | None = Field(None, description="Kernel of multimodal attention.")
    dsa_prefill_backend: str | None = Field(None, description="DeepSeek sparse attention, prompts.")
    dsa_decode_backend: str | None = Field(None, description="DeepSeek sparse attention, decoding.")
    nsa_prefill_backend: str | None = Field(None, description="Older name of dsa_prefill_backend.")
    nsa_decode_backend: str | None = Field(None, description="Older name of dsa_decode_backend.")
    triton_num_kv_splits: Positive | None = Field(None, description="Splits of long contexts in the triton kernel.")
    triton_split_tile_size: Positive | None = Field(None, description="Tile of those splits, for determinism.")
    triton_reduce_in_fp32: bool | None = Field(None, description="Reduce in float32 in the triton kernel.")
    enable_dp_attention: bool | None = Field(None, description="Attention data parallel, the rest tensor parallel.")
    double_sparsity: DoubleSparsity


class CudaGraph(Group):
    """Recorded GPU work: no launch cost per kernel."""

    enabled: bool = Field(True, description="False runs every kernel from Python.")
    backend_decode: Literal["full", "breakable", "tc_piecewise", "disabled"] | None = Field(
        None, description="How decoding is recorded."
    )
    backend_prefill: Literal["full", "breakable", "tc_piecewise", "disabled"] | None = Field(
        None, description="How prompts are recorded."
    )
    max_bs_decode: Positive | None = Field(None, description="Greatest recorded batch of decoding.")
    max_bs_prefill: Positive | None = Field(None, description="Greatest recorded batch of prompts.")
    bs_decode: Ints | None = Field(None, description="Recorded batches of decoding.")
    bs_prefill: Ints | None = Field(None, description="Recorded batches of prompts.")
    config: dict[str, Any] | None = Field(None, description="All of these per phase, as one table.")
    disable_padding: bool | None = Field(None, description="Only exact batch sizes use a graph.")
    enable_profile: bool | None = Field(None, description="Profile the recording.")
    enable_gc: bool | None = Field(None, description="Collect garbage while recording.")
    max_bs: Positive | None = Field(None, description="Older name of max_bs_decode.")
    bs: Ints | None = Field(None, description="Older name of bs_decode.")
    disable_piecewise: bool | None = Field(None, description="Older name: now backend_prefill disabled.")
    enforce_piecewise: bool | None = Field(None, description="Older name: now backend_prefill tc_piecewise.")
    piecewise_max_tokens: Positive | None = Field(None, description="Older name: now in config.")
    piecewise_tokens: Ints | None = Field(None, description="Older name: now in config.")
    piecewise_compiler: str | None = Field(None, description="Older name: now in config.")


class TorchCompile(Group):
    """torch.compile in the server."""

    enabled: bool = Field(False, description="Turn it on.")
    max_bs: Positive | None = Field(None, description="Greatest compiled batch.")
    debug_mode: bool | None = Field(None, description="Its debug mode.")
    torchao_config: str | None = Field(None, description="torchao quantization (older releases).")


class Quantization(Group):
    """Weights in fewer bits, in the engine only."""

    method: str | None = Field(None, description="fp8, awq, gptq, …; null serves the weights as they are.")
    load_format: str | None = Field(None, description="Format of the weight files.")
    model_loader_extra_config: dict[str, Any] | None = Field(None, description="Options of that loader.")
    rl_quant_profile: str | None = Field(None, description="FlashRL profile, with load_format flash_rl.")
    fp32_lm_head: bool | None = Field(None, description="Logits in float32.")


class Disaggregation(Group):
    """Prompts and decoding on different servers."""

    mode: Literal["prefill", "decode"] | None = Field(None, description="This server's half; null does both.")
    transfer_backend: Literal["mooncake", "nixl", "ascend", "fake", "mori", "mooncake_tcp"] | None = Field(
        None, description="How the cache travels."
    )
    bootstrap_port: Positive | None = Field(None, description="Port where the halves meet.")
    ib_device: str | None = Field(None, description="InfiniBand devices.")
    num_reserved_decode_tokens: Positive | None = Field(None, description="Tokens kept free for a new request.")
    decode_polling_interval: Positive | None = Field(None, description="Steps between looks for requests.")
    decode_enable_radix_cache: bool | None = Field(None, description="Prefix cache on the decoding half.")
    decode_enable_offload_kvcache: bool | None = Field(None, description="Offload the cache there.")
    prefill_pp: Positive | None = Field(None, description="Older releases: pipeline size of the other half.")
    decode_tp: Positive | None = Field(None, description="Older releases: tensor size of the other half.")
    decode_dp: Positive | None = Field(None, description="Older releases: data size of the other half.")
    decode_enable_fake_auto: bool | None = Field(None, description="Older releases: a test mode.")


class MultiNode(Group):
    """One engine over several machines."""

    nnodes: Positive = Field(1, description="Machines of one engine.")
    node_rank: NonNegative = Field(0, description="This machine among them.")
    dist_init_addr: str | None = Field(None, description="host:port where they meet; needed when nnodes > 1.")
    dist_timeout_s: Positive | None = Field(None, description="Seconds they wait for each other.")
    nccl_port: Positive | None = Field(None, description="NCCL's port.")


class LoadBalancing(Group):
    """Which data-parallel rank gets a request."""

    method: Literal["auto", "round_robin", "follow_bootstrap_room", "total_requests", "total_tokens"] | None = Field(
        None, description="How it is chosen."
    )
    enable_dp_lm_head: bool | None = Field(None, description="Shard the vocabulary within attention groups.")


class HealthChecks(Group):
    """When a server counts as dead."""

    startup_timeout_s: float = Field(600.0, gt=0, description="Seconds until a new server must answer.")
    interval_s: float = Field(10.0, gt=0, description="Seconds between checks.")
    max_failures: Positive = Field(3, description="Failed checks in a row that end it.")
    watchdog_timeout_s: float | None = Field(None, gt=0, description="A step longer than this ends the server.")
    soft_watchdog_timeout_s: float | None = Field(None, gt=0, description="A step longer than this is reported.")
    skip_warmup: bool | None = Field(None, description="No warm-up request at start.")


class CpuOffload(Group):
    """Weights in host memory."""

    size_gb: NonNegative | None = Field(None, description="GB of weights to keep in host memory.")
    group_size: int | None = Field(None, ge=-1, description="Layers of one group; -1 is off.")
    num_in_group: Positive | None = Field(None, description="Layers of a group that leave the GPU.")
    prefetch_step: NonNegative | None = Field(None, description="Groups fetched ahead.")
    mode: Literal["cpu", "meta", "sharded_gpu", "shm_cpu"] | None = Field(None, description="Where they go.")
