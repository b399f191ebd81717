"""Evaluation alone: a model answers the held-out prompts and their environment scores them; nothing is trained.

The command line and its keys are the main job's: the model is trainer.policy.model.path, sampling is
generator.eval_sampling_params and generator.eval_n_samples_per_prompt.

    python -m skyrl_train.entrypoints.main_generate trainer.policy.model.path=runs/quickstart/export

writes `<run_path>/generate/`: metrics.jsonl (one row) and rollouts/eval_000000.jsonl. Exit codes as the main job's.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from skyrl_train.config.load import LoadedConfig
from skyrl_train.entrypoints.main_base import read_command


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate as the command line says; returns the exit code."""
    loaded = read_command(sys.argv[1:] if argv is None else argv)
    if isinstance(loaded, int):
        return loaded
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # As the main job: torch is imported only once the configuration is known to run here.
    from skyrl_train.entrypoints.run import run

    return run(loaded, generate)


def generate(loaded: LoadedConfig, run_dir: Path) -> int:
    """Answer, score, write, print the figures."""
    import torch

    from skyrl_train.data.stream import eval_prompts
    from skyrl_train.engines.base import Engine
    from skyrl_train.entrypoints.build import device_of, engine_over
    from skyrl_train.entrypoints.build_rollouts import (
        build_agent,
        build_sessions,
        load_data,
        load_tokenizer,
        sampling_params,
    )
    from skyrl_train.entrypoints.build_servers import describe_servers
    from skyrl_train.entrypoints.extensions import check_extensions
    from skyrl_train.entrypoints.run import DONE
    from skyrl_train.errors import ConfigError
    from skyrl_train.loop import evaluation_metrics
    from skyrl_train.observability.rollouts import RolloutLog
    from skyrl_train.observability.trackers import JsonlTracker
    from skyrl_train.rollout.groups import Rollouts, run_groups
    from skyrl_train.training.builtin_model import is_builtin, prepare_builtin
    from skyrl_train.training.model import load_model

    config, keys = loaded.config, loaded.config.trainer
    check_extensions(config)
    path = keys.policy.model.path
    folder = prepare_builtin(path, seed=keys.seed, on_progress=lambda *_: None) if is_builtin(path) else Path(path)
    tokenizer = load_tokenizer(folder)
    data = load_data(config, tokenizer)
    if not data.held_out:
        raise ConfigError("there is nothing to evaluate on: data.val_data is empty")
    engine: Engine
    if config.generator.backend == "embedded":
        dtype = getattr(torch, keys.policy.model.dtype or "float32")
        engine = engine_over(load_model(folder, dtype=dtype, device=device_of(config)), config, tokenizer)
    else:
        engine = asyncio.run(describe_servers(config, tokenizer, model_folder=folder, by_user=loaded.by_user))

    async def answers() -> Rollouts:
        await engine.start()
        sessions = build_sessions(config, engine)
        generate = engine.generate if sessions is None else sessions.generate
        try:
            return await run_groups(
                build_agent(config, generate, tokenizer, data, engine=engine, sessions=sessions),
                eval_prompts(data.held_out),
                num_samples=config.generator.eval_n_samples_per_prompt,
                sampling=sampling_params(config.generator.eval_sampling_params),
                run_seed=keys.seed,
                max_failed_frac=config.environment.max_failed_frac,
            )
        finally:
            if sessions is not None:
                await sessions.close()
            await engine.close()

    rollouts = asyncio.run(answers())
    metrics = evaluation_metrics(rollouts, num_samples=config.generator.eval_n_samples_per_prompt)
    out = run_dir / "generate"
    # All of them: who evaluates wants to read the answers.
    log = RolloutLog(out / "rollouts", lambda ids: tokenizer.decode(list(ids)), max_trajectories=sys.maxsize)
    log.write(0, (*rollouts.groups, *rollouts.failed), kind="eval")
    tracker = JsonlTracker(out / "metrics.jsonl")
    tracker.log(0, metrics)
    tracker.close()
    for name, value in metrics.items():
        print(f"{name} {value:.6g}")
    print(f"answers {out / 'rollouts'}")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
