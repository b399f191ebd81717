"""`rl_on_policy_target`: the trainer's log-probabilities of what the engine sampled are the engine's, to the bit.

Compared with ==: there is no tolerance in this file but for gradients, whose judge is the plain trainer.
"""

from __future__ import annotations

import asyncio
import copy
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from skyrl_train.algorithms.objective import PolicyObjective
from skyrl_train.data.pack import pack
from skyrl_train.engines.embedded.config import EmbeddedConfig
from skyrl_train.engines.embedded.engine import EmbeddedEngine
from skyrl_train.errors import ConfigError
from skyrl_train.training.lora import Adapters, LoraSettings
from skyrl_train.training.optimizer import OptimizerSettings
from skyrl_train.training.trainer import PolicyTrainer
from skyrl_train.training.update import update_policy
from skyrl_train.types import GenerateRequest, LocalWeights, SamplingParams, TrainingSample, TrajectoryId, WeightUpdate
from tests.tiny import make_model, make_tokenizer

CUTS: tuple[dict[str, Any], ...] = (
    {"micro_batch_size": 1},
    {"micro_batch_size": 5},
    {"max_tokens_per_micro_batch": 150},
    {"max_tokens_per_micro_batch": 10_000},
    {"max_tokens_per_micro_batch": 10_000, "share_prefix": False},
)


def make_trainer(model: Any, *, temperature: float = 1.0, **more: Any) -> PolicyTrainer:
    return PolicyTrainer(model, OptimizerSettings(lr=1e-2), temperature=temperature, on_policy_target=True, **more)


def make_engine(trainer: PolicyTrainer, **config: Any) -> EmbeddedEngine:
    settings = {"max_context_len": 256, "max_num_batched_tokens": 40, "max_num_seqs": 6, "kv_cache_tokens": 700}
    return EmbeddedEngine(
        trainer.model, make_tokenizer(), config=EmbeddedConfig(**{**settings, "deterministic": True, **config})
    )


async def sample(engine: EmbeddedEngine, temperature: float, *, turns: int = 1) -> list[TrainingSample]:
    """Four prompts of 2 to 90 tokens, three samples each; after each turn but the last an observation of 1 to 9."""

    async def one(prompt: int, number: int) -> TrainingSample:
        rng = random.Random(100 * prompt + number)
        tokens = [(7 * i + prompt) % 256 for i in range((2, 30, 65, 90)[prompt])]
        num_prompt, mask, logprobs = len(tokens), [False] * len(tokens), [0.0] * len(tokens)
        for turn in range(turns):
            sampling = SamplingParams(
                max_new_tokens=rng.randint(1, 20), temperature=temperature, seed=rng.randrange(99), ignore_eos=True
            )
            answer = await engine.generate(
                GenerateRequest(
                    request_id=f"{prompt}/{number}/{turn}", prompt_token_ids=tuple(tokens), sampling=sampling
                )
            )
            observed = [rng.randrange(256) for _ in range(rng.randint(1, 9))] if turn < turns - 1 else []
            tokens += [*answer.token_ids, *observed]
            mask += [True] * len(answer.token_ids) + [False] * len(observed)
            logprobs += [*answer.logprobs, *([0.0] * len(observed))]
        return TrainingSample(
            trajectory_id=TrajectoryId(prompt_id=str(prompt), sample=number),
            token_ids=torch.tensor(tokens),
            loss_mask=torch.tensor(mask),
            rollout_logprobs=torch.tensor(logprobs),
            rewards=torch.zeros(len(tokens)),
            advantages=torch.tensor(mask).float() * rng.uniform(-1, 1),
            num_prompt_tokens=num_prompt,
        )

    return await asyncio.gather(*(one(prompt, number) for prompt in range(4) for number in range(3)))


def rollouts(trainer: PolicyTrainer, temperature: float, *, turns: int = 1, **config: Any) -> list[TrainingSample]:
    async def all_of_them() -> list[TrainingSample]:
        engine = make_engine(trainer, **config)
        try:
            return await sample(engine, temperature, turns=turns)
        finally:
            await engine.close()

    return asyncio.run(all_of_them())


def assert_same_bits(trainer: PolicyTrainer, samples: Sequence[TrainingSample]) -> None:
    for cut in CUTS:
        batch = pack(samples, **cut)
        for micro_batch, logprobs in zip(batch.micro_batches[0], trainer.forward(batch), strict=True):
            assert torch.equal(logprobs, micro_batch.rollout_logprobs)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("turns", [1, 3])
@pytest.mark.parametrize("arch", ["qwen2", "qwen3"])
def test_every_cut_into_micro_batches_gives_the_engines_bits(arch: str, turns: int, temperature: float) -> None:
    trainer = make_trainer(make_model(arch), temperature=temperature)
    assert_same_bits(trainer, rollouts(trainer, temperature, turns=turns))


@pytest.mark.parametrize("arch", ["llama", "olmo2", "phi3", "gemma3_text"])
def test_other_architectures(arch: str) -> None:
    trainer = make_trainer(make_model(arch))
    assert_same_bits(trainer, rollouts(trainer, 1.0, turns=2))


def test_a_sliding_window() -> None:
    trainer = make_trainer(make_model("mistral", sliding_window=21))
    assert_same_bits(trainer, rollouts(trainer, 1.0, turns=2, chunked_prefill=False))


def test_threads_and_the_prefix_cache_change_nothing() -> None:
    trainer, before = make_trainer(make_model("qwen3")), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        samples = rollouts(trainer, 1.0, turns=2, enable_prefix_caching=False)
        torch.set_num_threads(1)
        assert_same_bits(trainer, samples)
    finally:
        torch.set_num_threads(before)


def test_the_metric_is_zero_and_the_ratio_one_in_every_step_of_training(objective: PolicyObjective) -> None:
    """Two mini-batches a step: the second is compared with the policy before the first."""
    trainer = make_trainer(make_model("qwen2"), temperature=0.7)

    async def steps() -> None:
        engine = make_engine(trainer)
        try:
            for _ in range(3):
                samples = await sample(engine, 0.7, turns=2)
                batches = [pack(part, max_tokens_per_micro_batch=200) for part in (samples[:6], samples[6:])]
                result = update_policy(trainer, batches, objective)
                assert result.metrics["policy/rollout_logprob_abs_diff_max"] == 0.0
                assert result.metrics["policy/importance_ratio_mean"] == 1.0
                assert result.metrics["policy/importance_ratio_max"] == 1.0
                await engine.pause("abort")
                await engine.update_weights(WeightUpdate(version=trainer.version, source=LocalWeights()))
                await engine.resume()
        finally:
            await engine.close()

    asyncio.run(steps())


def test_without_the_target_the_trainers_bits_are_its_own(objective: PolicyObjective) -> None:
    """Close, and nobody promises more."""
    trainer = make_trainer(make_model("qwen2"))
    samples = rollouts(trainer, 1.0)
    plain = PolicyTrainer(trainer.model, OptimizerSettings(lr=1e-2))
    difference = plain.forward_backward(pack(samples, micro_batch_size=5), objective)
    assert difference["policy/rollout_logprob_abs_diff_max"] < 1e-5


@pytest.mark.parametrize("arch", ["qwen3", "phi3"])
def test_gradients_are_those_of_the_plain_trainer(arch: str, objective: PolicyObjective) -> None:
    model = make_model(arch)
    trainers = [make_trainer(model), PolicyTrainer(copy.deepcopy(model), OptimizerSettings(lr=1e-2))]
    batch = pack(rollouts(trainers[0], 1.0, turns=2), max_tokens_per_micro_batch=300)
    for trainer in trainers:
        trainer.forward_backward(batch, objective)
    for (name, mine), plain in zip(model.named_parameters(), trainers[1].model.parameters(), strict=True):
        assert mine.grad is not None and plain.grad is not None, name
        assert torch.allclose(mine.grad, plain.grad, rtol=1e-3, atol=1e-4 * float(plain.grad.abs().max())), name


def test_entropy_has_the_plain_gradient() -> None:
    trainer = make_trainer(make_model("qwen2"))
    batch = pack(rollouts(trainer, 1.0), max_tokens_per_micro_batch=10_000)
    (micro_batch,) = batch.micro_batches[0]
    gradients = []
    for each in (trainer, PolicyTrainer(trainer.model, OptimizerSettings(lr=1e-2))):
        entropy = each._logprobs("policy", micro_batch).entropy
        gradients.append((*torch.autograd.grad(entropy.sum(), trainer.model.lm_head.weight), entropy.detach()))
    for mine, plain in zip(*gradients, strict=True):
        assert torch.allclose(mine, plain, rtol=1e-3, atol=1e-4 * float(plain.abs().max()))


def test_the_score_of_a_text_is_exact_as_well() -> None:
    trainer = make_trainer(make_model("qwen2"))
    (first, *_) = rollouts(trainer, 1.0)
    scores = trainer.score(first.token_ids.tolist())
    assert torch.equal(torch.tensor(scores)[first.loss_mask[1:]], first.rollout_logprobs[first.loss_mask])


def test_what_it_is_not_built_for_is_refused() -> None:
    with pytest.raises(ConfigError, match="all weights without gradient checkpointing"):
        make_trainer(make_model(), gradient_checkpointing=True)
    model = make_model()
    with pytest.raises(ConfigError, match="all weights without gradient checkpointing"):
        make_trainer(model, adapters=Adapters(model, LoraSettings(rank=2), base_path="base"))
    with pytest.raises(ConfigError, match="scaled or capped behind its head"):
        make_trainer(make_model("granite", logits_scaling=2.0))
