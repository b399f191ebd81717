"""Scored groups to training samples: token rewards, the critic's values, advantages, value targets.

    groups -> [branches] -> sequences -> [KL to the reference off the rewards] -> [values] -> advantages -> samples

What needs a forward pass happens here, at training time: samples that waited are judged by the weights that train.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import torch

from skyrl_train.algorithms.advantages import AdvantageEstimator, AdvantageInputs
from skyrl_train.algorithms.normalize import normalize
from skyrl_train.data.pack import pack
from skyrl_train.rollout.branches import by_branches
from skyrl_train.rollout.samples import make_sequences
from skyrl_train.training.trainer import PolicyTrainer
from skyrl_train.types import ScoredGroup, TokenSequence, TrainBatch, TrainingSample, TrajectoryId


@dataclass(frozen=True, kw_only=True, eq=False)
class Experience:
    """What one step learns from. `advantages` has each trajectory's mean over its tokens, for the rollout log."""

    samples: tuple[TrainingSample, ...]
    advantages: Mapping[TrajectoryId, float]
    metrics: dict[str, float]


class ValueModel(Protocol):
    """What experience asks of a critic."""

    def forward(self, batch: TrainBatch) -> list[torch.Tensor]:
        """Values [N] of each micro-batch's predictions: of the state before each loss token."""
        ...


@dataclass(frozen=True, kw_only=True)
class KlInReward:
    """Token rewards lose `coefficient()` * estimator(policy, reference). `coefficient` may move from step to step."""

    estimator: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    coefficient: Callable[[], float]


@dataclass(frozen=True, kw_only=True)
class ExperienceMaker:
    """Callable on the groups of a step. `estimator` has its options bound.

    `step_wise` makes each turn a sequence. `normalize` shifts and scales advantages over all tokens to mean 0 and
    deviation 1, after value targets were taken. `skip_truncated` takes truncated trajectories out of the loss; they
    still count in their group's baseline, for they were sampled from the same distribution.
    """

    estimator: AdvantageEstimator
    trainer: PolicyTrainer | None = None
    critic: ValueModel | None = None
    kl: KlInReward | None = None
    step_wise: bool = False
    normalize: bool = False
    skip_truncated: bool = False
    max_tokens_per_micro_batch: int | None = None
    micro_batch_size: int | None = None

    def __call__(self, groups: Sequence[ScoredGroup]) -> Experience:
        if not groups:
            return Experience(samples=(), advantages={}, metrics={})
        groups = by_branches(groups)
        trajectories = [trajectory for group in groups for trajectory in group.trajectories]
        rows = [make_sequences(trajectory, step_wise=self.step_wise) for trajectory in trajectories]
        sequences = [sequence for row in rows for sequence in row]
        counts = torch.tensor([sum(int(s.loss_mask.sum()) for s in row) for row in rows])
        trajectory_index = torch.repeat_interleave(torch.arange(len(rows)), counts)
        rewards = _loss_tokens(sequences, [sequence.rewards for sequence in sequences])
        scores = torch.tensor([reward for group in groups for reward in group.rewards])
        sizes = torch.tensor([len(group.rewards) for group in groups])
        metrics: dict[str, float] = {}
        batch = self._pack(sequences) if self.kl is not None or self.critic is not None else None
        cost = None
        if self.kl is not None:
            assert batch is not None and self.trainer is not None
            kl = self._kl(batch)
            cost = self.kl.coefficient() * kl
            rewards = rewards - cost
            scores = scores - scores.new_zeros(len(scores)).index_add_(0, trajectory_index, cost)
            metrics |= {"reward/kl_mean": float(kl.mean()), "reward/kl_cost_mean": float(cost.mean())}
        values = None
        if self.critic is not None:
            assert batch is not None
            values = in_sample_order(batch, self.critic.forward(batch))
        advantages = self.estimator(
            AdvantageInputs(
                rewards=rewards,
                scores=scores,
                trajectory_index=trajectory_index,
                group_index=torch.repeat_interleave(torch.arange(len(groups)), sizes),
                values=values,
                baselines=_baselines(groups, sizes),
                kl_costs=cost,
            )
        )
        if advantages.shape != rewards.shape:
            raise ValueError(
                f"the advantage estimator returned {list(advantages.shape)}; one advantage for each of the "
                f"{len(rewards)} loss tokens is wanted (inputs.spread makes them from one a trajectory)"
            )
        returns = None if values is None else advantages + values
        metrics |= {f"advantage/{k}": v for k, v in _moments(advantages).items()}
        if returns is not None and values is not None:
            metrics |= _value_metrics(returns, values)
        if self.normalize:
            advantages = normalize(advantages).float()
        means = torch.zeros(len(rows)).index_add_(0, trajectory_index, advantages) / counts.clamp_min(1)
        skipped = {t.id for t in trajectories if self.skip_truncated and t.status == "truncated"}
        if self.skip_truncated:
            metrics["selection/num_truncated_skipped"] = len(skipped)
        return Experience(
            samples=tuple(_samples(sequences, advantages, returns, values, skipped)),
            advantages={t.id: float(mean) for t, mean in zip(trajectories, means, strict=True)},
            metrics=metrics,
        )

    def _pack(self, sequences: Sequence[TokenSequence]) -> TrainBatch:
        return pack(
            sequences,
            max_tokens_per_micro_batch=self.max_tokens_per_micro_batch,
            micro_batch_size=self.micro_batch_size,
        )

    def _kl(self, batch: TrainBatch) -> torch.Tensor:
        assert self.kl is not None and self.trainer is not None
        policy = in_sample_order(batch, self.trainer.forward(batch))
        reference = in_sample_order(batch, self.trainer.forward(batch, which="reference"))
        return self.kl.estimator(policy, reference)


def in_sample_order(batch: TrainBatch, per_micro_batch: Sequence[torch.Tensor]) -> torch.Tensor:
    """[k][N] in the order of one rank's micro-batches -> [T] on the CPU, samples in order, however they were packed."""
    (micro_batches,) = batch.micro_batches
    result = torch.zeros(batch.num_loss_tokens)
    for micro_batch, values in zip(micro_batches, per_micro_batch, strict=True):
        result[micro_batch.token_index] = values.float().cpu()
    return result


def _loss_tokens(sequences: Sequence[TokenSequence], tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """[L] each -> [T]: the entries at loss tokens, one after the other."""
    return torch.cat([tensor[s.loss_mask] for s, tensor in zip(sequences, tensors, strict=True)])


def _samples(
    sequences: Sequence[TokenSequence],
    advantages: torch.Tensor,
    returns: torch.Tensor | None,
    values: torch.Tensor | None,
    skipped: set[TrajectoryId],
) -> list[TrainingSample]:
    samples = []
    start = 0
    for sequence in sequences:
        end = start + int(sequence.loss_mask.sum())
        known = {field.name: getattr(sequence, field.name) for field in fields(TokenSequence)}
        sample = TrainingSample(
            **known,
            advantages=_spread(advantages[start:end], sequence.loss_mask),
            returns=None if returns is None else _spread(returns[start:end], sequence.loss_mask),
            values=None if values is None else _spread(values[start:end], sequence.loss_mask),
        )
        start = end
        if sequence.trajectory_id not in skipped:
            samples.append(sample)
    return samples


def _spread(tokens: torch.Tensor, loss_mask: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(loss_mask)).masked_scatter_(loss_mask, tokens)


def _baselines(groups: Sequence[ScoredGroup], sizes: torch.Tensor) -> torch.Tensor | None:
    """Each trajectory's baseline [B]; None unless every group has one."""
    found = [group.baseline for group in groups if group.baseline is not None]
    return torch.repeat_interleave(torch.tensor(found), sizes) if len(found) == len(groups) else None


def _moments(values: torch.Tensor) -> dict[str, float]:
    return {
        "mean": float(values.mean()),
        "std": float(values.std(unbiased=False)),
        "abs_max": float(values.abs().max()),
    }


def _value_metrics(returns: torch.Tensor, values: torch.Tensor) -> dict[str, float]:
    """Explained variance is 1 for a perfect critic, 0 for one that says the mean."""
    variance = float(returns.var(unbiased=False))
    residual = float((returns - values).var(unbiased=False))
    return {
        "critic/values_mean": float(values.mean()),
        "critic/returns_mean": float(returns.mean()),
        "critic/explained_variance": 1 - residual / variance if variance > 0 else 0.0,
    }
