"""This library's step: the engine and the trainer on one set of weights, as `loop.py` joins them."""

from __future__ import annotations

import asyncio
from functools import partial

from transformers import PreTrainedModel

from benchmarks.grpo.base import Gradient, Rollout
from benchmarks.grpo.work import EPS_CLIP, LEARNING_RATE, MAX_GRAD_NORM, StepWork, reward
from benchmarks.measure import PhaseClock, Timing
from skyrl_train.algorithms.advantages import grpo
from skyrl_train.algorithms.objective import PolicyObjective
from skyrl_train.algorithms.policy_losses import ppo_clip
from skyrl_train.algorithms.reductions import token_mean
from skyrl_train.engines.embedded.config import EmbeddedConfig
from skyrl_train.engines.embedded.engine import EmbeddedEngine
from skyrl_train.training.experience import Experience, ExperienceMaker
from skyrl_train.training.learner import Learner
from skyrl_train.training.optimizer import OptimizerSettings
from skyrl_train.training.trainer import PolicyTrainer
from skyrl_train.types import (
    Completion,
    GenerateRequest,
    Prompt,
    SamplingParams,
    ScoredGroup,
    Trajectory,
    TrajectoryId,
    Turn,
    VersionSpan,
)
from skyrl_train.weight_sync.sync import sync_weights


class SkyrlSide:
    """`model` has the attention of `skyrl_train.attention`; it is trained in place."""

    def __init__(
        self, model: PreTrainedModel, work: StepWork, *, device: str, max_tokens_per_micro_batch: int, num_threads: int
    ) -> None:
        self.name = f"skyrl_train, micro-batches of {max_tokens_per_micro_batch} tokens, {num_threads} threads"
        self.num_threads = num_threads
        self._work = work
        self._clock = PhaseClock(device)
        num_requests = work.num_prompts * work.num_samples
        longest = max(work.prompt_lens) + work.max_completion_len
        self._trainer = _TimedTrainer(
            model, OptimizerSettings(lr=LEARNING_RATE, max_grad_norm=MAX_GRAD_NORM), clock=self._clock
        )
        self._learner = Learner(
            trainer=self._trainer,
            loss_fn=PolicyObjective(
                policy_loss=partial(ppo_clip, eps_clip_low=EPS_CLIP, eps_clip_high=EPS_CLIP), reduction=token_mean
            ),
            mini_batch_size=work.num_prompts,
            max_tokens_per_micro_batch=max_tokens_per_micro_batch,
        )
        self._engine = EmbeddedEngine(
            model,
            None,
            config=EmbeddedConfig(
                max_num_seqs=num_requests,
                max_num_batched_tokens=max(2048, num_requests),
                max_context_len=longest,
                kv_cache_tokens=num_requests * (longest + 64),
            ),
        )
        self._make_experience = ExperienceMaker(estimator=grpo)
        self._runner = asyncio.Runner()
        self._next_step = 0

    def run(self, num_steps: int) -> list[Timing]:
        self._clock.end_step()
        timings = []
        for _ in range(num_steps):
            self._runner.run(self._step(self._next_step))
            self._next_step += 1
            timings.append(self._clock.end_step(_split))
        return timings

    def gradient(self, rollout: Rollout) -> Gradient:
        """The rollout's own log-probabilities play no part: the policy is its own old policy."""
        turns = [
            Turn(
                prompt_token_ids=prompt,
                completion=Completion(
                    request_id=str(i),
                    token_ids=ids,
                    logprobs=(0.0,) * len(ids),
                    finish_reason="length",
                    versions=(VersionSpan(version=0, start=0, end=len(ids)),),
                ),
            )
            for i, (prompt, ids) in enumerate(zip(self._each(rollout.prompts), rollout.completions, strict=True))
        ]
        metrics = self._learner.update(self._experience(turns))
        return Gradient(loss=metrics["policy/loss"], grad_norm=metrics["policy/grad_norm"])

    def close(self) -> None:
        self._runner.run(self._engine.close())
        self._runner.close()

    async def _step(self, step: int) -> None:
        with self._clock.phase("generation"):
            turns = await self._generate(self._work.prompts(step), step)
        with self._clock.phase("preparation"):
            experience = self._experience(turns)
        with self._clock.phase("update"):
            self._learner.update(experience)
        with self._clock.phase("weight sync"):
            await sync_weights(self._engine, self._learner.export_weights())

    async def _generate(self, prompts: list[tuple[int, ...]], step: int) -> list[Turn]:
        lens = self._work.flat_lens
        requests = [
            GenerateRequest(
                request_id=f"{step}/{i}",
                prompt_token_ids=prompt,
                sampling=SamplingParams(max_new_tokens=lens[i], temperature=1.0, ignore_eos=True),
            )
            for i, prompt in enumerate(self._each(prompts))
        ]
        completions = await asyncio.gather(*(self._engine.generate(request) for request in requests))
        assert tuple(len(completion.token_ids) for completion in completions) == lens
        return [
            Turn(prompt_token_ids=request.prompt_token_ids, completion=completion)
            for request, completion in zip(requests, completions, strict=True)
        ]

    def _each(self, prompts: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """A prompt for each sample."""
        return [prompt for prompt in prompts for _ in range(self._work.num_samples)]

    def _experience(self, turns: list[Turn]) -> Experience:
        num_samples = self._work.num_samples
        groups = []
        for first in range(0, len(turns), num_samples):
            group = turns[first : first + num_samples]
            rewards = tuple(reward(turn.completion.token_ids) for turn in group)
            name = str(first // num_samples)
            groups.append(
                ScoredGroup(
                    prompt=Prompt(prompt_id=name, messages=(), environment=""),
                    trajectories=tuple(
                        Trajectory(
                            id=TrajectoryId(prompt_id=name, sample=i),
                            turns=(turn,),
                            rewards=(rewards[i],),
                            status="truncated",
                        )
                        for i, turn in enumerate(group)
                    ),
                    rewards=rewards,
                )
            )
        return self._make_experience(groups)


class _TimedTrainer(PolicyTrainer):
    def __init__(self, model: PreTrainedModel, optimizer: OptimizerSettings, *, clock: PhaseClock) -> None:
        super().__init__(model, optimizer)
        self._clock = clock

    def optim_step(self) -> int:
        with self._clock.phase("optimizer"):
            return super().optim_step()


def _split(clock: PhaseClock) -> dict[str, float]:
    optimizer = clock.seconds("optimizer")
    return {
        "generation": clock.seconds("generation"),
        "preparation": clock.seconds("preparation"),
        "forward and backward": clock.seconds("update") - optimizer,
        "optimizer": optimizer,
        "weight sync": clock.seconds("weight sync"),
    }
