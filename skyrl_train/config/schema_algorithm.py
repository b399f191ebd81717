"""trainer.algorithm: how rewards become gradients."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from skyrl_train.config.fields import Fraction, Group, NonNegative, Positive


class KlCtrl(Group):
    """The controller of the KL coefficient."""

    type: Literal["fixed", "adaptive"] = Field(
        "fixed", description="fixed keeps the coefficient; adaptive moves it towards kl_target (PPO, section 4)."
    )
    kl_target: float = Field(0.1, gt=0, description="KL per token that the adaptive controller aims at.")
    horizon: Positive = Field(10_000, description="Samples over which the adaptive controller reacts.")


class DynamicSampling(Group):
    """Drawing prompts again when a group teaches nothing (DAPO)."""

    type: Literal["filter", "replace"] | None = Field(
        None,
        description="filter samples further batches until enough groups have mixed rewards, and drops what is beyond "
        "the batch; replace fills up with copies of good groups; null is off.",
    )
    max_sample_batches: Positive = Field(
        30, description="Batches that may be drawn for one step; when they are not enough, the run ends in an error."
    )
    min_replace_ratio: Fraction = Field(
        0.3, description="Fraction of a batch that must be good groups for replace; it draws on until it is."
    )


class Overlong(Group):
    """Answers that reach their length limit (DAPO, section 3.4)."""

    filter: bool = Field(
        False,
        description="Leave truncated answers out of the loss; they still count in their group's baseline.",
    )
    soft_punishment: bool = Field(
        False, description="Take up to penalty off the reward of an answer that comes near its length limit."
    )
    cache_tokens: Positive | None = Field(
        None,
        description="The punishment grows over this many tokens before max_generate_length; null is a fifth of it.",
    )
    penalty: float = Field(1.0, gt=0, description="What an answer of full length loses.")


class Sapo(Group):
    """Soft gate of policy_loss_type sapo."""

    tau_pos: float = Field(1.0, gt=0, description="Temperature of the gate for positive advantages.")
    tau_neg: float = Field(1.05, gt=0, description="Temperature of the gate for negative advantages.")


class Cispo(Group):
    """Clipped importance weights of policy_loss_type cispo."""

    cispo_eps_clip_low: float = Field(
        1.0, ge=0, description="The weight's lower bound is 1 - this; 1 and more are no lower bound, and so is 0."
    )
    cispo_eps_clip_high: float = Field(5.0, ge=0, description="The weight's upper bound is 1 + this.")


class ClipCov(Group):
    """Covariance clipping of policy_loss_type clip_cov."""

    clip_ratio: Fraction = Field(
        0.0002, description="Fraction of a mini-batch's tokens whose gradient is dropped; one token at least."
    )
    clip_cov_lb: float = Field(1.0, description="Least covariance of a token that may be dropped.")
    clip_cov_ub: float = Field(5.0, description="Greatest covariance of a token that may be dropped.")


class KlCov(Group):
    """Covariance-selected KL penalty of policy_loss_type kl_cov."""

    kl_cov_frac: Fraction = Field(
        0.2, description="Fraction of a mini-batch's tokens, by covariance, that get the penalty; one token at least."
    )
    ppo_kl_coef: float = Field(1.0, ge=0, description="Weight of that penalty.")


class OffPolicy(Group):
    """Samples whose probability at the engine is not the trainer's: ratio = trainer / engine, before the update."""

    sequence_mask: Literal["geometric", "product"] | None = Field(
        None,
        description="Give a whole sample weight 0 when its ratio is outside the bounds: geometric is the geometric "
        "mean over its tokens, product their product, the sample's true ratio; null is off.",
    )
    sequence_mask_low: float = Field(0.5, ge=0, lt=1, description="Least ratio of a sample that is trained on.")
    sequence_mask_high: float = Field(2.0, gt=1, description="Greatest ratio of a sample that is trained on.")
    token_veto_below: float | None = Field(
        None, gt=0, lt=1, description="One token with a ratio below this gives its sample weight 0; null is off."
    )
    max_logprob_diff: float | None = Field(
        None,
        gt=0,
        description="The run stops, with a diagnosis, when a token's log-probabilities at engine and trainer differ "
        "by more than this; null is off.",
    )


class Algorithm(Group):
    """How rewards become advantages, and advantages a loss."""

    advantage_estimator: str = Field(
        "grpo",
        description="grpo, gae, rloo, reinforce++, reinforce++_baseline or remax; or a dotted path to a function of "
        "your own.",
    )
    policy_loss_type: str = Field(
        "regular",
        description="regular (PPO clip), dual_clip, gspo, cispo, sapo, clip_cov, kl_cov or importance_sampling; or a "
        "dotted path to a function of your own.",
    )
    loss_reduction: Literal["token_mean", "sequence_mean", "seq_mean_token_sum_norm"] = Field(
        "token_mean",
        description="token_mean: every token of the mini-batch weighs the same; sequence_mean: every sample does; "
        "seq_mean_token_sum_norm: sums over tokens, divided by the maximal length (Dr. GRPO).",
    )
    grpo_norm_by_std: bool = Field(
        True, description="Divide a group's centred rewards by their standard deviation; false is Dr. GRPO's advantage."
    )
    eps_clip_low: float = Field(0.2, ge=0, le=1, description="The probability ratio is clipped below at 1 - this.")
    eps_clip_high: float = Field(0.2, ge=0, description="The probability ratio is clipped above at 1 + this.")
    clip_ratio_c: float = Field(3.0, gt=1, description="Second clip of dual_clip, for negative advantages.")
    use_kl_loss: bool = Field(False, description="Add the KL to the reference model to the loss.")
    use_kl_in_reward: bool = Field(False, description="Subtract the KL to the reference model from the reward.")
    kl_loss_coef: float = Field(0.001, ge=0, description="Weight of the KL, in the loss or in the reward.")
    kl_estimator_type: Literal["k1", "k2", "k3", "abs"] = Field(
        "k3", description="How the KL is estimated from log-probabilities (Schulman 2020); k3 is never negative."
    )
    kl_ctrl: KlCtrl
    entropy: float = Field(0.0, ge=0, description="Weight of the entropy bonus in the loss; 0 is off.")
    gamma: Fraction = Field(1.0, description="Discount per token (gae, reinforce++).")
    lambd: Fraction = Field(1.0, description="Lambda of gae.")
    value_clip: float = Field(0.2, gt=0, description="The critic's prediction moves at most this much per update.")
    advantage_batch_normalize: bool = Field(
        False, description="Shift and scale advantages over the whole batch to mean 0 and deviation 1."
    )
    zero_variance_filter: bool = Field(
        False,
        description="Leave groups whose rewards are all equal out of the batch: compared within the group they have "
        "advantage 0, and take part in the loss's mean all the same.",
    )
    dynamic_sampling: DynamicSampling
    overlong: Overlong
    use_tis: bool = Field(False, description="Weigh tokens by the truncated ratio of trainer to engine probability.")
    tis_imp_ratio_cap: float = Field(2.0, gt=0, description="Where that ratio is truncated.")
    off_policy: OffPolicy
    sapo: Sapo
    cispo: Cispo
    clip_cov: ClipCov
    kl_cov: KlCov


class FullyAsync(Group):
    """Generation and training at the same time."""

    enabled: bool = Field(False, description="Generate while training, with bounded staleness.")
    max_staleness_steps: NonNegative = Field(
        1,
        description="Training steps that a sample may be behind the policy: 0 is the synchronous loop, 1 is one step "
        "off policy.",
    )
    num_parallel_generation_workers: Positive = Field(768, description="Trajectories in flight at once.")
    deterministic: bool = Field(
        True,
        description="New weights land when the next batch is complete, so that a run can be repeated and resumed to "
        "the bit; false: as soon as they are there, for fresher samples.",
    )
