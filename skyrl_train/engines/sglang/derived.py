"""Server arguments that follow from others: what adapters, penalties and a server on a CPU need.

They come first, so whatever a key or generator.engine_init_kwargs writes wins.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from skyrl_train.engines.sglang.releases import release_number

if TYPE_CHECKING:
    from skyrl_train.config.schema import Config

CPU_MAX_RUNNING = 64
CPU_MAX_CACHE_TOKENS = 2**16
"""The KV cache is allocated at start, whatever is used of it: about 1.5 GiB for half a billion parameters."""
CACHE_RESERVE = 64
"""A request must fit into the cache beside a last page."""
LINEAR_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def lora_arguments(config: Config) -> dict[str, Any]:
    """A server that starts without adapters can't tell their size from them: it is the policy's."""
    lora = config.trainer.policy.model.lora
    if not config.generator.lora.enabled or not lora.rank:
        return {}
    modules = LINEAR_MODULES if isinstance(lora.target_modules, str) else lora.target_modules
    excluded = set(lora.exclude_modules)
    return {
        "max_lora_rank": lora.served_rank,
        "lora_target_modules": [module for module in modules if module not in excluded],
    }


def penalty_arguments(config: Config) -> dict[str, Any]:
    """While the scheduler works ahead of the sampler it penalises a token one step late, so that a repetition at once
    is free, and the prompt's last token too (0.5.17, 0.5.23). Without that, what it does is what was asked for.
    """
    asked = (config.generator.sampling_params, config.generator.eval_sampling_params)
    if any(
        (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) != (1, 0, 0)
        for sampling in asked
    ):
        return {"disable_overlap_schedule": True}
    return {}


def cpu_arguments(config: Config, *, release: str) -> dict[str, Any]:
    """SGLang chooses by GPU: on a CPU its own defaults name kernels that are not there.

    Speculation needs attention kernels that verify a batch of drafts; torch_native can't.
    """
    generator = config.generator
    running = generator.max_num_seqs or generator.scheduling.max_running_requests or CPU_MAX_RUNNING
    arguments: dict[str, Any] = {
        "device": "cpu",
        "attention_backend": "torch_native",
        "sampling_backend": "pytorch",
        "max_running_requests": CPU_MAX_RUNNING,
        "max_total_tokens": _cache_tokens(running, generator.max_model_len),
        "sleep_on_idle": True,
    }
    if release_number(release) >= (0, 5, 17):
        arguments |= {"disable_decode_cuda_graph": True, "disable_prefill_cuda_graph": True}
    else:
        arguments["disable_cuda_graph"] = True
    if generator.speculative_decoding.enabled:
        arguments |= {"prefill_attention_backend": "intel_amx", "decode_attention_backend": "intel_amx"}
    if generator.lora.enabled:
        arguments["lora_backend"] = "torch_native"
    return arguments


def _cache_tokens(running: int, context: int | None) -> int:
    """Room for all that may run at once, within bounds; for one whole context at least."""
    if context is None:
        return CPU_MAX_CACHE_TOKENS
    return max(min(running * context, CPU_MAX_CACHE_TOKENS), context) + CACHE_RESERVE
