"""The synchronous loop, on one page.

    prompts ──► rollouts ──► advantages ──► samples ──► update ──► weights to the engine ──┐
       ▲        engine +      algorithms     rollout     trainer      weight_sync          │
       └───────────────────────────────────── next step ◄───────────────────────────────────┘

Everything the loop calls is handed to it in a `Job`; entrypoints/build.py makes one from a configuration.
A step is whole or it did not happen: what is on disk after a kill is the last checkpoint and, in
`metrics.jsonl`, steps that are done again in exactly the same way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from skyrl_train.data.stream import PromptStream
from skyrl_train.engines.base import Engine
from skyrl_train.observability.engine_watch import EngineWatch
from skyrl_train.observability.phases import PhaseTimer
from skyrl_train.observability.tracing import span
from skyrl_train.rollout.agent import Agent
from skyrl_train.rollout.groups import Rollouts, run_groups
from skyrl_train.rollout.pass_at_k import pass_at_k_metrics
from skyrl_train.rollout.sessions import Sessions
from skyrl_train.training.experience import Experience
from skyrl_train.types import Prompt, SamplingParams, ScoredGroup, TrajectoryId, WeightUpdate
from skyrl_train.weight_sync.sync import Turns, sync_weights


class Policy(Protocol):
    """What the loop asks of the training side: learn from samples, then say where the new weights are."""

    def update(self, experience: Experience) -> dict[str, float]: ...

    def export_weights(self) -> WeightUpdate: ...


class Selected(Protocol):
    """What a step learns from, `groups`, out of all that was rolled out for it, `rollouts`."""

    @property
    def groups(self) -> tuple[ScoredGroup, ...]: ...

    @property
    def rollouts(self) -> Rollouts: ...

    @property
    def metrics(self) -> dict[str, float]: ...


class Selection(Protocol):
    """Which rollouts become training data. `draws_one_batch`: `draw` takes exactly one batch of prompts a step."""

    @property
    def draws_one_batch(self) -> bool: ...

    async def draw(
        self,
        roll_out: Callable[[Sequence[Prompt]], Awaitable[Rollouts]],
        next_prompts: Callable[[], list[Prompt]],
    ) -> Selected: ...


class RunLog(Protocol):
    """Where a step's results go: trackers, rollouts on disk, the terminal."""

    def step(self, step: int, rollouts: Rollouts, advantages: Advantages) -> None: ...

    def evaluation(self, step: int, rollouts: Rollouts) -> None: ...

    def flush(self, step: int, metrics: dict[str, float]) -> None: ...


Advantages = Mapping[TrajectoryId, float]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When what is due. Intervals count steps; -1 is only at the end (never, for `evaluate_every`)."""

    total_steps: int
    evaluate_every: int
    checkpoint_every: int
    export_every: int
    evaluate_first: bool = True

    def due(self, interval: int, step: int) -> bool:
        return interval > 0 and step % interval == 0


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run, built. `save` and `export` take the step that is complete; `stop` is set to end after this step.
    `turns` is there where trainer and engine share GPUs and can't both hold their memory."""

    schedule: Schedule
    prompts: PromptStream
    eval_prompts: Sequence[Prompt]
    agent: Agent
    engine: Engine
    policy: Policy
    selection: Selection
    experience: Callable[[Sequence[ScoredGroup]], Experience]
    num_samples: int
    num_eval_samples: int
    sampling: SamplingParams
    eval_sampling: SamplingParams
    seed: int
    max_failed_frac: float
    greedy_baseline: bool = False
    sessions: Sessions | None = None
    watch: EngineWatch | None = None
    turns: Turns | None = None
    log: RunLog
    phases: PhaseTimer
    save: Callable[[int], None]
    export: Callable[[int], None]
    stop: asyncio.Event = field(default_factory=asyncio.Event)


async def train(job: Job, *, first_step: int = 0) -> int:
    """Runs the steps after `first_step` to the end or until `job.stop`; returns the last complete step."""
    step = first_step
    if step == 0 and job.schedule.evaluate_first and job.schedule.evaluate_every > 0:
        job.log.flush(0, await evaluate(job, 0))
    while step < job.schedule.total_steps and not job.stop.is_set():
        step += 1
        with span("step", step=step):
            await _train_step(job, step)
    return step


async def _train_step(job: Job, step: int) -> None:
    phases = job.phases
    with phases("rollout"):
        selected = await job.selection.draw(partial(roll_out, job), job.prompts.next_batch)
        rollouts = selected.rollouts
        if job.watch is not None:
            await job.watch.look()
    if job.turns is not None:
        with phases("engine_sleep"):
            await job.turns.to_trainer(job.engine)
    with phases("advantages"):
        experience = job.experience(selected.groups)
    with phases("train"):
        metrics = job.policy.update(experience)
    with phases("weight_sync"):
        await sync_weights(job.engine, job.policy.export_weights(), turns=job.turns)
    metrics |= rollouts.metrics() | selected.metrics | experience.metrics
    metrics |= {"throughput/rollout_tokens_per_s": metrics["rollout/num_tokens"] / phases.seconds("rollout")}
    await finish_step(job, step, rollouts, experience, metrics)


async def finish_step(
    job: Job, step: int, rollouts: Rollouts, experience: Experience, metrics: dict[str, float]
) -> None:
    """What follows every update, in either loop: rollouts and metrics to the log, and what is due after `step`."""
    due, phases, last = job.schedule.due, job.phases, step == job.schedule.total_steps
    job.log.step(step, rollouts, experience.advantages)
    if job.watch is not None:
        metrics |= await job.watch.step()
    if due(job.schedule.evaluate_every, step) or (last and job.schedule.evaluate_every > 0):
        metrics |= await evaluate(job, step)
    # The checkpoint last: a kill before it does the step again, and its row and export are made anew; the other
    # way round they would be lost. So the seconds of saving stand in the next step's row.
    job.log.flush(step, metrics)
    if due(job.schedule.export_every, step) or last:
        with phases("export"):
            job.export(step)
    if due(job.schedule.checkpoint_every, step) or last or job.stop.is_set():
        with phases("checkpoint"):
            job.save(step)


async def roll_out(job: Job, prompts: Sequence[Prompt]) -> Rollouts:
    """All samples of these prompts, from the policy as it is now."""
    return await run_groups(
        job.agent,
        prompts,
        num_samples=job.num_samples,
        sampling=job.sampling,
        run_seed=job.seed,
        max_failed_frac=job.max_failed_frac,
        greedy_baseline=job.greedy_baseline,
    )


async def evaluate(job: Job, step: int) -> dict[str, float]:
    """Held-out prompts, greedy unless asked otherwise."""
    if not job.eval_prompts:
        return {}
    with job.phases("evaluate"):
        rollouts = await run_groups(
            job.agent,
            job.eval_prompts,
            num_samples=job.num_eval_samples,
            sampling=job.eval_sampling,
            run_seed=job.seed,
            max_failed_frac=job.max_failed_frac,
        )
    # What comes next must not depend on whether this evaluation ran in this process or before a resume: a prefix
    # from the cache and one that is computed may differ in the last bit.
    await job.engine.flush_cache()
    job.log.evaluation(step, rollouts)
    return evaluation_metrics(rollouts, num_samples=job.num_eval_samples)


def evaluation_metrics(rollouts: Rollouts, *, num_samples: int) -> dict[str, float]:
    """`eval/accuracy` is the fraction of answers with a full reward of 1; of several answers a prompt also pass@k."""
    rewards = [trajectory.reward for trajectory in rollouts.trajectories]
    lengths = rollouts.metrics()
    return {
        "eval/accuracy": sum(reward >= 1.0 for reward in rewards) / len(rewards),
        "eval/reward_mean": sum(rewards) / len(rewards),
        "eval/response_len_mean": lengths["rollout/response_len_mean"],
        "eval/num_failed": rollouts.num_failed,
        **(pass_at_k_metrics(rollouts, num_samples=num_samples) if num_samples > 1 else {}),
    }
