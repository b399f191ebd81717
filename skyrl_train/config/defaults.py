"""Defaults that depend on the backend or on another key: null in the schema, filled in here, shown as such."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from skyrl_train.config.keys import read
from skyrl_train.config.schema import Config
from skyrl_train.config.sources import Source

DEFAULT_TOKENS_PER_MICRO_BATCH = 8192


def _dtype(config: Config) -> str:
    return "bfloat16" if config.trainer.placement.policy_num_gpus_per_node else "float32"


def _context(config: Config) -> int:
    generator = config.generator
    longest = max(generator.sampling_params.max_generate_length, generator.eval_sampling_params.max_generate_length)
    return generator.max_input_length + longest


def _sync_backend(config: Config) -> str:
    placement = config.trainer.placement
    if config.generator.backend == "embedded":
        return "local"
    if not placement.policy_num_gpus_per_node:
        return "disk"
    return "cuda_ipc" if placement.colocate_all else "nccl"


def _micro_batch_tokens(config: Config) -> int | None:
    """A sample must fit; a micro batch size in samples takes its place."""
    if config.trainer.micro_train_batch_size_per_gpu is not None:
        return None
    longest = config.generator.max_input_length + config.generator.sampling_params.max_generate_length
    return max(DEFAULT_TOKENS_PER_MICRO_BATCH, longest)


def _mini_batch(config: Config) -> int:
    """The whole batch; the built-in model learns in fewer steps from two updates each."""
    trainer = config.trainer
    two = trainer.policy.model.path.startswith("builtin:") and trainer.train_batch_size % 2 == 0
    return trainer.train_batch_size // 2 if two else trainer.train_batch_size


def _serves_adapters(config: Config) -> bool:
    """The embedded engine can on the CPU, where results may depend on the batch; elsewhere it serves them merged."""
    generator = config.generator
    return generator.backend != "embedded" or not (
        config.trainer.placement.policy_num_gpus_per_node or generator.deterministic_inference.enabled
    )


Rule = Callable[[Config], Any]

BACKEND_DEFAULTS: Mapping[str, Mapping[str, Rule]] = {
    "generator.model_dtype": {
        "embedded": lambda config: config.trainer.policy.model.dtype or _dtype(config),
        "sglang": _dtype,
        "vllm": _dtype,
    },
    "generator.max_model_len": {"embedded": _context, "sglang": _context, "vllm": _context},
    "generator.weight_sync_backend": {"embedded": _sync_backend, "sglang": _sync_backend, "vllm": _sync_backend},
    "generator.max_num_seqs": {"embedded": lambda _: 512},
    "generator.max_num_batched_tokens": {"embedded": lambda _: 2048},
    "generator.gpu_memory_utilization": {
        "embedded": lambda _: 0.3,
        "sglang": lambda config: 0.6 if config.trainer.placement.colocate_all else 0.85,
        "vllm": lambda config: 0.6 if config.trainer.placement.colocate_all else 0.9,
    },
}
"""key -> backend -> value. A backend without an entry decides for itself: the key stays null."""

DERIVED_DEFAULTS: Mapping[str, tuple[str, Rule]] = {
    "trainer.policy.model.dtype": ("trainer.placement.policy_num_gpus_per_node", _dtype),
    "trainer.placement.ref_num_gpus_per_node": (
        "trainer.placement.policy_num_gpus_per_node",
        lambda config: config.trainer.placement.policy_num_gpus_per_node,
    ),
    "trainer.placement.critic_num_gpus_per_node": (
        "trainer.placement.policy_num_gpus_per_node",
        lambda config: config.trainer.placement.policy_num_gpus_per_node,
    ),
    "trainer.ref.model.path": ("trainer.policy.model.path", lambda config: config.trainer.policy.model.path),
    "trainer.critic.model.path": ("trainer.policy.model.path", lambda config: config.trainer.policy.model.path),
    "trainer.policy_mini_batch_size": ("trainer.train_batch_size", _mini_batch),
    "trainer.critic_mini_batch_size": (
        "trainer.policy_mini_batch_size",
        lambda config: config.trainer.policy_mini_batch_size or _mini_batch(config),
    ),
    "trainer.run_path": ("trainer.run_name", lambda config: f"runs/{config.trainer.run_name}"),
    "trainer.ckpt_path": ("trainer.run_path", lambda config: f"{_run_path(config)}/checkpoints"),
    "trainer.export_path": ("trainer.run_path", lambda config: f"{_run_path(config)}/export"),
    "trainer.max_tokens_per_micro_batch": ("generator.max_input_length", _micro_batch_tokens),
    "generator.random_seed": ("trainer.seed", lambda config: config.trainer.seed),
    "generator.lora.enabled": (
        "trainer.policy.model.lora.rank",
        lambda config: (
            bool(config.generator.lora.paths)
            or (config.trainer.policy.model.lora.rank > 0 and _serves_adapters(config))
        ),
    ),
}
"""key -> (the key it follows, value)."""


def implied_values(config: Config) -> dict[str, tuple[Any, Source]]:
    """What each key with a rule follows to, whether it is null or not: path -> (value, where it comes from)."""
    backend = config.generator.backend
    implied = {
        path: (rule(config), Source(kind="derived", where=follows))
        for path, (follows, rule) in DERIVED_DEFAULTS.items()
    }
    for path, rules in BACKEND_DEFAULTS.items():
        if backend in rules:
            implied[path] = (rules[backend](config), Source(kind="backend", where=backend))
    return implied


def fill_defaults(config: Config) -> dict[str, tuple[Any, Source]]:
    """The values for the keys that are null (or auto) and have a rule."""
    return {
        path: found
        for path, found in implied_values(config).items()
        if read(config, path) in (None, "auto") and found[0] is not None
    }


def _run_path(config: Config) -> str:
    return config.trainer.run_path or f"runs/{config.trainer.run_name}"
