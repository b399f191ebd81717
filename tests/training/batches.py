"""Ragged samples for the trainer's tests."""

from __future__ import annotations

import torch

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
