"""The engines of a run that are servers, and how they share GPUs with the trainer."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from skyrl_train.config.model_shape import find_model_folder
from skyrl_train.config.placement import take_turns
from skyrl_train.config.schema import Config
from skyrl_train.engines.base import Engine
from skyrl_train.engines.build import Places, build_server_engine
from skyrl_train.entrypoints.build_rollouts import sampling_params
from skyrl_train.errors import ConfigError
from skyrl_train.training.learner import Learner
from skyrl_train.training.trainer import PolicyTrainer
from skyrl_train.weight_sync.sync import Turns


def server_places(config: Config, model_folder: Path) -> Places:
    """Logs and weights lie in the run's folder. A model that is in the Hugging Face cache is known by its folder there:
    updates are checked against its files.
    """
    run = Path(config.trainer.run_path or ".")
    folder = find_model_folder(str(model_folder)) or model_folder
    return Places(model=folder, logs=run / "engines", weights=run / "engines")


def build_servers(
    config: Config, learner: Learner, tokenizer: Any, *, model_folder: Path, by_user: Callable[[str], bool]
) -> Engine:
    """Described and checked, not started; called where no event loop runs yet. Raises ConfigError."""
    return asyncio.run(describe_servers(config, tokenizer, learner.trainer, model_folder=model_folder, by_user=by_user))


async def describe_servers(
    config: Config,
    tokenizer: Any,
    trainer: PolicyTrainer | None = None,
    *,
    model_folder: Path,
    by_user: Callable[[str], bool],
) -> Engine:
    """`trainer` None: the servers keep the weights of `model_folder`."""

    async def score(token_ids: Sequence[int]) -> tuple[float, ...]:
        assert trainer is not None
        return trainer.score(token_ids)

    return await build_server_engine(
        config,
        server_places(config, model_folder),
        device=None if trainer is None else trainer.model.device,
        policy_version=0 if trainer is None else trainer.version,
        reference=None if trainer is None else score,
        tokenizer=tokenizer,
        samplings={
            "generator.sampling_params": sampling_params(config.generator.sampling_params),
            "generator.eval_sampling_params": sampling_params(config.generator.eval_sampling_params),
        },
        by_user=by_user,
    )


def build_turns(config: Config, engine: Engine) -> Turns | None:
    """None where each has memory of its own. Raises ConfigError for an engine that can't give its memory back."""
    if config.generator.backend == "embedded":
        sleeps = config.generator.engine_init_kwargs.get("sleeps_in_training")
        return Turns(releases=("kv_cache", "weights"), make_room=_make_room) if sleeps else None
    if not take_turns(config):
        return None
    if "sleep" not in engine.info.capabilities:
        raise ConfigError(
            f"engine {engine.info.name} can't sleep, and trainer.placement.colocate_all=true puts it on the trainer's "
            "GPUs; give it GPUs of its own with trainer.placement.colocate_all=false"
        )
    whole = not config.trainer.policy.model.lora.rank
    return Turns(releases=("kv_cache", "weights") if whole else ("kv_cache",), make_room=_make_room)


def _make_room() -> None:
    gc.collect()
    torch.cuda.empty_cache()
