"""The training part of TRL's GRPOTrainer alone: loss, backward pass, clipping and AdamW on given completions.

TRL's own padding: prompts left-padded to the batch's longest, completions right-padded to theirs. Generation, rewards
and advantages are replaced by what is given, so none of their time is in a step.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.grpo.trl_side import common_settings
from benchmarks.measure import PhaseClock, Timing
from benchmarks.models import FIRST_WORD_ID, PAD_ID, to_text
from skyrl_train.types import TrainingSample


class TrlUpdate:
    """`micro_batch` counts samples and divides their number; each call trains a fresh copy of `model`."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        samples: Sequence[TrainingSample],
        *,
        device: str,
        micro_batch: int,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._device = device
        self._micro_batch = micro_batch
        self._num_samples = len(samples)
        self._batch = trl_batch(samples)

    @property
    def num_rows(self) -> int:
        """Rows that the model computes in a step, padding included."""
        return self._num_samples * (self._batch["prompt_ids"].shape[1] + self._batch["completion_ids"].shape[1])

    def run(self, num_steps: int) -> list[Timing]:
        timings: list[Timing] = []
        trainer = self._trainer(num_steps, logs=False)
        trainer.add_callback(_StepEnds(PhaseClock(self._device), timings))
        trainer.train()
        assert len(timings) == num_steps, (len(timings), num_steps)
        return timings

    def gradient_norm(self) -> float:
        """Of the first step, before clipping."""
        trainer = self._trainer(1, logs=True)
        trainer.train()
        (log,) = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
        return float(log["grad_norm"])

    def _trainer(self, num_steps: int, *, logs: bool) -> GRPOTrainer:
        config = GRPOConfig(
            **common_settings(self._device),
            max_steps=num_steps,
            num_generations=2,  # the least that TRL takes; advantages are given, so groups mean nothing here
            per_device_train_batch_size=self._micro_batch,
            gradient_accumulation_steps=self._num_samples // self._micro_batch,
            max_completion_length=self._batch["completion_ids"].shape[1],
            logging_strategy="steps" if logs else "no",
        )
        # Prompts that are never looked at: enough of them for each step's loader.
        rows = [{"prompt": to_text((FIRST_WORD_ID,))}] * self._num_samples
        trainer = _UpdateOnly(
            model=copy.deepcopy(self._model).train(),
            reward_funcs=_no_reward,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=self._tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.given = {name: tensor.to(self._model.device) for name, tensor in self._batch.items()}
        return trainer


def trl_batch(samples: Sequence[TrainingSample]) -> dict[str, torch.Tensor]:
    """What TRL's loss takes, by its own names: [B, longest prompt] and [B, longest completion], advantages [B]."""
    prompts = [sample.token_ids[: sample.num_prompt_tokens] for sample in samples]
    completions = [sample.token_ids[sample.num_prompt_tokens :] for sample in samples]
    assert all(bool(s.loss_mask[s.num_prompt_tokens :].all()) for s in samples)
    left, right = max(map(len, prompts)), max(map(len, completions))
    batch = {
        "prompt_ids": torch.full((len(samples), left), PAD_ID),
        "prompt_mask": torch.zeros(len(samples), left, dtype=torch.int64),
        "completion_ids": torch.full((len(samples), right), PAD_ID),
        "completion_mask": torch.zeros(len(samples), right, dtype=torch.int64),
        "advantages": torch.stack([sample.advantages[-1] for sample in samples]),
        "num_items_in_batch": torch.tensor(float(sum(map(len, completions)))),
    }
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        batch["prompt_ids"][i, left - len(prompt) :], batch["prompt_mask"][i, left - len(prompt) :] = prompt, 1
        batch["completion_ids"][i, : len(completion)], batch["completion_mask"][i, : len(completion)] = completion, 1
    return batch


class _UpdateOnly(GRPOTrainer):
    given: dict[str, torch.Tensor]

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, torch.Tensor]:
        return dict(self.given)


class _StepEnds(TrainerCallback):
    def __init__(self, clock: PhaseClock, timings: list[Timing]) -> None:
        self._clock = clock
        self._timings = timings

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._clock.end_step()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._timings.append(self._clock.end_step())


def _no_reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [0.0] * len(completion_ids)
