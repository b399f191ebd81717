"""From a configuration to what learns: models, objective, experience, and the engine over them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from skyrl_train.algorithms.advantages import ADVANTAGE_ESTIMATORS
from skyrl_train.algorithms.kl import KL_ESTIMATORS
from skyrl_train.algorithms.kl_control import KlController, KlTarget
from skyrl_train.algorithms.objective import PolicyObjective
from skyrl_train.algorithms.policy_losses import POLICY_LOSSES
from skyrl_train.algorithms.reductions import LOSS_REDUCTIONS
from skyrl_train.algorithms.registry import bind, flat_options, resolve
from skyrl_train.algorithms.selections import SELECTIONS
from skyrl_train.config.placement import needs_critic, needs_reference
from skyrl_train.config.schema import Config
from skyrl_train.config.schema_algorithm import Algorithm
from skyrl_train.config.schema_engine import Scheduling
from skyrl_train.config.schema_server import HierarchicalCache
from skyrl_train.config.schema_trainer import Lora as LoraKeys
from skyrl_train.config.schema_trainer import PolicyOptimizer
from skyrl_train.config.schema_trainer import Trainer as TrainerKeys
from skyrl_train.engines.base import Engine
from skyrl_train.engines.embedded.config import EmbeddedConfig
from skyrl_train.engines.embedded.drafts.eagle.head import Eagle3Head
from skyrl_train.engines.embedded.engine import EmbeddedEngine
from skyrl_train.entrypoints.build_adapters import adapter_limits, serve_trained_adapter, serves_policy_as_adapter
from skyrl_train.entrypoints.build_async import own_weights
from skyrl_train.entrypoints.build_off_policy import corrections, mismatch_watch, respect_logprob_space, watch_engine
from skyrl_train.entrypoints.build_rollouts import sampling_params
from skyrl_train.entrypoints.build_servers import build_servers
from skyrl_train.entrypoints.build_speculation import draft_source, head_trainer
from skyrl_train.errors import ConfigError
from skyrl_train.rollout.overlong import SoftPunishment
from skyrl_train.rollout.selection import DynamicSampling, Selection
from skyrl_train.training.critic import CriticTrainer, ValueNetwork
from skyrl_train.training.experience import ExperienceMaker, KlInReward
from skyrl_train.training.learner import Learner, WeightsFor
from skyrl_train.training.lora import Adapters, LoraSettings
from skyrl_train.training.mismatch import EngineView
from skyrl_train.training.model import check_same_tokens, load_model
from skyrl_train.training.optimizer import OptimizerSettings
from skyrl_train.training.trainer import PolicyTrainer

logger = logging.getLogger(__name__)

DEFAULT_PREEMPTION_THRESHOLD = 10
"""SGLang's."""

HOST_CACHE_RATIO = 2.0
"""Where no size is named, as in SGLang."""


def device_of(config: Config) -> str:
    """Where policy and embedded engine run."""
    return "cuda" if config.trainer.placement.policy_num_gpus_per_node else "cpu"


def build_learner(config: Config, model_folder: Path, *, total_steps: int) -> Learner:
    """Policy, reference model if a KL wants one, critic if the estimator wants one, optimizers and objective."""
    keys, algorithm = config.trainer, config.trainer.algorithm
    dtype = getattr(torch, keys.policy.model.dtype or "float32")
    device = device_of(config)
    model = load_model(model_folder, dtype=dtype, device=device)
    adapters = _adapters(keys.policy.model.lora, "policy", model, keys, base_path=model_folder)
    reference: PreTrainedModel | Literal["start"] | None = None
    reference_folder = _folder(keys.ref.model.path, config, model_folder)
    if needs_reference(config) and adapters is not None and reference_folder == model_folder:
        reference = "start"
    elif needs_reference(config):
        check_same_tokens(reference_folder, model_folder)
        reference = load_model(reference_folder, dtype=dtype, device=device)
    mini_batch_size = keys.policy_mini_batch_size or keys.train_batch_size
    trainer = PolicyTrainer(
        model,
        optimizer_settings(config, keys.policy.optimizer_config, mini_batch_size, total_steps),
        reference=reference,
        adapters=adapters,
        offload_reference=keys.ref.offload_after_forward and device != "cpu",
        temperature=config.generator.sampling_params.temperature,
        gradient_checkpointing=keys.gradient_checkpointing,
        on_policy_target=_is_embedded_target(config),
    )
    kl_controller = _kl_controller(algorithm)
    return Learner(
        trainer=trainer,
        loss_fn=_objective(config, kl_controller),
        mini_batch_size=mini_batch_size,
        num_epochs=keys.update_epochs_per_batch,
        max_tokens_per_micro_batch=keys.max_tokens_per_micro_batch,
        micro_batch_size=keys.micro_train_batch_size_per_gpu,
        reference_in_loss=algorithm.use_kl_loss,
        kl_controller=kl_controller if needs_reference(config) else None,
        watch=mismatch_watch(algorithm),
        weights_for=weights_for(config),
        critic=_critic(config, model_folder, total_steps=total_steps) if needs_critic(config) else None,
        critic_mini_batch_size=keys.critic_mini_batch_size,
        draft_head=head_trainer(config, model),
        draft_head_steps=config.generator.speculative_decoding.head_train_steps,
    )


def _is_embedded_target(config: Config) -> bool:
    """Whether the trainer computes as the engine in this process does; a server is told to compute as trainers do."""
    generator = config.generator
    return generator.backend == "embedded" and generator.deterministic_inference.rl_on_policy_target is not None


def weights_for(config: Config) -> WeightsFor:
    """The form in which the engine takes new weights: the adapter where one is trained and served."""
    as_adapter = serves_policy_as_adapter(config)
    if config.generator.backend == "embedded":
        if as_adapter:
            return "frozen_base"
        return "copy" if config.trainer.fully_async.enabled else "module"
    return "adapter" if as_adapter else "server"


def _critic(config: Config, model_folder: Path, *, total_steps: int) -> CriticTrainer:
    keys = config.trainer
    dtype = getattr(torch, keys.policy.model.dtype or "float32")
    folder = _folder(keys.critic.model.path, config, model_folder)
    check_same_tokens(folder, model_folder, role="critic")
    mini_batch_size = keys.critic_mini_batch_size or keys.policy_mini_batch_size or keys.train_batch_size
    network = ValueNetwork(load_model(folder, dtype=dtype, device=device_of(config)))
    return CriticTrainer(
        network,
        optimizer_settings(config, keys.critic.optimizer_config, mini_batch_size, total_steps),
        adapters=_adapters(keys.critic.model.lora, "critic", network.body, keys, base_path=folder),
        value_clip=keys.algorithm.value_clip,
        gradient_checkpointing=keys.gradient_checkpointing,
    )


def _adapters(
    lora: LoraKeys, role: str, model: PreTrainedModel, keys: TrainerKeys, *, base_path: Path
) -> Adapters | None:
    if not lora.rank:
        return None
    settings = LoraSettings(seed=keys.seed, **lora.model_dump())
    try:
        return Adapters(model, settings, base_path=str(base_path))
    except ConfigError as exc:
        raise ConfigError(f"trainer.{role}.model.{exc}") from exc


def _folder(path: str | None, config: Config, policy_folder: Path) -> Path:
    """Of the reference or the critic; a model made here has its folder in the cache."""
    return policy_folder if path in {None, config.trainer.policy.model.path} else Path(str(path))


def optimizer_settings(
    config: Config, keys: PolicyOptimizer, mini_batch_size: int, total_steps: int
) -> OptimizerSettings:
    """An optimizer's settings; a schedule ends with the run."""
    trainer = config.trainer
    updates = trainer.update_epochs_per_batch * -(-trainer.train_batch_size // mini_batch_size)
    num_updates = total_steps * updates
    return OptimizerSettings(
        lr=keys.lr,
        adam_betas=keys.adam_betas,
        weight_decay=keys.weight_decay,
        max_grad_norm=keys.max_grad_norm,
        scheduler=keys.scheduler,
        # A run that is cut short warms up over half of it at most.
        num_warmup_steps=min(keys.num_warmup_steps, num_updates // 2),
        num_steps=num_updates,
        offload_after_step=keys.offload_after_step and device_of(config) != "cpu",
    )


def _kl_controller(algorithm: Algorithm) -> KlController:
    keys = algorithm.kl_ctrl
    target = KlTarget(kl=keys.kl_target, horizon=keys.horizon) if keys.type == "adaptive" else None
    return KlController(algorithm.kl_loss_coef, target)


def _objective(config: Config, kl_controller: KlController) -> PolicyObjective:
    algorithm = config.trainer.algorithm
    options = {
        **flat_options(algorithm.model_dump()),
        "max_seq_len": config.generator.sampling_params.max_generate_length,
    }
    select = SELECTIONS.get(algorithm.policy_loss_type)
    return PolicyObjective(
        policy_loss=bind(resolve("policy loss", POLICY_LOSSES, algorithm.policy_loss_type), options),
        reduction=bind(resolve("loss reduction", LOSS_REDUCTIONS, algorithm.loss_reduction), options),
        kl=resolve("KL estimator", KL_ESTIMATORS, algorithm.kl_estimator_type) if algorithm.use_kl_loss else None,
        kl_loss_coef=kl_controller if algorithm.use_kl_loss else 0.0,
        entropy_loss_coef=algorithm.entropy,
        select=None if select is None else bind(select, options),
        corrections=corrections(algorithm),
    )


def build_selection(config: Config) -> Selection:
    """Which rollouts a step learns from."""
    keys, algorithm = config.trainer, config.trainer.algorithm
    dynamic, overlong = algorithm.dynamic_sampling, algorithm.overlong
    longest = config.generator.sampling_params.max_generate_length
    return Selection(
        batch_size=keys.train_batch_size,
        dynamic_sampling=DynamicSampling(
            type=dynamic.type, max_batches=dynamic.max_sample_batches, min_replace_ratio=dynamic.min_replace_ratio
        )
        if dynamic.type is not None
        else None,
        zero_variance_filter=algorithm.zero_variance_filter,
        punishment=SoftPunishment(
            max_tokens=longest, cache_tokens=overlong.cache_tokens or max(longest // 5, 1), penalty=overlong.penalty
        )
        if overlong.soft_punishment
        else None,
        seed=keys.seed,
    )


def build_experience(config: Config, learner: Learner) -> ExperienceMaker:
    """Scored groups -> training samples, by the configured estimator."""
    algorithm = config.trainer.algorithm
    estimator = resolve("advantage estimator", ADVANTAGE_ESTIMATORS, algorithm.advantage_estimator)
    return ExperienceMaker(
        estimator=bind(estimator, algorithm.model_dump()),
        trainer=learner.trainer,
        critic=learner.critic,
        kl=_kl_in_reward(algorithm, learner) if algorithm.use_kl_in_reward else None,
        step_wise=config.generator.step_wise_trajectories,
        normalize=algorithm.advantage_batch_normalize,
        skip_truncated=algorithm.overlong.filter,
        max_tokens_per_micro_batch=learner.max_tokens_per_micro_batch,
        micro_batch_size=learner.micro_batch_size,
    )


def _kl_in_reward(algorithm: Algorithm, learner: Learner) -> KlInReward:
    assert learner.kl_controller is not None
    estimator = resolve("KL estimator", KL_ESTIMATORS, algorithm.kl_estimator_type)
    return KlInReward(estimator=estimator, coefficient=learner.kl_controller)


def build_engine(
    config: Config, learner: Learner, tokenizer: Any, *, model_folder: Path, by_user: Callable[[str], bool]
) -> Engine:
    """The configured engine, at the trainer's version. `by_user` tells which keys the user set."""
    sampling = sampling_params(config.generator.sampling_params)
    engine: Engine
    module: torch.nn.Module | None
    version: Callable[[], int]
    make_module = None
    if config.generator.backend == "embedded":
        engine = embedded = _embedded(config, learner, tokenizer)
        version, module = lambda: embedded.core.policy_version, embedded.core.model
        if serves_policy_as_adapter(config):
            module, make_module = None, serve_trained_adapter(embedded, learner)
    else:
        # Its tensors are in another process, and it serves what the trainer exported last.
        version, module = lambda: learner.trainer.version, None
        engine = build_servers(config, learner, tokenizer, model_folder=model_folder, by_user=by_user)
        if "seed" not in engine.info.capabilities and sampling.temperature > 0:
            logger.warning(
                "engine %s draws its own random numbers: this run can't be repeated to the bit", engine.info.name
            )
    respect_logprob_space(config.trainer.algorithm, engine.info, sampling)
    space = engine.info.logprob_space
    view = EngineView(logprob_space=space, sampling=sampling, version=version, module=module, make_module=make_module)
    watch_engine(learner.watch, view)
    return engine


def _embedded(config: Config, learner: Learner, tokenizer: Any) -> EmbeddedEngine:
    """Over the trainer's very module, or a copy where both work at once.

    With adapters over what of it is frozen; merged, it has matrices of its own.
    """
    model = learner.trainer.frozen_base() if serves_policy_as_adapter(config) else learner.trainer.engine_model
    is_trained = model is learner.trainer.model
    return engine_over(
        own_weights(model) if config.trainer.fully_async.enabled and is_trained else model,
        config,
        tokenizer,
        policy_version=learner.trainer.version,
        head=None if learner.draft_head is None else learner.draft_head.head,
    )


def _scheduling(keys: Scheduling) -> dict[str, Any]:
    """The embedded engine's part. Without enable_priority higher numbers come first too, and nobody is preempted."""
    threshold = DEFAULT_PREEMPTION_THRESHOLD if keys.preemption_threshold is None else keys.preemption_threshold
    preempts = keys.enable_priority and not keys.disable_preemption
    return {
        "scheduling_policy": keys.policy or "fcfs",
        "preemption_threshold": threshold if preempts else None,
        "low_priority_values_first": keys.enable_priority and keys.low_priority_values_first,
    }


def _host_cache(keys: HierarchicalCache) -> dict[str, Any]:
    """Of EmbeddedConfig."""
    if not keys.enabled:
        return {}
    if keys.size_gb:
        return {"host_cache_gb": float(keys.size_gb)}
    return {"host_cache_ratio": keys.ratio or HOST_CACHE_RATIO}


def engine_over(
    model: PreTrainedModel,
    config: Config,
    tokenizer: Any,
    *,
    policy_version: int = 0,
    head: Eagle3Head | None = None,
) -> EmbeddedEngine:
    """The embedded engine over this very module, and the `head` that is trained in this run to draft for it."""
    keys = config.generator
    optional: dict[str, Any] = {
        "max_num_seqs": keys.max_num_seqs,
        "max_num_batched_tokens": keys.max_num_batched_tokens,
        **keys.engine_init_kwargs,
    }
    return EmbeddedEngine(
        model,
        tokenizer,
        config=EmbeddedConfig(
            max_context_len=keys.max_model_len,
            kv_cache_frac=keys.gpu_memory_utilization or 0.3,
            enable_prefix_caching=keys.enable_prefix_caching,
            **_host_cache(keys.hierarchical_cache),
            **_scheduling(keys.scheduling),
            grammar_backend="none" if keys.structured_output.grammar_backend == "none" else "xgrammar",
            json_whitespace=not keys.structured_output.disable_any_whitespace,
            logit_processors=keys.custom_logit_processor.enabled,
            lora=adapter_limits(config),
            deterministic=keys.deterministic_inference.enabled,
            seed=keys.random_seed if keys.random_seed is not None else config.trainer.seed,
            **{name: value for name, value in optional.items() if value is not None},
        ),
        policy_version=policy_version,
        drafts=draft_source(model, config, head),
    )
