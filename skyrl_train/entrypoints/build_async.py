"""What the asynchronous loop needs beside a `Job`: an engine with weights of its own, and the pipeline."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from transformers import PreTrainedModel

from skyrl_train.async_loop import AsyncJob
from skyrl_train.config.schema import Config
from skyrl_train.engines.base import GenerateFn
from skyrl_train.loop import Job
from skyrl_train.rollout.agent import Agent
from skyrl_train.rollout.pipeline import RolloutPipeline, RolloutSettings


def own_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A second module with the same weights: the engine serves it while the first one is trained."""
    other = copy.deepcopy(model)
    other.requires_grad_(False).eval()  # type: ignore[no-untyped-call]
    return other


def build_pipeline(config: Config, job: Job, make_agent: Callable[[GenerateFn], Agent]) -> RolloutPipeline:
    """Rolls out up to `max_staleness_steps` batches ahead of the one that is trained on."""
    keys = config.trainer.fully_async
    return RolloutPipeline(
        lambda gate: make_agent(gate.generate),
        job.engine,
        job.prompts,
        RolloutSettings(
            num_samples=job.num_samples,
            sampling=job.sampling,
            seed=job.seed,
            max_failed_frac=job.max_failed_frac,
            greedy_baseline=job.greedy_baseline,
        ),
        num_ahead=keys.max_staleness_steps,
        max_in_flight=keys.num_parallel_generation_workers,
        stop_at_batch=keys.deterministic,
        generate=None if job.sessions is None else job.sessions.generate,
    )


def build_async(config: Config, job: Job, pipeline: RolloutPipeline, *, device: str) -> AsyncJob:
    """The job with its pipeline; on a GPU the trainer works on a stream of its own beside the engine's."""
    return AsyncJob(
        job=job,
        pipeline=pipeline,
        deterministic=config.trainer.fully_async.deterministic,
        beside=_stream_of_its_own() if device == "cuda" else nullcontext,
    )


def _stream_of_its_own() -> Callable[[], AbstractContextManager[None]]:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    @contextmanager
    def beside() -> Iterator[None]:
        # What the main thread queued on the weights comes first, and it sees them only once they are whole.
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream):
            yield
        stream.synchronize()

    return beside
