"""From a configuration to a built `Job`: the one place that knows both the key tree and the parts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

from skyrl_train.algorithms.advantages import ADVANTAGE_ESTIMATORS
from skyrl_train.algorithms.kl import KL_ESTIMATORS
from skyrl_train.algorithms.objective import PolicyObjective
from skyrl_train.algorithms.policy_losses import POLICY_LOSSES
from skyrl_train.algorithms.reductions import LOSS_REDUCTIONS
from skyrl_train.algorithms.registry import bind, resolve
from skyrl_train.config.schema import Config
from skyrl_train.config.schema_generator import SamplingParams as SamplingKeys
from skyrl_train.data.chat import render_prompt
from skyrl_train.data.rows import PromptRow, read_rows
from skyrl_train.engines.embedded.config import EmbeddedConfig
from skyrl_train.engines.embedded.engine import EmbeddedEngine
from skyrl_train.environments.arithmetic import Split, arithmetic_rows
from skyrl_train.environments.base import EnvironmentFactory, find_environment
from skyrl_train.errors import ConfigError
from skyrl_train.rollout.agent import Agent
from skyrl_train.training.experience import ExperienceMaker
from skyrl_train.training.learner import Learner
from skyrl_train.training.model import load_model
from skyrl_train.training.optimizer import OptimizerSettings
from skyrl_train.training.trainer import PolicyTrainer
from skyrl_train.types import SamplingParams

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Data:
    """Checked rows of both splits; all of them fit the configured prompt length."""

    train: list[PromptRow]
    held_out: list[PromptRow]
    environments: dict[str, EnvironmentFactory]


def load_tokenizer(model_folder: Path) -> Any:
    """The model's tokenizer. Raises ConfigError when it has no chat template."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder, local_files_only=True)
    if not tokenizer.chat_template:
        raise ConfigError(f"the tokenizer in {model_folder} has no chat template; an instruction-tuned model has one")
    return tokenizer


def load_data(config: Config, tokenizer: Any) -> Data:
    """Rows from the configured files, or made by the built-in task."""
    train = _rows(config, config.data.train_data, "train")
    held_out = _rows(config, config.data.val_data, "eval")
    limit = config.generator.max_input_length
    train, held_out = (
        _within(limit, rows, tokenizer, config.generator.chat_template_kwargs, split)
        for rows, split in ((train, "training"), (held_out, "held-out"))
    )
    if not train:
        raise ConfigError(f"no training prompt is within generator.max_input_length={limit} tokens")
    names = sorted({row.environment for row in (*train, *held_out)})
    return Data(train=train, held_out=held_out, environments={name: find_environment(name) for name in names})


def _rows(config: Config, files: Sequence[str], split: Split) -> list[PromptRow]:
    environment = config.environment
    if files:
        return read_rows(
            files,
            environment=environment.env_class,
            prompt_key=config.data.prompt_key,
            target_key=config.data.target_key,
            on_bad_row=config.data.on_bad_row,
        )
    if environment.env_class == "arithmetic":
        sizes = environment.arithmetic
        count = sizes.num_train_prompts if split == "train" else sizes.num_eval_prompts
        return arithmetic_rows(split, count)
    if split == "train":
        raise ConfigError(
            f"environment.env_class={environment.env_class} has no data of its own: set data.train_data to your files"
        )
    return []


def _within(
    limit: int, rows: list[PromptRow], tokenizer: Any, template_kwargs: dict[str, Any], split: str
) -> list[PromptRow]:
    fits = [
        row for row in rows if len(render_prompt(tokenizer, row.messages, template_kwargs=template_kwargs)) <= limit
    ]
    if len(fits) < len(rows):
        logger.warning(
            "%d of %d %s prompts are longer than generator.max_input_length=%d tokens and are left out",
            len(rows) - len(fits),
            len(rows),
            split,
            limit,
        )
    return fits


def device_of(config: Config) -> str:
    """Where policy and embedded engine run."""
    return "cuda" if config.trainer.placement.policy_num_gpus_per_node else "cpu"


def build_learner(config: Config, model_folder: Path, *, total_steps: int) -> Learner:
    """Policy, reference model if a KL wants one, optimizer and objective."""
    keys, algorithm = config.trainer, config.trainer.algorithm
    dtype = getattr(torch, keys.policy.model.dtype or "float32")
    device = device_of(config)
    model = load_model(model_folder, dtype=dtype, device=device)
    reference: PreTrainedModel | None = None
    if algorithm.use_kl_loss:
        same = keys.ref.model.path in {None, keys.policy.model.path}
        reference = load_model(model_folder if same else str(keys.ref.model.path), dtype=dtype, device=device)
    mini_batch_size = keys.policy_mini_batch_size or keys.train_batch_size
    updates = keys.update_epochs_per_batch * -(-keys.train_batch_size // mini_batch_size)
    optimizer = keys.policy.optimizer_config
    num_updates = total_steps * updates
    trainer = PolicyTrainer(
        model,
        OptimizerSettings(
            lr=optimizer.lr,
            adam_betas=optimizer.adam_betas,
            weight_decay=optimizer.weight_decay,
            max_grad_norm=optimizer.max_grad_norm,
            scheduler=optimizer.scheduler,
            # A run that is cut short warms up over half of it at most.
            num_warmup_steps=min(optimizer.num_warmup_steps, num_updates // 2),
            num_steps=num_updates,
        ),
        reference=reference,
        temperature=config.generator.sampling_params.temperature,
        gradient_checkpointing=keys.gradient_checkpointing,
    )
    return Learner(
        trainer=trainer,
        loss_fn=_objective(config),
        mini_batch_size=mini_batch_size,
        num_epochs=keys.update_epochs_per_batch,
        max_tokens_per_micro_batch=keys.max_tokens_per_micro_batch,
        micro_batch_size=keys.micro_train_batch_size_per_gpu,
    )


def _objective(config: Config) -> PolicyObjective:
    algorithm = config.trainer.algorithm
    options = {**algorithm.model_dump(), "max_seq_len": config.generator.sampling_params.max_generate_length}
    return PolicyObjective(
        policy_loss=bind(resolve("policy loss", POLICY_LOSSES, algorithm.policy_loss_type), options),
        reduction=bind(resolve("loss reduction", LOSS_REDUCTIONS, algorithm.loss_reduction), options),
        kl=resolve("KL estimator", KL_ESTIMATORS, algorithm.kl_estimator_type) if algorithm.use_kl_loss else None,
        kl_loss_coef=algorithm.kl_loss_coef if algorithm.use_kl_loss else 0.0,
        entropy_loss_coef=algorithm.entropy,
    )


def build_experience(config: Config, learner: Learner) -> ExperienceMaker:
    """Scored groups -> training samples, by the configured estimator."""
    algorithm = config.trainer.algorithm
    estimator = resolve("advantage estimator", ADVANTAGE_ESTIMATORS, algorithm.advantage_estimator)
    return ExperienceMaker(
        estimator=bind(estimator, algorithm.model_dump()),
        trainer=learner.trainer,
        normalize=algorithm.advantage_batch_normalize,
        max_tokens_per_micro_batch=learner.max_tokens_per_micro_batch,
        micro_batch_size=learner.micro_batch_size,
    )


def build_engine(config: Config, learner: Learner, tokenizer: Any) -> EmbeddedEngine:
    """The embedded engine over the trainer's own module, at the trainer's version."""
    keys = config.generator
    optional: dict[str, Any] = {
        "max_num_seqs": keys.max_num_seqs,
        "max_num_batched_tokens": keys.max_num_batched_tokens,
        **keys.engine_init_kwargs,
    }
    return EmbeddedEngine(
        learner.trainer.model,
        tokenizer,
        config=EmbeddedConfig(
            max_context_len=keys.max_model_len,
            kv_cache_frac=keys.gpu_memory_utilization or 0.3,
            enable_prefix_caching=keys.enable_prefix_caching,
            seed=keys.random_seed if keys.random_seed is not None else config.trainer.seed,
            **{name: value for name, value in optional.items() if value is not None},
        ),
        policy_version=learner.trainer.version,
    )


def build_agent(config: Config, engine: EmbeddedEngine, tokenizer: Any, data: Data) -> Agent:
    """What runs the trajectories."""
    return Agent(
        generate=engine.generate,
        tokenizer=tokenizer,
        environments=data.environments,
        environment_config=config.environment,
        chat_template_kwargs=config.generator.chat_template_kwargs,
    )


def sampling_params(keys: SamplingKeys) -> SamplingParams:
    """The configuration's sampling group as the engine takes it."""
    values = keys.model_dump()
    return SamplingParams(max_new_tokens=values.pop("max_generate_length"), **values)
