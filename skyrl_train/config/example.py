"""examples/sglang/sglang_full_config_example.yaml: every SGLang option with its meaning, made from the schema.

`python -m skyrl_train.config.tables` writes it; the values that are not defaults stand here.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

from skyrl_train.config.base import default_of
from skyrl_train.config.defaults import BACKEND_DEFAULTS, DERIVED_DEFAULTS
from skyrl_train.config.keys import schema_groups, schema_keys
from skyrl_train.engines.sglang.args import ARGUMENTS

WIDTH = 110

HEADER = """\
# Every SGLang option, documented in place. Start from a copy and delete what you leave alone:
#
#   cp examples/sglang/sglang_full_config_example.yaml my_config.yaml
#   python -m skyrl_train.entrypoints.main_base --config-path . --config-name my_config --explain
#
# The file is laid over the defaults, so it may be partial. "-> name" is the argument of SGLang's server that a
# key writes; "null: x" is what SGLang does when the key is null. Setting an option that the installed release
# lacks is an error that names its replacement. As it stands: Qwen2.5-1.5B-Instruct on GSM8K, on one GPU.
# Written by `python -m skyrl_train.config.tables` from the schema: change descriptions there.
"""

VALUES: dict[str, Any] = {
    "trainer.placement.policy_num_gpus_per_node": 1,
    "trainer.policy.model.path": "Qwen/Qwen2.5-1.5B-Instruct",
    "trainer.policy.optimizer_config.lr": 1.0e-6,
    "trainer.policy.optimizer_config.num_warmup_steps": 10,
    "trainer.gradient_checkpointing": True,
    "trainer.epochs": 20,
    "trainer.train_batch_size": 128,
    "trainer.policy_mini_batch_size": 64,
    "trainer.max_tokens_per_micro_batch": 16384,
    "trainer.eval_interval": 10,
    "trainer.ckpt_interval": 10,
    "trainer.run_name": "sglang-full-example",
    "generator.backend": "sglang",
    "generator.num_inference_engines": 1,
    "generator.gpu_memory_utilization": 0.6,
    "generator.n_samples_per_prompt": 8,
    "generator.max_input_length": 512,
    "generator.sampling_params.max_generate_length": 1024,
    "generator.eval_sampling_params.max_generate_length": 1024,
    "generator.metrics.enabled": True,
    "data.train_data": ["data/gsm8k/train.parquet"],
    "data.val_data": ["data/gsm8k/test.parquet"],
    "environment.env_class": "gsm8k",
}

TRAINER = (
    "placement",
    "policy.model.path",
    "policy.optimizer_config.lr",
    "policy.optimizer_config.num_warmup_steps",
    "algorithm.advantage_estimator",
    "algorithm.policy_loss_type",
    "algorithm.eps_clip_low",
    "algorithm.eps_clip_high",
    "algorithm.use_kl_loss",
    "gradient_checkpointing",
    "seed",
    "epochs",
    "train_batch_size",
    "policy_mini_batch_size",
    "max_tokens_per_micro_batch",
    "eval_interval",
    "ckpt_interval",
    "logger",
    "run_name",
)
"""What a first run sets; docs/CONFIGURATION.md has the rest of trainer."""

DATA = ("data.train_data", "data.val_data", "data.prompt_key", "data.target_key", "data.on_bad_row")


def full_example() -> str:
    """The text of the file."""
    paths = [path for path in schema_keys() if _belongs(path)]
    return HEADER + "\n".join(_lines(paths)).rstrip() + "\n"


def _belongs(path: str) -> bool:
    if path.startswith("generator."):
        return True
    if path.startswith("trainer."):
        inside = path.removeprefix("trainer.")
        return any(inside == name or inside.startswith(f"{name}.") for name in TRAINER)
    return path in DATA or path in ("environment.env_class", "environment.max_failed_frac")


def _lines(paths: list[str]) -> Iterator[str]:
    open_groups: list[str] = []
    for path in paths:
        *parents, name = path.split(".")
        shared = 0
        while shared < min(len(parents), len(open_groups)) and parents[shared] == open_groups[shared]:
            shared += 1
        if shared < len(open_groups) and shared == len(parents) and shared < 2:
            yield ""
        for depth in range(shared, len(parents)):
            if depth < 2:
                yield ""
            indent = "  " * depth
            group = schema_groups()[".".join(parents[: depth + 1])]
            yield from _comment((group.__doc__ or "").strip().splitlines()[0], indent)
            yield f"{indent}{parents[depth]}:"
        open_groups = parents
        indent = "  " * len(parents)
        yield from _comment(schema_keys()[path].description or "", indent)
        for line in _writes(path):
            yield from _comment(line, indent)
        yield f"{indent}{name}: {_value(VALUES.get(path, default_of(path)))}"


def _writes(path: str) -> Iterator[str]:
    """One line for each server argument that the key writes."""
    ours = "sglang" in BACKEND_DEFAULTS.get(path, {}) or path in DERIVED_DEFAULTS
    for row in ARGUMENTS:
        if row.key != path:
            continue
        notes = []
        if row.default and default_of(path) is None and not ours:
            notes.append(f"null: {row.default}")
        if row.since:
            notes.append(f"since {row.since}")
        if row.until:
            instead = row.instead or ""
            notes.append(f"gone since {row.until}" + (f": {_advice(instead)}" if instead else ""))
        yield "; ".join([f"-> {row.field}", *notes])


def _advice(instead: str) -> str:
    return f"use {instead}" if instead.startswith("generator.") else instead


def _comment(text: str, indent: str) -> Iterator[str]:
    yield from textwrap.wrap(text, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")


def _value(value: Any) -> str:
    """One line of YAML that reads back as the same value."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, float):
        return f"{value:.1e}" if value and abs(value) < 1e-3 else str(value)
    return str(value)
