"""The asynchronous loop: generation goes on while the policy is trained, within a bounded staleness.

    engine    ═ batch 1 ═╪═ batch 2 ═══════╪═ batch 3 ═══════╪═ batch 4 ═══    (staleness 1)
               version 0   │     version 0   │     version 1   │     version 2
    trainer                └─ train batch 1 ─┴─ train batch 2 ─┴─ train batch 3 ─

    ╪ a landing: what runs comes back as tokens; the new weights go in whole, evaluation and checkpoint meet no
      running request; then everything goes on. With more staleness a batch crosses several landings.

Who waits for whom, and until when:
    the trainer     for the batch that it trains on next: the oldest, in the order in which prompts were drawn
    an update       for the trainer's step; deterministic: also for the next batch, so that where it lands depends on
                    tokens alone and a run can be repeated and resumed to the bit
    generation      for a batch to be taken: at most `max_staleness_steps` + 1 batches are ahead of training;
                    deterministic: once the next batch is complete, also for the update
    a trajectory    at the gate, from the landing's begin to its end

Staleness 0 draws a batch, trains, draws the next: the synchronous loop, to the bit. Staleness 1 is one step off
policy. A request that meets a landing goes on under the new weights, and each of its tokens knows its version.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from time import perf_counter

from skyrl_train.engines.base import Engine
from skyrl_train.loop import Job, evaluate, finish_step
from skyrl_train.observability.tracing import span
from skyrl_train.rollout.groups import Rollouts
from skyrl_train.rollout.pipeline import RolloutPipeline
from skyrl_train.training.experience import Experience
from skyrl_train.types import Prompt, ScoredGroup
from skyrl_train.weight_sync.sync import sync_weights

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 5.0


@dataclass(frozen=True, kw_only=True)
class AsyncJob:
    """A `Job` whose engine has weights of its own, and the pipeline that rolls out ahead.

    `beside` is entered in the training thread: on a GPU it gives the trainer a stream of its own.
    """

    job: Job
    pipeline: RolloutPipeline
    deterministic: bool
    beside: Callable[[], AbstractContextManager[object]] = field(default=nullcontext)


async def train_async(run: AsyncJob, *, first_step: int = 0) -> int:
    """As `loop.train`: the steps after `first_step`, to the end or until `job.stop`; returns the last complete one."""
    job, pipeline = run.job, run.pipeline
    phases, total = job.phases, job.schedule.total_steps
    step = first_step
    if step == 0 and job.schedule.evaluate_first and job.schedule.evaluate_every > 0:
        job.log.flush(0, await evaluate(job, 0))
    try:
        while step < total and not job.stop.is_set():
            with span("step", step=step + 1):
                began = perf_counter()
                await pipeline.advance(step, at_most=_batches_left(job, total - step))
                staleness: list[int] = []

                def next_batch(completed: int = step, staleness: list[int] = staleness) -> list[Prompt]:
                    prompts = pipeline.next_batch(completed)
                    staleness.append(pipeline.staleness(prompts, completed))
                    return prompts

                with phases("rollout"):
                    selected = await job.selection.draw(pipeline.roll_out, next_batch)
                    if job.watch is not None:
                        await job.watch.look()
                step += 1
                with phases("train"):
                    experience, metrics = await _learn(run, selected.groups)
                update = job.policy.export_weights()
                with phases("prepare_weights"):
                    await job.engine.prepare_weights(update)
                with phases("landing"):
                    if run.deterministic:
                        await next_is_complete(pipeline, job.engine)
                    await pipeline.gate.shut()
                    await pipeline.gate.rest()
                with phases("weight_sync"):
                    await sync_weights(job.engine, update)
                rollouts = selected.rollouts
                metrics |= rollouts.metrics() | selected.metrics | experience.metrics
                metrics |= _version_lag(rollouts, int(metrics["policy/version"]))
                metrics |= {
                    "async/staleness_steps": max(staleness),
                    "async/batches_ahead": pipeline.num_ahead,
                    "async/num_parked_requests": pipeline.gate.num_parked,
                    "async/num_resampled_total": pipeline.gate.num_resampled_total,
                    "throughput/rollout_tokens_per_s": metrics["rollout/num_tokens"] / (perf_counter() - began),
                }
                await finish_step(job, step, rollouts, experience, metrics)
    finally:
        await pipeline.close()
    return step


async def next_is_complete(pipeline: RolloutPipeline, engine: Engine) -> None:
    """Returns when the next batch is complete, or can't be before the update: an engine whose server was started again
    while the policy was trained has no weights to go on with, and waits for these.
    """
    complete = asyncio.ensure_future(pipeline.next_is_complete())
    try:
        while not complete.done():
            await asyncio.wait({complete}, timeout=LOOK_EVERY_S)
            if not complete.done() and (await engine.stats()).paused:
                logger.warning(
                    "engine %s is paused and waits for new weights: they land before the next batch is complete, and "
                    "this run can't be repeated to the bit",
                    engine.info.name,
                )
                return
        complete.result()
    finally:
        complete.cancel()


async def _learn(run: AsyncJob, groups: tuple[ScoredGroup, ...]) -> tuple[Experience, dict[str, float]]:
    """One training step in a thread of its own; the event loop goes on stepping the engine."""

    def learn() -> tuple[Experience, dict[str, float]]:
        with run.beside():
            experience = run.job.experience(groups)
            return experience, run.job.policy.update(experience)

    # A cancelled wait does not end the thread: whoever stops the run must not touch the trainer before it did.
    task = asyncio.ensure_future(asyncio.to_thread(learn))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.gather(task, return_exceptions=True)
        raise


def _batches_left(job: Job, steps_left: int) -> int | None:
    """Batches that the rest of the run will take; unknown where a step may draw more than one."""
    return steps_left if job.selection.draws_one_batch else None


def _version_lag(rollouts: Rollouts, version: int) -> dict[str, float]:
    """How many policy versions before the update's result the step's tokens were sampled under."""
    spans = [s for t in rollouts.trajectories for turn in t.turns for s in turn.completion.versions]
    tokens = sum(span.end - span.start for span in spans)
    lags = [(version - span.version) * (span.end - span.start) for span in spans]
    mixed = sum(len(turn.completion.versions) > 1 for t in rollouts.trajectories for turn in t.turns)
    return {
        "async/version_lag_mean": sum(lags) / max(tokens, 1),
        "async/version_lag_max": max((version - span.version for span in spans), default=0),
        "async/num_requests_over_versions": mixed,
    }
