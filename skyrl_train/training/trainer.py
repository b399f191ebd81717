"""The trainer's six verbs: forward, forward_backward, optim_step, export_weights, save, load.

    batch -> forward          log-probabilities, no gradient: old and reference
    batch -> forward_backward gradients, summed until
             optim_step       one step of AdamW, version + 1, in place
             export_weights   where an engine finds that version

PPO, GRPO, SFT and distillation are recipes over these. One process here; sharding goes behind the same verbs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from skyrl_train.algorithms.objective import LossFn
from skyrl_train.algorithms.policy_losses import LossInputs
from skyrl_train.algorithms.reductions import Denominators
from skyrl_train.data.pack import MicroBatch, pack
from skyrl_train.errors import CheckpointError, ConfigError
from skyrl_train.training.hf_tensors import checkpoint_tensors
from skyrl_train.training.logprobs import TokenLogprobs
from skyrl_train.training.lora import Adapters, ChangedTensors
from skyrl_train.training.model import PolicyHead, export_hf, refuse_dropout
from skyrl_train.training.model_state import load_model_state, save_model_state
from skyrl_train.training.offload import HostMemory
from skyrl_train.training.on_policy import OnPolicyHead
from skyrl_train.training.optimizer import MasterAdamW, OptimizerSettings, StepStats
from skyrl_train.training.step_metrics import StepMetrics
from skyrl_train.training.token_selection import select_tokens
from skyrl_train.types import (
    AdapterWeights,
    DiskWeights,
    LocalWeights,
    NamedWeights,
    TokenSequence,
    TrainBatch,
    TrajectoryId,
    WeightUpdate,
)

WhichModel = Literal["policy", "reference"]


class PolicyTrainer:
    """Owns the policy's weights, its optimizer and, if given, a frozen reference.

    The model's parameters are only ever written in place, so an engine may run the very same module.
    `temperature` is the rollouts': log-probabilities of policy, old policy and reference are taken at it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        optimizer: OptimizerSettings,
        *,
        reference: PreTrainedModel | Literal["start"] | None = None,
        adapters: Adapters | None = None,
        offload_reference: bool = False,
        temperature: float = 1.0,
        gradient_checkpointing: bool = False,
        on_policy_target: bool = False,
        version: int = 0,
    ) -> None:
        """With `on_policy_target` log-probabilities are those of a deterministic embedded engine to the bit.

        With `offload_reference` it is in host memory but for its own forward passes.

        With `adapters` of this model only they are trained; the `reference` "start" is then the same model before
        its first update, and takes no memory.
        Raises ConfigError for dropout or an architecture whose logits are not understood.
        """
        self.version = version
        self.last_step: StepStats | None = None
        self._num_writes = 0
        self._model = model
        self._adapters = adapters
        self._engine_model = model if adapters is None else None
        model.eval()  # type: ignore[no-untyped-call]
        if adapters is None:
            refuse_dropout(model)
        self._kept = model if adapters is None else ChangedTensors(model, adapters)
        if on_policy_target and (adapters is not None or gradient_checkpointing):
            raise ConfigError("rl_on_policy_target is built for training all weights without gradient checkpointing")
        make_head = OnPolicyHead if on_policy_target else PolicyHead
        self._heads: dict[WhichModel, PolicyHead] = {"policy": make_head(model, temperature=temperature)}
        self._reference_is_start = reference == "start"
        if reference == "start":
            assert adapters is not None, "without adapters the weights of the start are gone after the first update"
            self._heads["reference"], reference = self._heads["policy"], None
        elif reference is not None:
            reference.eval().requires_grad_(False)  # type: ignore[no-untyped-call]
            self._heads["reference"] = make_head(reference, temperature=temperature)
        self.offloaded = HostMemory(
            reference.parameters() if reference is not None and offload_reference else (), constant=True
        )
        self.offloaded.send_away()
        self._optimizer = MasterAdamW(list(model.parameters()), optimizer)
        self._gradient_checkpointing = gradient_checkpointing
        if gradient_checkpointing:
            checkpoint_activations(model)

    @property
    def model(self) -> PreTrainedModel:
        """The policy's module."""
        return self._model

    @property
    def engine_model(self) -> PreTrainedModel:
        """What an engine in this process runs: the policy's module itself, or a plain one with adapters merged.

        The merged one has adapted matrices of its own, made at the first call; `export_weights` has their new values.
        """
        if self._engine_model is None:
            assert self._adapters is not None
            self._engine_model = self._adapters.merged_model()
        return self._engine_model

    def frozen_base(self) -> PreTrainedModel:
        """What an engine in this process runs beside the adapter: a plain module of the very frozen tensors."""
        assert self._adapters is not None, "this trainer has no adapters"
        return self._adapters.base_model()

    @property
    def head(self) -> PolicyHead:
        """Computes the policy's log-probabilities."""
        return self._heads["policy"]

    @property
    def has_reference(self) -> bool:
        return "reference" in self._heads

    @torch.no_grad()
    def forward(self, batch: TrainBatch, *, which: WhichModel = "policy") -> list[torch.Tensor]:
        """Log-probabilities [N] of each micro-batch's targets, in its order, without gradients."""
        with self._reference_in_place() if which == "reference" else nullcontext():
            return [self._logprobs(which, micro_batch).logprobs for micro_batch in self._own(batch)]

    @torch.no_grad()
    def score(self, token_ids: Sequence[int]) -> tuple[float, ...]:
        """Log-probabilities of token_ids[1:] at temperature 1, by the policy as it is now: [L - 1]."""
        batch = pack([_one_sequence(token_ids)], micro_batch_size=1)
        (micro_batch,) = self._own(batch)
        head = self._heads["policy"].at_temperature(1.0)
        logprobs = self._run(head, micro_batch).logprobs
        # A micro-batch's predictions stand in its own order.
        ordered = torch.empty_like(logprobs)
        ordered[self._to_device(micro_batch.token_index)] = logprobs
        return tuple(ordered.tolist())

    def forward_backward(
        self,
        batch: TrainBatch,
        loss_fn: LossFn,
        *,
        old_logprobs: Sequence[torch.Tensor] | None = None,
        ref_logprobs: Sequence[torch.Tensor] | None = None,
    ) -> dict[str, float]:
        """Add the mini-batch's gradient; return its metrics, over all its tokens.

        `old_logprobs` and `ref_logprobs` are `forward`'s results for this batch. Without old ones the policy is its
        own old policy, which is right for the first update of a batch only. A loss with a `select` costs a forward
        pass more: tokens are chosen over the whole mini-batch before its first gradient.
        """
        metrics = StepMetrics()
        selected: Sequence[torch.Tensor | None] = [None] * len(self._own(batch))
        if (select := getattr(loss_fn, "select", None)) is not None:
            selected = select_tokens(select, self._own(batch), self.forward(batch), seed=self.version)
        denominators = Denominators(num_loss_tokens=batch.num_loss_tokens, num_samples=batch.num_samples)
        with gradient_pass(self._model, self._adapters, self.version, checkpointing=self._gradient_checkpointing):
            for i, micro_batch in enumerate(self._own(batch)):
                now = self._logprobs("policy", micro_batch)
                rollout_logprobs = self._to_device(micro_batch.rollout_logprobs)
                if micro_batch.advantages is None:
                    raise ValueError("these sequences have no advantages yet: nothing can be learned from them")
                chosen = selected[i]
                result = loss_fn(
                    LossInputs(
                        logprobs=now.logprobs,
                        entropy=now.entropy,
                        old_logprobs=now.logprobs.detach() if old_logprobs is None else old_logprobs[i],
                        rollout_logprobs=rollout_logprobs,
                        ref_logprobs=None if ref_logprobs is None else ref_logprobs[i],
                        advantages=self._to_device(micro_batch.advantages),
                        sample_index=self._to_device(micro_batch.sample_index),
                        selected=None if chosen is None else self._to_device(chosen),
                    ),
                    denominators,
                )
                result.loss.backward()  # type: ignore[no-untyped-call]
                metrics.add(
                    result.loss.detach(),
                    result.token_metrics,
                    rollout_logprobs=rollout_logprobs,
                    # What the engine should have seen: the policy before this batch's first update.
                    trainer_logprobs=now.logprobs.detach() if old_logprobs is None else old_logprobs[i],
                )
        return metrics.result()

    def optim_step(self) -> int:
        """One optimizer step on the gradients added so far; the new version. `last_step` has its figures."""
        self._num_writes += 1
        self.last_step = self._optimizer.step()
        self.version += 1
        return self.version

    def export_weights(self, version: int, folder: str | Path | None = None) -> WeightUpdate:
        """Where an engine finds the weights of `version`: the very tensors, or a new HF folder inside `folder`.

        Local weights are valid until the next `optim_step`.
        """
        self._check(version)
        if folder is not None:
            path = self.export(None, Path(folder) / f"version_{version}")
            return WeightUpdate(version=version, source=DiskWeights(path=str(path)))
        if self._adapters is not None:
            return WeightUpdate(version=version, source=NamedWeights(tensors=self._adapters.merged_tensors()))
        return WeightUpdate(version=version, source=LocalWeights())

    def export_tensors(self, version: int) -> WeightUpdate:
        """The tensors of `version` by their names in a checkpoint, for an engine that has weights of its own.

        They are the model's own, valid until the next `optim_step` or `load` begins to change them; with adapters, new
        ones of the matrices that have them, merged.
        """
        self._check(version)
        if self._adapters is not None:
            return WeightUpdate(version=version, source=NamedWeights(tensors=self._adapters.merged_tensors()))
        source = NamedWeights(tensors=checkpoint_tensors(self._model), still_valid=self._until_written())
        return WeightUpdate(version=version, source=source)

    def export_adapter(self, version: int, *, for_base_model: bool = False) -> WeightUpdate:
        """The adapter of `version` in peft's form, for an engine that has the untouched model: new tensors.

        `for_base_model`: for one that has `frozen_base`.
        """
        self._check(version)
        assert self._adapters is not None, "this trainer has no adapters"
        adapters = self._adapters
        source = AdapterWeights(
            tensors=adapters.exported_tensors(for_base_model=for_base_model),
            config=adapters.exported_config(for_base_model=for_base_model),
        )
        return WeightUpdate(version=version, source=source)

    def export(self, tokenizer: PreTrainedTokenizerBase | None, folder: str | Path) -> Path:
        """Write an HF folder that transformers loads: adapters are merged, and stand in `adapter/` in peft's format."""
        if self._adapters is None:
            return export_hf(self._model, tokenizer, folder)
        adapters = self._adapters
        return export_hf(
            adapters.merged_model(), tokenizer, folder, also=lambda beside: adapters.export(beside / "adapter")
        )

    def save(self, folder: str | Path) -> None:
        """Write all that `load` needs for going on to the bit."""
        save_model_state(Path(folder), self._kept, self._model, self._optimizer, {"version": self.version})

    def load(self, folder: str | Path) -> None:
        """Into the same tensors. Raises CheckpointError for another model's checkpoint; then nothing is valid."""
        self._num_writes += 1
        try:
            self.version = load_model_state(Path(folder), self._kept, self._model, self._optimizer)["version"]
        except (OSError, RuntimeError, ValueError, KeyError) as exc:
            raise CheckpointError(f"{folder} doesn't fit {type(self._model).__name__}: {exc}") from exc
        if self._adapters is not None and self._engine_model is not None:
            for name, merged in self._adapters.merged_tensors().items():
                self._engine_model.get_parameter(name).data.copy_(merged)

    def _check(self, version: int) -> None:
        if version != self.version:
            raise ValueError(f"version {version} was asked for, the trainer is at {self.version}")

    def _until_written(self) -> Callable[[], bool]:
        """True until the weights begin to change."""
        now = self._num_writes
        return lambda: self._num_writes == now

    def _reference_in_place(self) -> AbstractContextManager[None]:
        if self._reference_is_start:
            assert self._adapters is not None
            return self._adapters.at_start()
        return self.offloaded.on_device()

    def _logprobs(self, which: WhichModel, micro_batch: MicroBatch) -> TokenLogprobs:
        if which not in self._heads:
            raise ValueError(f"this trainer has no {which} model")
        return self._run(self._heads[which], micro_batch)

    def _run(self, head: PolicyHead, micro_batch: MicroBatch) -> TokenLogprobs:
        return head(
            self._to_device(micro_batch.token_ids),
            self._to_device(micro_batch.position_ids),
            self._to_device(micro_batch.predict_rows),
            self._to_device(micro_batch.target_ids),
            head.attention(micro_batch),
        )

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._model.device)

    @staticmethod
    def _own(batch: TrainBatch) -> tuple[MicroBatch, ...]:
        assert len(batch.micro_batches) == 1, f"one process was handed the batches of {len(batch.micro_batches)} ranks"
        return batch.micro_batches[0]


def _one_sequence(token_ids: Sequence[int]) -> TokenSequence:
    length = len(token_ids)
    return TokenSequence(
        trajectory_id=TrajectoryId(prompt_id="score", sample=0),
        token_ids=torch.tensor(token_ids),
        loss_mask=torch.arange(length) > 0,
        rollout_logprobs=torch.zeros(length),
        rewards=torch.zeros(length),
        num_prompt_tokens=1,
    )


@contextmanager
def gradient_pass(
    module: torch.nn.Module, adapters: Adapters | None, step: int, *, checkpointing: bool
) -> Iterator[None]:
    """Train mode inside, where it is needed: activations are checkpointed, and adapters drop out, in it only."""
    module.train(checkpointing or (adapters is not None and adapters.settings.dropout > 0))
    try:
        with nullcontext() if adapters is None else adapters.dropout_at(step):
            yield
    finally:
        module.train(False)


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Recompute each layer in the backward pass. transformers renamed the switch and warns of the old name."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
