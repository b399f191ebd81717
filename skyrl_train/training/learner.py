"""A batch of samples to a better policy: mini-batches of whole prompts, packed, one update each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

from skyrl_train.algorithms.kl_control import KlController
from skyrl_train.algorithms.objective import LossFn
from skyrl_train.data.pack import pack
from skyrl_train.training.checkpoint import Parts, ReadPart, WritePart
from skyrl_train.training.critic import CriticTrainer, update_critic
from skyrl_train.training.eagle3 import Eagle3Trainer
from skyrl_train.training.experience import Experience
from skyrl_train.training.mismatch import MismatchWatch
from skyrl_train.training.trainer import PolicyTrainer
from skyrl_train.training.update import update_policy
from skyrl_train.types import LocalWeights, NamedWeights, TrainBatch, TrainingSample, WeightUpdate

WeightsFor = Literal["module", "copy", "server", "adapter", "frozen_base"]
"""What runs the policy: the trainer's own module, a copy of it in this process, a server with weights of its own, one
that has the untouched model and takes the adapter, or an engine in this process that shares the trainer's frozen base
and takes the adapter too."""


@dataclass(frozen=True, kw_only=True)
class Learner:
    """What the loop hands its samples to. `mini_batch_size` counts prompts; give one of the two packing limits.

    `reference_in_loss` False: the reference serves the reward only, and updates don't run it. `kl_controller` is told
    each batch's KL, which is measured where it counts: in the reward or in the loss.
    """

    trainer: PolicyTrainer
    loss_fn: LossFn
    mini_batch_size: int
    num_epochs: int = 1
    max_tokens_per_micro_batch: int | None = None
    micro_batch_size: int | None = None
    reference_in_loss: bool = True
    kl_controller: KlController | None = None
    watch: MismatchWatch | None = None
    weights_for: WeightsFor = "module"
    critic: CriticTrainer | None = None
    critic_mini_batch_size: int | None = None  # None is the policy's
    draft_head: Eagle3Trainer | None = None
    draft_head_steps: int = 0
    """Steps of the head that drafts for the policy, after each update and on the same samples."""

    def update(self, experience: Experience) -> dict[str, float]:
        """One update of the policy, and of the critic, for each mini-batch and epoch; returns the metrics."""
        if not any(bool(sample.loss_mask.any()) for sample in experience.samples):
            # Everything was filtered: the weights stay, and the step says so.
            return {"policy/version": self.trainer.version, "train/num_loss_tokens": 0, "train/num_updates": 0}
        batches = [self._pack(part) for part in mini_batches(experience.samples, self.mini_batch_size)]
        result = update_policy(
            self.trainer,
            batches,
            self.loss_fn,
            num_epochs=self.num_epochs,
            use_reference=self.reference_in_loss,
            watch=self.watch,
        )
        tokens = sum(batch.num_loss_tokens for batch in batches)
        rows = sum(len(m.token_ids) for batch in batches for rank in batch.micro_batches for m in rank)
        return {
            **result.metrics,
            **self._update_critic(experience.samples),
            **self._steer_kl(experience, result.metrics),
            **self._teach_draft_head(experience.samples),
            "policy/version": result.version,
            "train/num_loss_tokens": tokens,
            "train/num_rows": rows,
            "train/num_updates": len(batches) * self.num_epochs,
        }

    def export_weights(self) -> WeightUpdate:
        """The weights after the last update, in the form that the engine takes."""
        version = self.trainer.version
        if self.weights_for == "server":
            return self.trainer.export_tensors(version)
        if self.weights_for == "adapter":
            return self.trainer.export_adapter(version)
        if self.weights_for == "frozen_base":
            return self.trainer.export_adapter(version, for_base_model=True)
        update = self.trainer.export_weights(version)
        if self.weights_for == "copy" and isinstance(update.source, LocalWeights):
            return replace(update, source=NamedWeights(tensors=self.trainer.model.state_dict()))
        return update

    def parts(self) -> Parts:
        """What a checkpoint holds of the models."""
        parts: dict[str, tuple[WritePart, ReadPart]] = {"policy": (self.trainer.save, self.trainer.load)}
        if self.critic is not None:
            parts["critic"] = (self.critic.save, self.critic.load)
        if self.kl_controller is not None and self.kl_controller.is_adaptive:
            parts["kl_controller"] = (self.kl_controller.save, self.kl_controller.load)
        if self.draft_head is not None:
            parts["draft_head"] = (self.draft_head.save, self.draft_head.load)
        return parts

    def _teach_draft_head(self, samples: Sequence[TrainingSample]) -> dict[str, float]:
        return {} if self.draft_head is None else self.draft_head.learn(samples, self.draft_head_steps)

    def _update_critic(self, samples: Sequence[TrainingSample]) -> dict[str, float]:
        if self.critic is None:
            return {}
        batches = [
            self._pack(part) for part in mini_batches(samples, self.critic_mini_batch_size or self.mini_batch_size)
        ]
        return update_critic(self.critic, batches, num_epochs=self.num_epochs)

    def _steer_kl(self, experience: Experience, metrics: Mapping[str, float]) -> dict[str, float]:
        """`policy/kl_coef` is what this batch was learned with; the controller then moves it for the next."""
        if self.kl_controller is None:
            return {}
        used = self.kl_controller()
        kl = metrics["policy/ref_kl"] if self.reference_in_loss else experience.metrics["reward/kl_mean"]
        self.kl_controller.update(kl, len({sample.trajectory_id for sample in experience.samples}))
        return {"policy/kl_coef": used}

    def _pack(self, samples: Sequence[TrainingSample]) -> TrainBatch:
        return pack(
            samples,
            max_tokens_per_micro_batch=self.max_tokens_per_micro_batch,
            micro_batch_size=self.micro_batch_size,
        )


def mini_batches(samples: Sequence[TrainingSample], num_prompts: int) -> list[list[TrainingSample]]:
    """Runs of `num_prompts` whole prompts, in order; the last may have fewer. [a a b c c] by 2: [a a b] [c c]."""
    prompts = [list(group) for _, group in groupby(samples, key=lambda sample: sample.trajectory_id.prompt_id)]
    runs = (prompts[i : i + num_prompts] for i in range(0, len(prompts), num_prompts))
    return [[sample for prompt in run for sample in prompt] for run in runs]
