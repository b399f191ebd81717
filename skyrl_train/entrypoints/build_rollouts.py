"""From a configuration to what rolls out: tokenizer, checked data, environments, the agent."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from skyrl_train.config.schema import Config
from skyrl_train.config.schema_generator import SamplingParams as SamplingKeys
from skyrl_train.data.chat import render_prompt
from skyrl_train.data.rows import PromptRow, read_rows
from skyrl_train.engines.base import Engine, GenerateFn
from skyrl_train.environments.arithmetic import Split, arithmetic_rows
from skyrl_train.environments.base import EnvironmentFactory, find_environment
from skyrl_train.environments.calculator import calculator_rows
from skyrl_train.environments.reward_function import reward_function
from skyrl_train.errors import ConfigError
from skyrl_train.observability.tracing import with_request_spans
from skyrl_train.rollout.agent import Agent
from skyrl_train.rollout.environment_pool import DEFAULT_WORKERS, EnvironmentPool
from skyrl_train.rollout.own_agent import own_agent
from skyrl_train.rollout.sessions import Sessions
from skyrl_train.types import LogitProcessor, SamplingParams

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Data:
    """Checked rows of both splits; all of them fit the configured prompt length."""

    train: list[PromptRow]
    held_out: list[PromptRow]
    environments: dict[str, EnvironmentFactory]
    pool: EnvironmentPool | None
    """Where environments run that may block; None: on the event loop."""


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
    reward = config.environment.reward
    scorer = None if reward is None else reward_function(reward, target_key=config.data.target_key)
    settings = config.environment.env_config
    for name in settings.keys() - set(names):
        logger.warning("environment.env_config.%s is read by nobody: no row has environment %s", name, name)
    environments = {name: scorer or find_environment(name, settings.get(name)) for name in names}
    return Data(train=train, held_out=held_out, environments=environments, pool=_pool(config, environments))


def _pool(config: Config, environments: Mapping[str, EnvironmentFactory]) -> EnvironmentPool | None:
    keys = config.environment
    threaded = [name for name, factory in environments.items() if not getattr(factory, "runs_inline", False)]
    if not threaded or keys.num_workers == 0:
        return None
    if config.trainer.fully_async.enabled and config.trainer.fully_async.deterministic:
        logger.warning(
            "trainer.fully_async.deterministic: environment %s runs in threads, whose order is the clock's; for runs "
            "that are equal to the bit set environment.num_workers=0, or runs_inline = True on a class that only "
            "computes",
            ", ".join(threaded),
        )
    return EnvironmentPool(num_workers=keys.num_workers or DEFAULT_WORKERS, step_timeout_s=keys.step_timeout_s)


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
    if environment.env_class == "calculator":
        products = environment.calculator
        return calculator_rows(split, products.num_train_prompts if split == "train" else products.num_eval_prompts)
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


def build_sessions(config: Config, engine: Engine) -> Sessions | None:
    """The run's sessions, over which trajectories ask for tokens; None where they are off."""
    keys = config.generator.sessions
    if not keys.enabled:
        return None
    return Sessions(engine, capacity=keys.default_capacity, max_idle=keys.max_pool_size if keys.pool_sessions else 0)


def build_agent(
    config: Config,
    generate: GenerateFn,
    tokenizer: Any,
    data: Data,
    *,
    engine: Engine,
    sessions: Sessions | None = None,
) -> Agent:
    """What runs the trajectories: ours, or the user's own with those of these arguments that it names.

    `generate` is where tokens are asked for: of `engine`, by way of `sessions` if there are any.
    """
    arguments: dict[str, Any] = {
        "generate": with_request_spans(generate),
        "tokenizer": tokenizer,
        "environments": data.environments,
        "environment_config": config.environment,
        "chat_template_kwargs": config.generator.chat_template_kwargs,
        "max_turns": config.generator.max_turns,
        "max_input_length": config.generator.max_input_length,
        "use_conversation_multi_turn": config.generator.use_conversation_multi_turn,
        "chat_history": config.generator.chat_history,
        "pool": data.pool,
        "sessions": sessions,
        "later_turns_first": config.generator.scheduling.enable_priority and "priority" in engine.info.capabilities,
    }
    if config.generator.agent is None:
        agent = Agent(**arguments)
        if agent.max_turns > 1:
            agent.chat.check()
        return agent
    return own_agent(config.generator.agent, arguments)


def sampling_params(keys: SamplingKeys) -> SamplingParams:
    """The configuration's sampling group as the engine takes it."""
    values = keys.model_dump()
    path, arguments = values.pop("logit_processor"), values.pop("logit_processor_kwargs")
    return SamplingParams(
        max_new_tokens=values.pop("max_generate_length"),
        logit_processor=None if path is None else LogitProcessor(path=path, arguments=arguments),
        **values,
    )
