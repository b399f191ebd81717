"""What the embedded engine sampled at and what the trainer computes for it: one module, two attentions, one number."""

from __future__ import annotations

import asyncio

import pytest
import torch

from skyrl_train.algorithms.objective import PolicyObjective
from skyrl_train.data.pack import pack
from skyrl_train.engines.embedded.config import EmbeddedConfig
from skyrl_train.engines.embedded.engine import EmbeddedEngine
from skyrl_train.training.optimizer import OptimizerSettings
from skyrl_train.training.trainer import PolicyTrainer
from skyrl_train.types import GenerateRequest, SamplingParams, TrainingSample, TrajectoryId
from tests.tiny import make_model, make_tokenizer


async def sample_groups(engine: EmbeddedEngine, temperature: float) -> list[TrainingSample]:
    """Three prompts with four answers of up to 12 tokens each."""

    async def one(prompt: int, sample: int) -> TrainingSample:
        token_ids = tuple(range(10 + prompt, 16 + 3 * prompt))
        sampling = SamplingParams(max_new_tokens=12, temperature=temperature, seed=sample)
        name = f"{prompt}/{sample}"
        answer = await engine.generate(GenerateRequest(request_id=name, prompt_token_ids=token_ids, sampling=sampling))
        loss_mask = torch.tensor([False] * len(token_ids) + [True] * len(answer.token_ids))
        return TrainingSample(
            trajectory_id=TrajectoryId(prompt_id=str(prompt), sample=sample),
            token_ids=torch.tensor(token_ids + answer.token_ids),
            loss_mask=loss_mask,
            rollout_logprobs=torch.cat([torch.zeros(len(token_ids)), torch.tensor(answer.logprobs)]),
            rewards=torch.zeros(len(loss_mask)),
            advantages=loss_mask.float(),
            num_prompt_tokens=len(token_ids),
        )

    return await asyncio.gather(*(one(prompt, sample) for prompt in range(3) for sample in range(4)))


@pytest.mark.parametrize("arch", ["qwen3", "gemma3_text"])
async def test_rollout_and_trainer_logprobs_agree(arch: str, objective: PolicyObjective) -> None:
    trainer = PolicyTrainer(make_model(arch), OptimizerSettings(lr=1e-2), temperature=0.8)
    engine = EmbeddedEngine(trainer.model, make_tokenizer(), config=EmbeddedConfig(max_context_len=64))
    try:
        samples = await sample_groups(engine, temperature=0.8)
    finally:
        await engine.close()
    metrics = trainer.forward_backward(pack(samples, max_tokens_per_micro_batch=100), objective)
    assert metrics["policy/rollout_logprob_abs_diff_max"] < 1e-5
