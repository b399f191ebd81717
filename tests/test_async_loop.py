"""The asynchronous loop against the synchronous one, on a tiny model with a real engine and a real trainer."""

from __future__ import annotations

import asyncio
import copy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch

from skyrl_train.algorithms.advantages import grpo
from skyrl_train.algorithms.objective import PolicyObjective
from skyrl_train.algorithms.policy_losses import ppo_clip
from skyrl_train.algorithms.reductions import token_mean
from skyrl_train.async_loop import AsyncJob, train_async
from skyrl_train.engines.embedded.config import EmbeddedConfig
from skyrl_train.engines.embedded.engine import EmbeddedEngine
from skyrl_train.errors import EnvironmentFailure
from skyrl_train.loop import Advantages, Job, Schedule, train
from skyrl_train.observability.metrics import is_wall_clock
from skyrl_train.observability.phases import PhaseTimer
from skyrl_train.rollout.groups import Rollouts
from skyrl_train.rollout.pipeline import RolloutPipeline, RolloutSettings
from skyrl_train.rollout.selection import Selection
from skyrl_train.training.experience import ExperienceMaker
from skyrl_train.training.learner import Learner
from skyrl_train.training.optimizer import OptimizerSettings
from skyrl_train.training.trainer import PolicyTrainer
from skyrl_train.types import Prompt, SamplingParams
from tests.rollout.test_pipeline import make_agent, make_stream
from tests.tiny import make_model, make_tokenizer

STEPS = 5
SAMPLING = SamplingParams(max_new_tokens=24)


@dataclass
class Memory:
    """A run's log, in memory."""

    rows: list[dict[str, float]] = field(default_factory=list)
    rollouts: list[Rollouts] = field(default_factory=list)

    def step(self, step: int, rollouts: Rollouts, advantages: Advantages) -> None:
        self.rollouts.append(rollouts)

    def evaluation(self, step: int, rollouts: Rollouts) -> None:
        pass

    def flush(self, step: int, metrics: dict[str, float]) -> None:
        self.rows.append({**metrics, "step": step})

    @property
    def tokens(self) -> list[tuple[int, ...]]:
        return [turn.completion.token_ids for r in self.rollouts for t in r.trajectories for turn in t.turns]


@dataclass
class Outcome:
    log: Memory
    weights: dict[str, torch.Tensor]


def make_job(*, own_weights: bool, selection: Selection | None = None) -> tuple[Job, Memory]:
    model = make_model(initializer_range=0.02)
    trainer = PolicyTrainer(model, OptimizerSettings(lr=2e-3))
    learner = Learner(
        trainer=trainer,
        loss_fn=PolicyObjective(policy_loss=ppo_clip, reduction=token_mean),
        mini_batch_size=2,
        max_tokens_per_micro_batch=256,
        weights_for="copy" if own_weights else "module",
    )
    engine = EmbeddedEngine(
        copy.deepcopy(model) if own_weights else model,
        make_tokenizer(),
        config=EmbeddedConfig(max_context_len=128, max_num_seqs=32, kv_cache_tokens=8192),
    )
    stream = make_stream()
    log = Memory()
    job = Job(
        schedule=Schedule(total_steps=STEPS, evaluate_every=2, checkpoint_every=-1, export_every=-1),
        prompts=stream,
        eval_prompts=held_out(),
        agent=make_agent(engine.generate),
        engine=engine,
        policy=learner,
        selection=selection or Selection(batch_size=4),
        experience=ExperienceMaker(estimator=grpo),
        num_samples=4,
        num_eval_samples=1,
        sampling=SAMPLING,
        eval_sampling=SamplingParams(max_new_tokens=8, temperature=0.0),
        seed=5,
        max_failed_frac=0.0,
        log=log,
        phases=PhaseTimer(),
        save=lambda step: None,
        export=lambda step: None,
    )
    return job, log


def held_out() -> list[Prompt]:
    return [
        Prompt(prompt_id=f"eval-{i}", messages=({"role": "user", "content": f"held out {i}"},), environment="letters")
        for i in range(3)
    ]


async def synchronous() -> Outcome:
    job, log = make_job(own_weights=False)
    await train(job)
    await job.engine.close()
    return Outcome(log, job.policy.trainer.model.state_dict())  # type: ignore[attr-defined]


async def asynchronous(staleness: int, *, deterministic: bool = True, max_in_flight: int = 1000) -> Outcome:
    job, log = make_job(own_weights=True)
    pipeline = make_pipeline(job, staleness, deterministic=deterministic, max_in_flight=max_in_flight)
    assert await train_async(AsyncJob(job=job, pipeline=pipeline, deterministic=deterministic)) == STEPS
    stats = await job.engine.stats()
    assert stats.num_running == stats.num_waiting == 0
    await job.engine.close()
    return Outcome(log, job.policy.trainer.model.state_dict())  # type: ignore[attr-defined]


def make_pipeline(job: Job, staleness: int, *, deterministic: bool, max_in_flight: int) -> RolloutPipeline:
    return RolloutPipeline(
        lambda gate: make_agent(gate.generate),
        job.engine,
        job.prompts,
        RolloutSettings(num_samples=4, sampling=SAMPLING, seed=5, max_failed_frac=0.0),
        num_ahead=staleness,
        max_in_flight=max_in_flight,
        stop_at_batch=deterministic,
    )


def same_weights(a: Outcome, b: Outcome) -> bool:
    return all(torch.equal(a.weights[name], b.weights[name]) for name in a.weights)


def comparable(row: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in repeatable(row).items() if not name.startswith("async/")}


def repeatable(row: dict[str, float]) -> dict[str, float]:
    """Without what depends on the clock."""
    return {name: value for name, value in row.items() if not is_wall_clock(name)}


@pytest.mark.parametrize("deterministic", [True, False])
async def test_staleness_0_is_the_synchronous_loop_to_the_bit(deterministic: bool) -> None:
    expected, found = await synchronous(), await asynchronous(0, deterministic=deterministic)
    assert found.log.tokens == expected.log.tokens
    assert [comparable(row) for row in found.log.rows] == [comparable(row) for row in expected.log.rows]
    assert same_weights(expected, found)


@pytest.mark.parametrize(("staleness", "max_in_flight"), [(1, 1000), (2, 1000), (3, 9)])
async def test_a_deterministic_run_can_be_repeated_to_the_bit(staleness: int, max_in_flight: int) -> None:
    first = await asynchronous(staleness, max_in_flight=max_in_flight)
    second = await asynchronous(staleness, max_in_flight=max_in_flight)
    assert first.log.tokens == second.log.tokens and same_weights(first, second)
    assert [repeatable(r) for r in first.log.rows] == [repeatable(r) for r in second.log.rows]
    rows = [row for row in first.log.rows if row["step"] > 0]
    assert [row["async/staleness_steps"] for row in rows] == [min(i, staleness) for i in range(STEPS)]


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("staleness", [1, 3])
async def test_every_prompt_comes_once_in_order_and_no_token_is_staler_than_the_bound(
    staleness: int, deterministic: bool
) -> None:
    found = await asynchronous(staleness, deterministic=deterministic)
    ids = [group.prompt.prompt_id for rollouts in found.log.rollouts for group in rollouts.groups]
    stream = make_stream()
    assert ids == [prompt.prompt_id for _ in range(STEPS) for prompt in stream.next_batch()]
    updates_per_step = 2
    for step, rollouts in enumerate(found.log.rollouts):
        for trajectory in rollouts.trajectories:
            spans = trajectory.turns[0].completion.versions
            assert spans[-1].version <= step * updates_per_step, "nothing is sampled from the future"
            assert spans[0].version >= (step - staleness) * updates_per_step
            assert all(span.version % updates_per_step == 0 for span in spans), "no weights in the middle of a step"


async def test_requests_that_meet_a_landing_span_versions() -> None:
    found = await asynchronous(3)
    mixed = [
        [span.version for span in turn.completion.versions]
        for rollouts in found.log.rollouts
        for t in rollouts.trajectories
        for turn in t.turns
        if len(turn.completion.versions) > 1
    ]
    assert mixed and all(versions == sorted(set(versions)) for versions in mixed)
    assert sum(row.get("async/num_requests_over_versions", 0) for row in found.log.rows) == len(mixed)


async def test_a_failing_environment_ends_the_run_and_leaves_nothing_behind() -> None:
    job, _ = make_job(own_weights=True)
    job = replace(job, prompts=make_stream())
    pipeline = make_pipeline(job, 2, deterministic=True, max_in_flight=1000)
    pipeline._agent = replace(pipeline._agent, environments={"letters": partial(_Raises)})
    with pytest.raises(EnvironmentFailure, match="16 of 16 trajectories failed"):
        await train_async(AsyncJob(job=job, pipeline=pipeline, deterministic=True))
    stats = await job.engine.stats()
    assert stats.num_running == stats.num_waiting == 0
    assert [t for t in asyncio.all_tasks() if t.get_name().startswith("trajectory")] == []
    await job.engine.close()


class _Raises:
    def __init__(self, **_: Any) -> None:
        pass

    def init(self, prompt: list[Any]) -> tuple[list[Any], dict[str, Any]]:
        return prompt, {}

    def step(self, action: str) -> Any:
        raise ValueError("never works")

    def close(self) -> None:
        pass
