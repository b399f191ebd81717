"""Rules of trainer, data and sampling."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from skyrl_train.config.check_environment import ENVIRONMENT_RULES, TASKS, generated_prompts
from skyrl_train.config.findings import Checked, Finding, Rule, error, warning
from skyrl_train.config.keys import schema_keys
from skyrl_train.config.placement import needs_critic, needs_reference, take_turns
from skyrl_train.config.schema_trainer import PolicyOptimizer

ESTIMATORS = ("grpo", "gae", "rloo", "reinforce++", "reinforce++_baseline", "remax")
POLICY_LOSSES = ("regular", "dual_clip", "gspo", "cispo", "sapo", "clip_cov", "kl_cov", "importance_sampling")
TRACKERS = ("console", "jsonl", "tensorboard", "wandb", "mlflow")


def strategy(checked: Checked) -> Iterator[Finding]:
    if checked.config.trainer.strategy != "fsdp2":
        yield error(
            f"{checked.show('trainer.strategy')}: only fsdp2. The trainer runs transformers' own modules, which FSDP2 "
            "shards in place, so that engines get weights under the model's own names; other strategies hold them "
            "in another layout"
        )


def names(checked: Checked) -> Iterator[Finding]:
    algorithm = checked.config.trainer.algorithm
    for path, value, known in (
        ("trainer.algorithm.advantage_estimator", algorithm.advantage_estimator, ESTIMATORS),
        ("trainer.algorithm.policy_loss_type", algorithm.policy_loss_type, POLICY_LOSSES),
    ):
        if value not in known and "." not in value and ":" not in value:
            yield error(_unknown_name(checked, path, value, known, ", or the dotted path of a function of your own"))
    for name in checked.config.trainer.logger:
        if name not in TRACKERS:
            yield error(_unknown_name(checked, "trainer.logger", name, TRACKERS, ""))


def _unknown_name(checked: Checked, path: str, name: str, known: tuple[str, ...], more: str) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}{more}"
    return f"{path}: unknown name {name!r} ({checked.sources[path]}); {hint}"


def batch_sizes(checked: Checked) -> Iterator[Finding]:
    config = checked.config
    trainer = config.trainer
    samples = config.generator.n_samples_per_prompt
    mini = trainer.policy_mini_batch_size or trainer.train_batch_size
    if trainer.train_batch_size % mini:
        yield error(
            f"trainer.policy_mini_batch_size={mini} does not divide trainer.train_batch_size="
            f"{trainer.train_batch_size}: {trainer.train_batch_size % mini} prompts of each step would be left over"
        )
    ranks = trainer.placement.policy_num_nodes * max(trainer.placement.policy_num_gpus_per_node, 1)
    if ranks % trainer.sequence_parallel_size:
        yield error(
            f"{checked.show('trainer.sequence_parallel_size')} does not divide the policy's {ranks} GPUs "
            f"({trainer.placement.policy_num_nodes} nodes x {trainer.placement.policy_num_gpus_per_node})"
        )
        return
    fsdp_size = trainer.fsdp_config.fsdp_size
    if fsdp_size != -1 and (fsdp_size == 0 or ranks % fsdp_size):
        yield error(f"{checked.show('trainer.fsdp_config.fsdp_size')} does not divide the policy's {ranks} GPUs")
    copies = ranks // trainer.sequence_parallel_size
    if mini * samples % copies:
        yield error(
            f"{mini} prompts x {samples} samples (trainer.policy_mini_batch_size x generator.n_samples_per_prompt) = "
            f"{mini * samples} samples of an optimizer step do not divide over {copies} data-parallel ranks"
        )
        return
    micro = trainer.micro_train_batch_size_per_gpu
    if micro is not None and (mini * samples // copies) % micro:
        yield error(
            f"{checked.show('trainer.micro_train_batch_size_per_gpu')} does not divide the {mini * samples // copies} "
            f"samples that a rank has in an optimizer step ({mini} prompts x {samples} samples / {copies} ranks)"
        )


def micro_batches(checked: Checked) -> Iterator[Finding]:
    config = checked.config
    trainer, generator = config.trainer, config.generator
    tokens, samples = "trainer.max_tokens_per_micro_batch", "trainer.micro_train_batch_size_per_gpu"
    if trainer.max_tokens_per_micro_batch is not None and trainer.micro_train_batch_size_per_gpu is not None:
        yield error(f"{checked.show(tokens)} and {checked.show(samples)} both cut micro-batches; keep one of them")
    longest = generator.max_input_length + generator.sampling_params.max_generate_length
    if trainer.max_tokens_per_micro_batch is not None and trainer.max_tokens_per_micro_batch < longest:
        yield error(
            f"{checked.show(tokens)} can't hold one sample: generator.max_input_length={generator.max_input_length} + "
            f"generator.sampling_params.max_generate_length={generator.sampling_params.max_generate_length} = {longest}"
        )


def kl(checked: Checked) -> Iterator[Finding]:
    algorithm = checked.config.trainer.algorithm
    if algorithm.use_kl_loss and algorithm.use_kl_in_reward:
        yield error(
            f"{checked.show('trainer.algorithm.use_kl_loss')} and "
            f"{checked.show('trainer.algorithm.use_kl_in_reward')}: the KL would count twice; keep one of them"
        )
    targets = ("trainer.algorithm.kl_ctrl.kl_target", "trainer.algorithm.kl_ctrl.horizon")
    if needs_reference(checked.config):
        adaptive = algorithm.kl_ctrl.type == "adaptive"
        for path in () if adaptive else targets:
            if checked.is_set(path):
                yield warning(f"{checked.show(path)} has no effect: trainer.algorithm.kl_ctrl.type is fixed")
        if algorithm.kl_loss_coef == 0 and adaptive:
            yield error("trainer.algorithm.kl_loss_coef=0 can't be steered: the adaptive controller multiplies it")
        elif algorithm.kl_loss_coef == 0:
            yield warning("trainer.algorithm.kl_loss_coef=0: the reference model is run, and its KL weighs nothing")
        return
    for path in (
        "trainer.algorithm.kl_loss_coef",
        "trainer.algorithm.kl_estimator_type",
        "trainer.ref.model.path",
        "trainer.ref.offload_after_forward",
        "trainer.algorithm.kl_ctrl.type",
        *targets,
    ):
        if checked.is_set(path):
            yield warning(
                f"{checked.show(path)} has no effect: neither trainer.algorithm.use_kl_loss nor use_kl_in_reward is on"
            )


def critic(checked: Checked) -> Iterator[Finding]:
    trainer, placement = checked.config.trainer, checked.config.trainer.placement
    if not needs_critic(checked.config):
        keys = [path for path in schema_keys() if path.startswith(("trainer.critic.", "trainer.placement.critic_"))]
        keys += ["trainer.critic_mini_batch_size", "trainer.algorithm.value_clip"]
        if trainer.algorithm.advantage_estimator in ESTIMATORS:  # a function of one's own may read these
            keys += ["trainer.algorithm.lambd"]
            keys += ["trainer.algorithm.gamma"] if trainer.algorithm.advantage_estimator != "reinforce++" else []
        for path in keys:
            if checked.is_set(path):
                yield warning(
                    f"{checked.show(path)} has no effect: it is read with trainer.algorithm.advantage_estimator=gae, "
                    f"found {trainer.algorithm.advantage_estimator}"
                )
        return
    mini = trainer.critic_mini_batch_size
    if mini is not None and trainer.train_batch_size % mini:
        yield error(
            f"{checked.show('trainer.critic_mini_batch_size')} does not divide trainer.train_batch_size="
            f"{trainer.train_batch_size}: {trainer.train_batch_size % mini} prompts of each step would be left over"
        )
    policy = placement.policy_num_nodes, placement.policy_num_gpus_per_node
    for path, wanted in zip(
        ("trainer.placement.critic_num_nodes", "trainer.placement.critic_num_gpus_per_node"), policy, strict=True
    ):
        if checked.is_set(path) and checked.value(path) != wanted:
            yield error(
                f"{checked.show(path)}: the critic runs where the policy does, on {policy[0]} x {policy[1]} GPUs "
                "(policy_num_nodes x policy_num_gpus_per_node); leave it out"
            )


def offload(checked: Checked) -> Iterator[Finding]:
    if checked.config.trainer.placement.policy_num_gpus_per_node:
        return
    for path in (
        "trainer.ref.offload_after_forward",
        "trainer.policy.optimizer_config.offload_after_step",
        "trainer.critic.optimizer_config.offload_after_step",
    ):
        if checked.is_set(path):
            yield warning(f"{checked.show(path)} has no effect: the trainer is on the CPU, in host memory already")


def groups(checked: Checked) -> Iterator[Finding]:
    config = checked.config
    count = config.generator.n_samples_per_prompt
    estimator = config.trainer.algorithm.advantage_estimator
    if count == 1 and estimator in ("grpo", "rloo", "reinforce++_baseline"):
        message = (
            f"{checked.show('generator.n_samples_per_prompt')}: advantage_estimator {estimator} compares the samples "
            "of one prompt, and a group of one has advantage 0: nothing would be learned"
        )
        if config.generator.agent is None:
            yield error(f"{message}; set 2 or more")
        else:
            yield warning(f"{message}, unless generator.agent brings branches of its own, as tree search does")


def sampling(checked: Checked) -> Iterator[Finding]:
    generator = checked.config.generator
    for name, params in (
        ("sampling_params", generator.sampling_params),
        ("eval_sampling_params", generator.eval_sampling_params),
    ):
        if params.min_new_tokens > params.max_generate_length:
            yield error(
                f"generator.{name}.min_new_tokens={params.min_new_tokens} is over "
                f"generator.{name}.max_generate_length={params.max_generate_length}"
            )
        if any(not text for text in params.stop):
            yield error(f"generator.{name}.stop holds an empty text, which would end every answer at once")
    params = generator.sampling_params
    if params.temperature == 0:
        yield error(
            f"{checked.show('generator.sampling_params.temperature')} is greedy: all samples of a prompt would be "
            "equal and their advantages 0; training wants 1.0"
        )
    if generator.eval_n_samples_per_prompt > 1 and generator.eval_sampling_params.temperature == 0:
        yield warning(
            f"generator.eval_n_samples_per_prompt={generator.eval_n_samples_per_prompt} with "
            "generator.eval_sampling_params.temperature=0 makes the same answer each time"
        )
    off_policy = [
        f"generator.sampling_params.{name}={getattr(params, name)}"
        for name, off in (
            ("top_p", 1.0),
            ("top_k", 0),
            ("min_p", 0.0),
            ("repetition_penalty", 1.0),
            ("presence_penalty", 0.0),
            ("frequency_penalty", 0.0),
            ("logit_processor", None),
        )
        if getattr(params, name) != off
    ]
    if off_policy and not checked.config.trainer.algorithm.use_tis:
        yield warning(
            f"{', '.join(off_policy)}: rollouts are then drawn from another distribution than the model's, and the "
            "policy gradient is biased; leave them off while training"
        )


def resuming(checked: Checked) -> Iterator[Finding]:
    trainer = checked.config.trainer
    if trainer.resume_mode == "from_path" and trainer.resume_path is None:
        yield error("trainer.resume_mode=from_path needs trainer.resume_path: the checkpoint to go on from")
    if trainer.resume_mode != "from_path" and trainer.resume_path is not None:
        yield error(
            f"{checked.show('trainer.resume_path')} is read with trainer.resume_mode=from_path only, found "
            f"{trainer.resume_mode}"
        )


def asynchronous(checked: Checked) -> Iterator[Finding]:
    keys = checked.config.trainer.fully_async
    if keys.enabled:
        trainer = checked.config.trainer
        if take_turns(checked.config):
            yield error(
                f"{checked.show('trainer.fully_async.enabled')} generates while it trains, and "
                f"{checked.show('trainer.placement.colocate_all')} makes them take turns on one GPU; set "
                "trainer.placement.colocate_all=false"
            )
        if (
            trainer.policy.model.lora.dropout
            and trainer.policy.model.lora.rank
            and trainer.placement.policy_num_gpus_per_node
        ):
            yield error(
                f"{checked.show('trainer.policy.model.lora.dropout')} with trainer.fully_async.enabled=true on a GPU: "
                "the trainer would draw random numbers while the engine captures a graph, which CUDA forbids; set one "
                "of them to its default"
            )
        if keys.num_parallel_generation_workers < checked.config.generator.n_samples_per_prompt:
            yield warning(
                f"{checked.show('trainer.fully_async.num_parallel_generation_workers')} is less than one group "
                f"(generator.n_samples_per_prompt={checked.config.generator.n_samples_per_prompt}): its samples can't "
                "share the work on their prompt"
            )
        return
    for name in ("max_staleness_steps", "num_parallel_generation_workers", "deterministic"):
        path = f"trainer.fully_async.{name}"
        if checked.is_set(path):
            yield warning(f"{checked.show(path)} has no effect: trainer.fully_async.enabled is false")


def data(checked: Checked) -> Iterator[Finding]:
    config = checked.config
    task, num_train_prompts = config.environment.env_class, generated_prompts(config)
    if num_train_prompts is not None and num_train_prompts < config.trainer.train_batch_size:
        yield error(
            f"environment.{task}.num_train_prompts={num_train_prompts} is less than "
            f"trainer.train_batch_size={config.trainer.train_batch_size}: not one whole step"
        )
    for name in TASKS:
        for path in (f"environment.{name}.num_train_prompts", f"environment.{name}.num_eval_prompts"):
            if task != name and checked.is_set(path):
                yield warning(f"{checked.show(path)} is read with environment.env_class={name} only")
    if task in TASKS:
        return
    if not config.data.train_data:
        yield error(
            f"data.train_data is empty, and environment.env_class={config.environment.env_class} has no data of its "
            "own; name jsonl, json or parquet files, or a datasets folder"
        )
    if not config.data.val_data and config.trainer.eval_interval > 0:
        yield warning(f"data.val_data is empty: trainer.eval_interval={config.trainer.eval_interval} evaluates nothing")


def reward(checked: Checked) -> Iterator[Finding]:
    """A reward function stands in for the environment of every row; `arithmetic` also names the built-in rows."""
    environment = checked.config.environment
    if environment.reward is not None and environment.env_class != "arithmetic":
        yield error(
            f"{checked.show('environment.reward')} and {checked.show('environment.env_class')}: both score the "
            "answers; keep one of them"
        )


def schedule(checked: Checked) -> Iterator[Finding]:
    """Where the number of steps is known before the data is read."""
    config = checked.config
    trainer = config.trainer
    num_train_prompts = generated_prompts(config)
    if num_train_prompts is None and trainer.max_steps is None:
        return
    steps = trainer.max_steps or trainer.epochs * ((num_train_prompts or 0) // trainer.train_batch_size)
    mini = trainer.policy_mini_batch_size or trainer.train_batch_size
    optimizers: list[tuple[str, PolicyOptimizer, int]] = [("policy", trainer.policy.optimizer_config, mini)]
    if needs_critic(config):
        optimizers.append(("critic", trainer.critic.optimizer_config, trainer.critic_mini_batch_size or mini))
    for role, optimizer, mini_batch_size in optimizers:
        updates = steps * trainer.update_epochs_per_batch * -(-trainer.train_batch_size // mini_batch_size)
        # The quickstart's own warm-up is cut to half of a short run (build.py); one that somebody chose is not touched.
        path = f"trainer.{role}.optimizer_config.num_warmup_steps"
        chosen = checked.sources[path].kind != "base.yaml"
        if chosen and optimizer.scheduler != "constant" and optimizer.num_warmup_steps >= updates:
            yield error(
                f"{path}={optimizer.num_warmup_steps} leaves nothing for scheduler {optimizer.scheduler}: the run has "
                f"{updates} optimizer steps"
            )


TRAINING_RULES: tuple[Rule, ...] = (
    strategy,
    names,
    batch_sizes,
    micro_batches,
    kl,
    critic,
    offload,
    groups,
    sampling,
    resuming,
    asynchronous,
    data,
    reward,
    schedule,
    *ENVIRONMENT_RULES,
)
