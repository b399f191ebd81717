"""The plan of a run: which GPUs, how much memory, which server commands. Rough on purpose, and says from what."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from skyrl_train.config.machine import Machine
from skyrl_train.config.model_shape import BUILTIN_PREFIX, BYTES_PER_NUMBER, ModelShape, read_model_shape
from skyrl_train.config.placement import GpuCount, count_gpus, gpus_per_engine, needs_critic, needs_reference
from skyrl_train.config.schema import Config
from skyrl_train.engines.server.environment import engine_python
from skyrl_train.engines.sglang.command import command_line as sglang_command
from skyrl_train.engines.sglang.command import own_folders, server_arguments
from skyrl_train.engines.vllm.args import command_line as vllm_command

ADAM_BYTES = 8
MASTER_BYTES = 4
GRADIENT_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Plan:
    """`memory` is bytes on each GPU (or on the host, for a CPU run) by purpose; empty when the model is not here."""

    gpus: GpuCount
    gpus_per_engine: int
    num_engines: int
    memory: Mapping[str, int]
    memory_total: int | None
    kv_cache_tokens: int | None
    model: str
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "gpus": {
                "policy": self.gpus.policy,
                "reference": self.gpus.ref,
                "critic": self.gpus.critic,
                "engines": self.gpus.engines,
                "total": self.gpus.total,
                "colocated": self.gpus.colocated,
            },
            "num_engines": self.num_engines,
            "gpus_per_engine": self.gpus_per_engine,
            "model": self.model,
            "memory_bytes": dict(self.memory),
            "memory_available_bytes": self.memory_total,
            "kv_cache_tokens": self.kv_cache_tokens,
            "notes": list(self.notes),
        }


def make_plan(config: Config, machine: Machine) -> Plan:
    """What the run will take. Starts nothing; reads the model's config.json if it is on disk."""
    count = count_gpus(config)
    path = config.trainer.policy.model.path
    shape = read_model_shape(path)
    on_gpu = count.total > 0
    available = machine.gpus[0].memory_bytes if on_gpu and machine.gpus else None if on_gpu else machine.memory_bytes
    memory: dict[str, int] = {}
    tokens: int | None = None
    notes = []
    if shape is not None:
        memory, tokens = _memory(config, shape, count, available)
    elif path.startswith(BUILTIN_PREFIX):
        notes.append(f"{path} is made at the start and takes a few MiB")
    else:
        notes.append(f"{path} is not on this disk: its memory can't be told")
    if shape is not None and on_gpu and available is None:
        notes.append("no GPU here to size the KV cache by")
    if available is not None and (planned := sum(memory.values())) > available:
        place = "each GPU" if on_gpu else "the host"
        notes.append(f"more than there is: {_size(planned)} planned, {_size(available)} on {place}")
    return Plan(
        gpus=count,
        gpus_per_engine=gpus_per_engine(config) if config.generator.backend != "embedded" else count.engines,
        num_engines=config.generator.num_inference_engines,
        memory=memory,
        memory_total=available,
        kv_cache_tokens=tokens,
        model=f"{path}{_shape_text(shape)}",
        notes=tuple(notes),
    )


def engine_commands(config: Config, *, release: str) -> list[list[str]]:
    """The command of each engine that this run starts; none for the embedded engine and for remote ones."""
    generator = config.generator
    if generator.backend == "embedded" or not generator.run_engines_locally:
        return []
    python = engine_python(generator.engine_python)
    commands = []
    for index in range(generator.num_inference_engines):
        if generator.backend == "vllm":
            commands.append(vllm_command(config, python=python))
            continue
        commands.append(sglang_command(engine_arguments(config, index, release=release), python=python))
    return commands


def engine_arguments(config: Config, index: int, *, release: str) -> dict[str, Any]:
    """SGLang's ServerArgs of engine `index`, as it is started and as --explain shows it."""
    arguments = server_arguments(config, release=release)
    if config.generator.num_inference_engines > 1:
        arguments = own_folders(arguments, f"sglang-{index}")
    per_engine = gpus_per_engine(config)
    if config.trainer.placement.policy_num_gpus_per_node and per_engine:
        arguments["base_gpu_id"] = _first_gpu(config, index * per_engine)
    return arguments


def plan_lines(plan: Plan) -> list[str]:
    """The plan as text."""
    lines = [f"model        {plan.model}"]
    if plan.gpus.total:
        lines.append(f"GPUs         {plan.gpus.total}: {plan.gpus}")
    else:
        lines.append("GPUs         none: the run is on the CPU")
    if plan.memory:
        place = "each GPU" if plan.gpus.total else "the host"
        parts = ", ".join(f"{purpose} {_size(number)}" for purpose, number in plan.memory.items())
        lines.append(f"memory       on {place}, roughly: {parts}; together {_size(sum(plan.memory.values()))}")
    if plan.memory_total is not None:
        lines.append(f"available    {_size(plan.memory_total)} on {'each GPU' if plan.gpus.total else 'the host'}")
    if plan.kv_cache_tokens is not None:
        lines.append(f"KV cache     room for about {plan.kv_cache_tokens:,} tokens in each engine")
    return [*lines, *(f"note         {note}" for note in plan.notes)]


def shell(command: list[str]) -> str:
    """One command, as it can be pasted."""
    return shlex.join(command)


def _memory(
    config: Config, shape: ModelShape, count: GpuCount, available: int | None
) -> tuple[dict[str, int], int | None]:
    """Bytes by purpose on one device, and the tokens that the KV cache holds."""
    trainer, generator = config.trainer, config.generator
    parameters = shape.num_parameters
    number = BYTES_PER_NUMBER[trainer.policy.model.dtype or "float32"]
    shards = max(count.policy, 1)
    # Low-precision weights get a float32 twin that AdamW steps on; gradients are summed in float32.
    master = MASTER_BYTES if number < MASTER_BYTES else 0
    lora, critic_lora = trainer.policy.model.lora, trainer.critic.model.lora
    trained, trained_master = (shape.num_adapter_parameters(lora.rank), 0) if lora.rank else (parameters, master)
    memory = {
        "weights": parameters * number // shards,
        "gradients": trained * GRADIENT_BYTES // shards,
        "optimizer": trained * (ADAM_BYTES + trained_master) // shards,
    }
    if lora.rank:  # in float32 whatever the weights are in
        memory["adapters"] = trained * MASTER_BYTES // shards
        if generator.backend == "embedded" and not generator.lora.enabled:
            memory["merged weights"] = shape.num_linear_parameters * number
    own_reference = not lora.rank or trainer.ref.model.path not in (None, trainer.policy.model.path)
    if needs_reference(config) and (trainer.placement.colocate_policy_ref or trainer.placement.colocate_all):
        memory["reference"] = parameters * number // shards if own_reference else 0
    if needs_critic(config) and trainer.critic.model.path in (None, trainer.policy.model.path):
        adapters = shape.num_adapter_parameters(critic_lora.rank)
        state = adapters * (MASTER_BYTES + GRADIENT_BYTES + ADAM_BYTES)
        if not critic_lora.rank:
            state = parameters * (GRADIENT_BYTES + ADAM_BYTES + master)
        memory["critic"] = (parameters * number + state) // shards
    per_token = shape.kv_bytes_per_token(BYTES_PER_NUMBER[generator.model_dtype or "float32"])
    fraction = generator.gpu_memory_utilization or 0.0
    wanted = (generator.max_num_seqs or 0) * (generator.max_model_len or 0)
    if generator.backend == "embedded":
        free = (available or 0) - sum(memory.values())
        tokens = generator.engine_init_kwargs.get("kv_cache_tokens") or min(
            wanted, max(int(free * fraction), 0) // per_token
        )
        memory["KV cache"] = tokens * per_token
        return memory, tokens
    size = max(gpus_per_engine(config), 1)
    engine_number = BYTES_PER_NUMBER[generator.model_dtype or "bfloat16"]
    engine_weights = parameters * engine_number // size
    if not (trainer.placement.colocate_all and count.total):
        return memory, None
    memory["engine weights"] = engine_weights
    if available is None:
        return memory, None
    cache = max(int(available * fraction) - engine_weights, 0)
    memory["KV cache"] = cache
    return memory, cache * size // per_token


def engine_gpus(config: Config, index: int) -> range:
    """The GPUs of engine `index`, by their number among those that this process sees; none on a CPU."""
    per_engine = gpus_per_engine(config)
    if not config.trainer.placement.policy_num_gpus_per_node or not per_engine:
        return range(0)
    first = _first_gpu(config, index * per_engine)
    return range(first, first + per_engine)


def _first_gpu(config: Config, offset: int) -> int:
    """Engines beside the trainer come after its GPUs; colocated ones start at the first."""
    if config.trainer.placement.colocate_all:
        return offset
    count = count_gpus(config)
    return count.total - count.engines + offset


def _shape_text(shape: ModelShape | None) -> str:
    if shape is None:
        return ""
    return (
        f": {shape.architecture}, {shape.num_parameters / 1e9:.3g} G parameters, {shape.num_layers} layers, "
        f"{shape.num_heads} heads, {shape.num_kv_heads} key/value heads of {shape.head_dim}"
    )


def _size(number: int) -> str:
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"
