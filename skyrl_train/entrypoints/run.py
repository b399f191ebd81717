"""One run from start to end: its folder, the models, resuming, Ctrl-C, the report."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from transformers.utils.logging import disable_progress_bar

from skyrl_train.async_loop import train_async
from skyrl_train.config.load import LoadedConfig, plain
from skyrl_train.config.schema import Config
from skyrl_train.data.chat import response_text
from skyrl_train.data.stream import PromptStream, eval_prompts
from skyrl_train.engines.base import GenerateFn
from skyrl_train.entrypoints.build import build_engine, build_experience, build_learner, build_selection, device_of
from skyrl_train.entrypoints.build_async import build_async, build_pipeline
from skyrl_train.entrypoints.build_rollouts import (
    build_agent,
    build_sessions,
    load_data,
    load_tokenizer,
    sampling_params,
)
from skyrl_train.entrypoints.build_servers import build_turns
from skyrl_train.entrypoints.extensions import check_extensions
from skyrl_train.entrypoints.observed import build_endpoint, build_series, observed, on_phase
from skyrl_train.entrypoints.run_log import RunFiles
from skyrl_train.entrypoints.run_state import RunState
from skyrl_train.errors import ConfigError, SkyRLError
from skyrl_train.loop import Job, Schedule, train
from skyrl_train.observability.endpoint import MetricsEndpoint
from skyrl_train.observability.engine_watch import EngineWatch
from skyrl_train.observability.files import replace_file
from skyrl_train.observability.metrics import read_metrics
from skyrl_train.observability.phases import PhaseTimer
from skyrl_train.observability.progress import Progress
from skyrl_train.observability.report import write_report
from skyrl_train.observability.tracing import traced
from skyrl_train.rollout.agent import Agent
from skyrl_train.rollout.pipeline import RolloutPipeline
from skyrl_train.training.builtin_model import is_builtin, prepare_builtin
from skyrl_train.training.checkpoint import CheckpointStore
from skyrl_train.weight_sync.sync import sync_weights

logger = logging.getLogger(__name__)

ROLLOUTS = "rollouts"
"""The part of a checkpoint that holds what the asynchronous loop has in flight."""

DONE, REFUSED, FAILED, INTERRUPTED = 0, 2, 3, 130

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def run(loaded: LoadedConfig, body: Callable[[LoadedConfig, Path], int] | None = None) -> int:
    """Train, resume or finish the configured run; returns the exit code. `body` is a recipe's own loop."""
    run_dir = Path(loaded.config.trainer.run_path or "")
    disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers' own bars would tear the live view
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        tracing = loaded.config.generator.metrics.tracing
        collector = tracing.otlp_endpoint if tracing.enabled else None
        with _only_run_in(run_dir), traced(collector, run=loaded.config.trainer.run_name):
            return (body or _run)(loaded, run_dir)
    except KeyboardInterrupt:
        saved = CheckpointStore(str(loaded.config.trainer.ckpt_path)).steps()
        what = "goes on from the last checkpoint" if saved else "starts anew: there is no checkpoint yet"
        print(f"stopped; the same command {what}", file=sys.stderr)
        return INTERRUPTED
    except (SkyRLError, ExceptionGroup) as exc:
        # Many trajectories can fail of one cause; what is not ours is a bug and keeps its traceback.
        leaves = _leaves(exc)
        if not all(isinstance(leaf, SkyRLError) for leaf in leaves):
            raise
        for message in dict.fromkeys(str(leaf) for leaf in leaves):
            print(f"error: {message}", file=sys.stderr)
        return REFUSED if any(isinstance(leaf, ConfigError) for leaf in leaves) else FAILED
    except (OSError, SafetensorError) as exc:
        if not _is_no_room(exc):
            raise
        print(
            f"error: there is no room for what the run writes: {exc}; checkpoints are as they were. Make room, and the "
            "same command goes on from the last one",
            file=sys.stderr,
        )
        return FAILED


def _run(loaded: LoadedConfig, run_dir: Path) -> int:
    config, keys = loaded.config, loaded.config.trainer
    check_extensions(config)
    torch.manual_seed(keys.seed)
    replace_file(run_dir / "config.yaml", loaded.to_yaml().encode())
    state = RunState(keys, plain(config), loaded_later=[ROLLOUTS] if keys.fully_async.enabled else [])
    with Progress(keys.run_name, 0, model=keys.policy.model.path, engine=config.generator.backend) as progress:
        model_folder = (
            prepare_builtin(keys.policy.model.path, seed=keys.seed, on_progress=progress.warm_start)
            if is_builtin(keys.policy.model.path)
            else Path(keys.policy.model.path)
        )
        tokenizer = load_tokenizer(model_folder)
        data = load_data(config, tokenizer)
        prompts = PromptStream(
            data.train, batch_size=keys.train_batch_size, seed=keys.seed, shuffle=config.data.shuffle
        )
        total_steps = min(prompts.num_steps(keys.epochs), keys.max_steps or sys.maxsize)
        learner = build_learner(config, model_folder, total_steps=total_steps)
        first_step = state.restore(learner.parts(), prompts)
        if first_step:
            progress.message(f"resumed after step {first_step} from {state.resumed_from}")
        for change in state.changes:
            progress.message(f"changed since that checkpoint: {change}")
        if state.set_aside is not None:
            progress.message(f"checkpoints of the earlier run were moved to {state.set_aside}")
        engine = build_engine(
            config,
            learner,
            tokenizer,
            model_folder=model_folder,
            by_user=loaded.by_user,
        )
        progress.set_total(total_steps, first_step=first_step)
        if first_step:
            progress.restore(row for row in read_metrics(run_dir / "metrics.jsonl") if row["step"] <= first_step)
        series = build_series(config, total_steps=total_steps)
        endpoint = build_endpoint(config, series, engine)
        phases = PhaseTimer(on_start=on_phase(progress, series))
        pipeline: RolloutPipeline | None = None

        def save(step: int) -> None:
            in_flight = pipeline
            if in_flight is None:
                state.save(step, learner.parts(), prompts.state_dict())
            else:
                parts = {**learner.parts(), ROLLOUTS: (in_flight.save, lambda folder: in_flight.load(folder, step))}
                state.save(step, parts, in_flight.stream_state())

        def export(step: int) -> None:
            last = step == total_steps
            folder = Path(keys.export_path or run_dir / "export")
            learner.trainer.export(tokenizer, folder if last else folder / f"global_step_{step}")

        with RunFiles(
            config,
            run_dir,
            progress,
            phases,
            decode=lambda ids: tokenizer.decode(list(ids)),
            show=lambda ids: response_text(tokenizer, ids),
            resume_step=first_step or None,
            total_steps=total_steps,
            also=() if series is None else (series,),
        ) as log:
            sessions = build_sessions(config, engine)

            def agent(generate: GenerateFn) -> Agent:
                return build_agent(config, generate, tokenizer, data, engine=engine, sessions=sessions)

            job = Job(
                schedule=Schedule(
                    total_steps=total_steps,
                    evaluate_every=keys.eval_interval,
                    checkpoint_every=keys.ckpt_interval,
                    export_every=keys.hf_save_interval,
                    evaluate_first=keys.eval_before_train,
                ),
                prompts=prompts,
                eval_prompts=eval_prompts(data.held_out),
                agent=agent(engine.generate if sessions is None else sessions.generate),
                engine=engine,
                policy=learner,
                selection=build_selection(config),
                experience=build_experience(config, learner),
                num_samples=config.generator.n_samples_per_prompt,
                num_eval_samples=config.generator.eval_n_samples_per_prompt,
                sampling=sampling_params(config.generator.sampling_params),
                eval_sampling=sampling_params(config.generator.eval_sampling_params),
                seed=keys.seed,
                max_failed_frac=config.environment.max_failed_frac,
                greedy_baseline=keys.algorithm.advantage_estimator == "remax",
                sessions=sessions,
                turns=build_turns(config, engine),
                watch=EngineWatch(engine, every_s=0.2 if config.generator.backend == "embedded" else 2.0),
                log=log,
                phases=phases,
                save=save,
                export=export,
            )
            if keys.fully_async.enabled:
                pipeline = build_pipeline(config, job, agent)
            # What is built stays: without this the collector walks all of it every few steps.
            gc.collect()
            gc.freeze()
            last_step = asyncio.run(_train(config, job, pipeline, state, first_step, progress, endpoint))
        report = write_report(run_dir)
        progress.message(f"report {report}")
        if last_step < total_steps:
            raise KeyboardInterrupt
        progress.message(f"model  {keys.export_path}")
    return DONE


async def _train(
    config: Config,
    job: Job,
    pipeline: RolloutPipeline | None,
    state: RunState,
    first_step: int,
    progress: Progress,
    endpoint: MetricsEndpoint | None,
) -> int:
    """Runs the configured loop; the first Ctrl-C ends it after the step in flight, the second does not save it."""
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None

    started = False

    def interrupt() -> None:
        if job.stop.is_set() or not started:
            task.cancel()
            return
        job.stop.set()
        progress.message("stopping after this step, with a checkpoint; Ctrl-C again stops without one")

    loop.add_signal_handler(signal.SIGINT, interrupt)
    loop.add_signal_handler(signal.SIGTERM, interrupt)
    try:
        await _start_engine(config, job, progress)
        started = True
        async with observed(job.watch, endpoint, progress):
            if pipeline is None:
                return await train(job, first_step=first_step)
            if state.resumed_from is not None and (state.resumed_from / ROLLOUTS).is_dir():
                pipeline.load(state.resumed_from / ROLLOUTS, first_step)
            run = build_async(config, job, pipeline, device=device_of(config))
            return await train_async(run, first_step=first_step)
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    finally:
        try:
            if job.sessions is not None:
                await job.sessions.close()
        finally:
            await job.engine.close()
        loop.remove_signal_handler(signal.SIGINT)
        loop.remove_signal_handler(signal.SIGTERM)


async def _start_engine(config: Config, job: Job, progress: Progress) -> None:
    """A server gets the trainer's weights at once: what it loaded is where a run begins, not where it resumes."""
    if config.generator.backend == "embedded":
        await job.engine.start()
        return
    ours = config.generator.run_engines_locally
    where = f"its log is in {config.trainer.run_path}/engines" if ours else "somebody else runs it"
    progress.message(f"{'starting' if ours else 'attaching to'} {job.engine.info.name}; {where}")
    with job.phases("engine_start"):
        await job.engine.start()
    with job.phases("weight_sync"):
        await sync_weights(job.engine, job.policy.export_weights())
    progress.message(f"{job.engine.info.name} is up with the policy's weights")


@contextlib.contextmanager
def _only_run_in(run_dir: Path) -> Iterator[None]:
    """Holds the folder: two processes in one would write over each other. The kernel lets go at any exit."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file: IO[Any] = (run_dir / ".lock").open("a+")
    except OSError as exc:
        raise ConfigError(f"the run's folder {run_dir} can't be written: {exc}; set trainer.run_path") from exc
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            file.seek(0)
            raise ConfigError(
                f"{run_dir} belongs to a run that is going on (process {file.read().strip()}); "
                "wait for it, or give this one another trainer.run_name"
            ) from exc
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _is_no_room(exc: OSError | SafetensorError) -> bool:
    if isinstance(exc, OSError):
        return exc.errno in NO_ROOM
    return any(f"(os error {number})" in str(exc) for number in NO_ROOM)


def _leaves(exc: Exception) -> Sequence[Exception]:
    if not isinstance(exc, ExceptionGroup):
        return [exc]
    return [leaf for inner in exc.exceptions for leaf in _leaves(inner)]
