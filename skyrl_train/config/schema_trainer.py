"""trainer: where the policy runs, how it is optimized, when it is saved."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from skyrl_train.config.fields import Fraction, Group, NonNegative, Positive, Strings, _as_tuple
from skyrl_train.config.schema_algorithm import Algorithm, FullyAsync

Betas = Annotated[tuple[Fraction, Fraction], BeforeValidator(_as_tuple)]


class Placement(Group):
    """GPUs of each role. Nothing here is guessed: 0 GPUs a node means the CPU."""

    colocate_all: bool = Field(
        True,
        description="Trainer and engines share the same GPUs and take turns on the memory; false gives the "
        "engines GPUs of their own.",
    )
    colocate_policy_ref: bool = Field(True, description="Policy and reference model share their GPUs.")
    policy_num_nodes: Positive = Field(1, description="Machines that train the policy.")
    policy_num_gpus_per_node: NonNegative = Field(0, description="GPUs of each of them; 0 trains on the CPU.")
    critic_num_nodes: Positive = Field(1, description="Machines that train the critic.")
    critic_num_gpus_per_node: NonNegative | None = Field(
        None, description="GPUs of each of them; null is as many as the policy has."
    )
    ref_num_nodes: Positive = Field(1, description="Machines that hold the reference model.")
    ref_num_gpus_per_node: NonNegative | None = Field(
        None, description="GPUs of each of them; null is as many as the policy has."
    )


class Lora(Group):
    """Low-rank adapters instead of full weights, through peft; rank 0 is off."""

    rank: NonNegative = Field(0, description="Rank of the adapters; 0 trains all weights.")
    alpha: float = Field(16.0, gt=0, description="Adapters are scaled by alpha / rank.")
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Dropout on the adapters' input, in gradient passes; rollouts, old and reference "
        "log-probabilities have none.",
    )
    target_modules: str | Strings = Field(
        "all-linear",
        description="Modules that get an adapter: names of linear maps, or all-linear for each of them but the head.",
    )
    exclude_modules: Strings = Field((), description="Modules that get none.")
    init_method: Literal["kaiming", "gaussian", "orthogonal", "pissa"] = Field(
        "kaiming",
        description="How the adapters start: at no change with kaiming, gaussian and orthogonal; from the weights' "
        "principal part with pissa, whose checkpoints keep the rest of the adapted weights too.",
    )

    @property
    def served_rank(self) -> int:
        """Of the adapter that makes the untouched model the policy: pissa's also takes its start back."""
        return 2 * self.rank if self.init_method == "pissa" else self.rank


class PolicyModel(Group):
    """The model that is trained."""

    path: str = Field(
        "builtin:arithmetic",
        min_length=1,
        description="A folder in Hugging Face format, or a tiny model made on this machine: builtin:arithmetic, or "
        "builtin:calculator, which knows the form of a tool call.",
    )
    dtype: Literal["float32", "bfloat16"] | None = Field(
        None, description="Type of the weights in the trainer; null is float32 on a CPU and bfloat16 on a GPU."
    )
    lora: Lora


class RefModel(Group):
    """The model that the KL is measured against."""

    path: str | None = Field(None, min_length=1, description="Its folder; null is the policy as it was at the start.")


class CriticModel(Group):
    """The model that predicts returns."""

    path: str | None = Field(None, min_length=1, description="Its folder; null starts from the policy's weights.")
    lora: Lora


class PolicyOptimizer(Group):
    """AdamW with gradient clipping, warm-up and a schedule."""

    lr: float = Field(gt=0, description="Peak learning rate.")
    adam_betas: Betas = Field((0.9, 0.999), description="Decay rates of AdamW's two averages.")
    weight_decay: float = Field(ge=0, description="Decoupled weight decay.")
    max_grad_norm: float = Field(1.0, gt=0, description="The gradient's norm is clipped to this.")
    num_warmup_steps: NonNegative = Field(
        description="Optimizer steps over which the rate rises from 0; half of a run at most."
    )
    scheduler: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="What the rate does after the warm-up, up to the last step."
    )
    offload_after_step: bool = Field(
        False, description="Keep the optimizer's state in host memory between steps; for a GPU."
    )


class CriticOptimizer(PolicyOptimizer):
    """As the policy's, for the critic."""

    lr: float = Field(5.0e-6, gt=0, description="Peak learning rate.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay.")
    num_warmup_steps: NonNegative = Field(0, description="Optimizer steps over which the rate rises from 0.")


class Policy(Group):
    """The policy: its model and its optimizer."""

    model: PolicyModel
    optimizer_config: PolicyOptimizer


class Ref(Group):
    """The reference model; used only with a KL term."""

    model: RefModel
    offload_after_forward: bool = Field(
        False, description="Keep the reference in host memory between its forward passes; for a GPU."
    )


class Critic(Group):
    """The critic; used only with advantage_estimator gae."""

    model: CriticModel
    optimizer_config: CriticOptimizer


class FsdpConfig(Group):
    """How FSDP2 shards the trainer's models over GPUs."""

    cpu_offload: bool = Field(False, description="Keep sharded weights in host memory between uses.")
    reshard_after_forward: bool = Field(True, description="Free the gathered weights between forward and backward.")
    fsdp_size: int = Field(-1, ge=-1, description="GPUs that share one copy; -1 is all of them.")


class Trainer(Group):
    """Training: models, batches, schedule, evaluation, checkpoints."""

    placement: Placement
    strategy: str = Field("fsdp2", description="How the trainer spreads over GPUs; fsdp2 is the only one.")
    policy: Policy
    ref: Ref
    critic: Critic
    fsdp_config: FsdpConfig
    sequence_parallel_size: Positive = Field(1, description="GPUs that share one long sequence.")
    algorithm: Algorithm
    fully_async: FullyAsync
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass: less memory, about a third more time."
    )
    seed: NonNegative = Field(42, description="Fixes data order, sampling and initial weights.")
    epochs: Positive = Field(description="Passes over the training data.")
    max_steps: Positive | None = Field(None, description="Stop after this many steps, whatever epochs says.")
    train_batch_size: Positive = Field(description="Prompts of one step; each is sampled n_samples_per_prompt times.")
    policy_mini_batch_size: Positive | None = Field(
        None,
        description="Prompts of one optimizer step; must divide train_batch_size. null is the whole "
        "train_batch_size: one strictly on-policy update a step; half of it for a built-in model.",
    )
    critic_mini_batch_size: Positive | None = Field(
        None, description="As policy_mini_batch_size, for the critic; null is the policy's."
    )
    micro_train_batch_size_per_gpu: Positive | None = Field(
        None, description="Samples of one forward and backward; null leaves it to max_tokens_per_micro_batch."
    )
    micro_forward_batch_size_per_gpu: Positive | None = Field(
        None, description="Samples of one forward without gradient; null leaves it to max_tokens_per_micro_batch."
    )
    max_tokens_per_micro_batch: Positive | None = Field(
        None,
        description="Packed tokens of one forward and backward; bounds memory, does not change the gradient. null"
        " is 8192, or one sample where that is longer, unless a micro batch size in samples is set.",
    )
    update_epochs_per_batch: Positive = Field(1, description="Passes over one batch of rollouts.")
    eval_interval: int = Field(ge=-1, description="Steps between evaluations; -1 never evaluates.")
    eval_before_train: bool = Field(True, description="Evaluate before the first step.")
    eval_batch_size: Positive | None = Field(None, description="Held-out prompts in flight at once; null is all.")
    resume_mode: Literal["none", "latest", "from_path"] = Field(
        "latest",
        description="none starts anew; latest goes on from the newest whole checkpoint, if there is one; from_path "
        "goes on from resume_path, or from where the same command was cut short.",
    )
    resume_path: str | None = Field(
        None,
        description="What resume_mode from_path goes on from: a checkpoint's folder, or a folder of checkpoints, which "
        "is its newest whole one.",
    )
    run_name: str = Field("quickstart", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Names the run's folder.")
    project_name: str = Field("skyrl_train", min_length=1, description="The project's name at trackers.")
    run_path: str | None = Field(None, description="The run's folder; null is runs/<run_name>.")
    ckpt_path: str | None = Field(None, description="Where checkpoints go; null is <run_path>/checkpoints.")
    ckpt_interval: int = Field(ge=-1, description="Steps between checkpoints; -1 saves only the last.")
    max_ckpts_to_keep: int = Field(2, ge=-1, description="Older checkpoints are deleted; -1 keeps all.")
    export_path: str | None = Field(
        None, description="Where the model is exported in Hugging Face format; null is <run_path>/export."
    )
    hf_save_interval: int = Field(-1, ge=-1, description="Steps between exports; -1 exports only the last.")
    rollout_log_interval: Positive = Field(
        10, description="Steps between those whose rollouts are kept on disk; the first and the last always are."
    )
    logger: Strings = Field(
        ("console", "jsonl", "tensorboard"), description="Trackers: console, jsonl, tensorboard, wandb, mlflow."
    )
