"""Groups of generator that describe how a server uses its hardware: kernels, graphs, caches, many machines."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from skyrl_train.config.fields import Fraction, Group, Ints, NonNegative, Positive


class KvCache(Group):
    """The paged store of keys and values."""

    dtype: (
        Literal["auto", "bfloat16", "fp8_e5m2", "fp8_e4m3", "mxfp8", "nvfp4", "fp4_mx_block16", "fp4_e2m1"] | None
    ) = Field(None, description="Type of cached keys and values; fp8 doubles the room and changes log-probabilities.")
    quantization_param_path: str | None = Field(None, description="JSON file with scaling factors for an fp8 cache.")
    fp8_gemm_backend: str | None = Field(None, description="Kernel of block-wise fp8 matrix products.")
    page_size: Positive | None = Field(None, description="Tokens of one page; prefixes are shared in whole pages.")
    eviction_policy: Literal["lru", "lfu", "slru", "priority", "tlru"] | None = Field(
        None, description="Which cached prefix leaves first when room is needed."
    )
    swa_full_tokens_ratio: Fraction | None = Field(
        None,
        description="For models with sliding windows: cached tokens of a window layer for each token of a full layer.",
    )


class HierarchicalCache(Group):
    """Prefixes that leave the GPU wait in host memory, or further out."""

    enabled: bool = Field(False, description="Keep evicted prefixes in host memory.")
    ratio: float | None = Field(None, gt=0, description="Size of the host pool as a multiple of the GPU pool.")
    size_gb: NonNegative | None = Field(None, description="Size of the host pool in GB, instead of ratio.")
    write_policy: Literal["write_back", "write_through", "write_through_selective"] | None = Field(
        None, description="Copy a prefix out at once, when used again (selective), or when it is evicted (write_back)."
    )
    io_backend: Literal["direct", "kernel", "kernel_ascend"] | None = Field(
        None, description="How pages move between host and GPU."
    )
    mem_layout: str | None = Field(None, description="Order of pages and layers in the host pool.")
    storage_backend: str | None = Field(
        None, description="A third tier behind host memory: file, mooncake, hf3fs, nixl or aibrix."
    )
    storage_prefetch_policy: Literal["best_effort", "wait_complete", "timeout"] | None = Field(
        None, description="How long a request waits for its prefix from that tier."
    )
    storage_backend_extra_config: dict[str, Any] | None = Field(None, description="Options of that tier.")


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

    backend: str | None = Field(
        None,
        description="Attention kernel: fa3, fa4, flashinfer, triton, torch_native (CPU), and more by model and GPU.",
    )
    prefill_backend: str | None = Field(None, description="Attention kernel for prompts only; wins over backend.")
    decode_backend: str | None = Field(None, description="Attention kernel for decoding only; wins over backend.")
    sampling_backend: Literal["flashinfer", "pytorch", "ascend"] | None = Field(
        None, description="Kernel that samples tokens."
    )
    mm_backend: str | None = Field(None, description="Attention kernel of image and audio encoders.")
    dsa_prefill_backend: str | None = Field(None, description="Kernel of DeepSeek sparse attention, for prompts.")
    dsa_decode_backend: str | None = Field(None, description="Kernel of DeepSeek sparse attention, for decoding.")
    nsa_prefill_backend: str | None = Field(None, description="Older name of dsa_prefill_backend.")
    nsa_decode_backend: str | None = Field(None, description="Older name of dsa_decode_backend.")
    triton_num_kv_splits: Positive | None = Field(
        None, description="triton kernel: parts that a long context is split into."
    )
    triton_split_tile_size: Positive | None = Field(
        None, description="triton kernel: fixed length of those parts, for deterministic inference."
    )
    triton_reduce_in_fp32: bool | None = Field(None, description="triton kernel: reduce in float32.")
    enable_dp_attention: bool | None = Field(
        None,
        description="Attention in data-parallel copies, the rest tensor parallel; the copies take no GPUs of "
        "their own.",
    )
    double_sparsity: DoubleSparsity


class CudaGraph(Group):
    """Recorded GPU work: no launch cost per kernel."""

    enabled: bool = Field(
        True,
        description="Replay recorded GPU work; false launches every kernel from Python: slower, starts faster, "
        "easier to debug.",
    )
    backend_decode: Literal["full", "breakable", "tc_piecewise", "disabled"] | None = Field(
        None, description="How decode steps are recorded."
    )
    backend_prefill: Literal["full", "breakable", "tc_piecewise", "disabled"] | None = Field(
        None, description="How prompt steps are recorded."
    )
    max_bs_decode: Positive | None = Field(
        None, description="Largest decode batch that is recorded; larger ones run without a graph."
    )
    max_bs_prefill: Positive | None = Field(None, description="Largest prompt batch, in tokens, that is recorded.")
    bs_decode: Ints | None = Field(
        None, description="Decode batch sizes to record, instead of a series up to max_bs_decode."
    )
    bs_prefill: Ints | None = Field(None, description="Prompt batch sizes to record.")
    config: dict[str, Any] | None = Field(
        None, description="All settings of both phases as one mapping, as {decode: {backend: full, max_bs: 256}}."
    )
    disable_padding: bool | None = Field(
        None, description="Use a graph only where a batch has exactly a recorded size."
    )
    enable_profile: bool | None = Field(None, description="Profile the recording at start.")
    enable_gc: bool | None = Field(None, description="Allow garbage collection while recording: slower start.")
    max_bs: Positive | None = Field(None, description="Older name of max_bs_decode.")
    bs: Ints | None = Field(None, description="Older name of bs_decode.")
    disable_piecewise: bool | None = Field(None, description="Older name: now backend_prefill disabled.")
    enforce_piecewise: bool | None = Field(None, description="Older name: now backend_prefill tc_piecewise.")
    piecewise_max_tokens: Positive | None = Field(None, description="Older name: now in config.")
    piecewise_tokens: Ints | None = Field(None, description="Older name: now in config.")
    piecewise_compiler: str | None = Field(None, description="Older name: now in config.")


class TorchCompile(Group):
    """torch.compile in the server."""

    enabled: bool = Field(False, description="Compile the model with torch.compile: slow start, faster small batches.")
    max_bs: Positive | None = Field(None, description="Largest batch that is compiled.")
    debug_mode: bool | None = Field(None, description="torch.compile's debug mode.")
    torchao_config: str | None = Field(None, description="torchao quantization, as int8wo.")


class Quantization(Group):
    """Weights in fewer bits, in the engine only."""

    method: str | None = Field(
        None,
        description="Quantize the engine's weights: fp8, awq, gptq, …; rollouts then differ from the policy that "
        "is trained.",
    )
    load_format: str | None = Field(
        None, description="Format of the weight files; dummy makes random weights for measuring."
    )
    model_loader_extra_config: dict[str, Any] | None = Field(None, description="Options of that format's loader.")
    rl_quant_profile: str | None = Field(None, description="FlashRL quantization profile, with load_format flash_rl.")
    fp32_lm_head: bool | None = Field(
        None, description="Compute logits in float32: closer to the trainer's log-probabilities."
    )


class Disaggregation(Group):
    """Prompts and decoding on different servers."""

    mode: Literal["prefill", "decode"] | None = Field(
        None, description="Make these servers do prompts only or decoding only; null does both."
    )
    transfer_backend: Literal["mooncake", "nixl", "ascend", "fake", "mori", "mooncake_tcp"] | None = Field(
        None, description="How keys and values travel from one half to the other."
    )
    bootstrap_port: Positive | None = Field(None, description="Port on the prompt half where the halves meet.")
    ib_device: str | None = Field(None, description="InfiniBand devices to use, separated by commas.")
    num_reserved_decode_tokens: Positive | None = Field(
        None, description="KV cache tokens kept free for each request that joins the decoding half."
    )
    decode_polling_interval: Positive | None = Field(
        None, description="Steps between two looks for arriving requests on the decoding half."
    )
    decode_enable_radix_cache: bool | None = Field(None, description="Keep prefixes on the decoding half too.")
    decode_enable_offload_kvcache: bool | None = Field(
        None, description="Copy the decoding half's cache out to host memory."
    )
    prefill_pp: Positive | None = Field(None, description="Pipeline size of the other half.")
    decode_tp: Positive | None = Field(None, description="Tensor-parallel size of the other half.")
    decode_dp: Positive | None = Field(None, description="Data-parallel size of the other half.")
    decode_enable_fake_auto: bool | None = Field(None, description="A test mode of the decoding half.")


class MultiNode(Group):
    """One engine over several machines."""

    nnodes: Positive = Field(1, description="Machines that one engine spans.")
    node_rank: NonNegative = Field(0, description="Index of this machine among them, from 0.")
    dist_init_addr: str | None = Field(None, description="host:port where they meet; needed when nnodes > 1.")
    dist_timeout_s: Positive | None = Field(None, description="Seconds that they wait for each other at start.")
    nccl_port: Positive | None = Field(None, description="Port of NCCL's rendezvous.")


class LoadBalancing(Group):
    """Which data-parallel rank gets a request."""

    method: Literal["auto", "round_robin", "follow_bootstrap_room", "total_requests", "total_tokens"] | None = Field(
        None, description="Which data-parallel copy gets a request."
    )
    enable_dp_lm_head: bool | None = Field(
        None, description="With data-parallel attention: shard the vocabulary within each copy."
    )


class HealthChecks(Group):
    """When a server counts as dead."""

    startup_timeout_s: float = Field(
        600.0,
        gt=0,
        description="Seconds until a starting server must answer; loading weights and recording graphs included.",
    )
    interval_s: float = Field(10.0, gt=0, description="Seconds between two health checks.")
    max_failures: Positive = Field(
        3, description="Failed checks in a row after which a server counts as dead and is restarted."
    )
    watchdog_timeout_s: float | None = Field(
        None, gt=0, description="The server ends itself when one step takes longer than this."
    )
    soft_watchdog_timeout_s: float | None = Field(
        None, gt=0, description="The server reports where it stands when one step takes longer than this."
    )
    skip_warmup: bool | None = Field(None, description="Start without a warm-up request; the first real one is slow.")


class CpuOffload(Group):
    """Weights in host memory."""

    size_gb: NonNegative | None = Field(None, description="GB of weights kept in host memory.")
    group_size: int | None = Field(
        None, ge=-1, description="Layers are grouped by this many, and part of each group is offloaded; -1 is off."
    )
    num_in_group: Positive | None = Field(None, description="Layers of each group that are offloaded.")
    prefetch_step: NonNegative | None = Field(None, description="Groups that are fetched ahead.")
    mode: Literal["cpu", "meta", "sharded_gpu", "shm_cpu"] | None = Field(
        None, description="Where offloaded layers go."
    )
