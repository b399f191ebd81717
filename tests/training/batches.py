"""Ragged samples for the trainer's tests."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from skyrl_train.data.pack import pack
from skyrl_train.training.optimizer import OptimizerSettings
from skyrl_train.training.trainer import PolicyTrainer
from skyrl_train.types import TrainingSample, TrajectoryId


def make_samples(
    *, num_prompts: int = 3, num_samples: int = 4, seed: int = 0, vocab_size: int = 300, turns: bool = True
) -> list[TrainingSample]:
    """Groups with prompts of 3 to 11 tokens and answers of 1 to 9; with `turns`, some answers have observations."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    samples = []
    for p in range(num_prompts):
        prompt = torch.randint(0, vocab_size, (draw(3, 12),), generator=generator)
        for s in range(num_samples):
            answer = torch.randint(0, vocab_size, (draw(1, 10),), generator=generator)
            mask = torch.ones(len(answer), dtype=torch.bool)
            if turns and s % 2 and len(answer) > 4:
                mask[1:3] = False
            loss_mask = torch.cat([torch.zeros(len(prompt), dtype=torch.bool), mask])
            length = len(loss_mask)
            samples.append(
                TrainingSample(
                    trajectory_id=TrajectoryId(prompt_id=f"p{p}", sample=s),
                    token_ids=torch.cat([prompt, answer]),
                    loss_mask=loss_mask,
                    rollout_logprobs=-5 * torch.rand(length, generator=generator) * loss_mask,
                    rewards=torch.zeros(length),
                    advantages=torch.randn(length, generator=generator) * loss_mask,
                    num_prompt_tokens=len(prompt),
                )
            )
    return samples


def as_sampled_by(model: PreTrainedModel, samples: Sequence[TrainingSample]) -> list[TrainingSample]:
    """The samples with the log-probabilities that an engine over this module would have given."""
    policy = PolicyTrainer(copy.deepcopy(model).requires_grad_(True), OptimizerSettings(lr=1e-3))
    result = []
    for sample in samples:
        logprobs = policy.forward(pack([sample], micro_batch_size=1))[0]
        rollout_logprobs = torch.zeros(len(sample.token_ids)).masked_scatter_(sample.loss_mask, logprobs.float().cpu())
        result.append(replace(sample, rollout_logprobs=rollout_logprobs))
    return result
