"""The gate and the pipeline over a real engine: shutting and reopening changes nothing but when."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from skyrl_train.data.rows import PromptRow
from skyrl_train.data.stream import PromptStream
from skyrl_train.engines.embedded.config import EmbeddedConfig
from skyrl_train.engines.embedded.engine import EmbeddedEngine
from skyrl_train.errors import CheckpointError
from skyrl_train.rollout.agent import Agent
from skyrl_train.rollout.gate import Gate
from skyrl_train.rollout.groups import run_groups
from skyrl_train.rollout.journal import trajectory_from_json, trajectory_to_json
from skyrl_train.rollout.pipeline import RolloutPipeline, RolloutSettings
from skyrl_train.types import LocalWeights, SamplingParams, Trajectory, WeightUpdate
from skyrl_train.weight_sync.sync import sync_weights
from tests.entrypoints.letters import LetterEnv
from tests.tiny import make_model, make_tokenizer

SAMPLING = SamplingParams(max_new_tokens=40, ignore_eos=True)
SETTINGS = RolloutSettings(num_samples=3, sampling=SAMPLING, seed=5, max_failed_frac=0.0)


def make_engine(kind: type[EmbeddedEngine] = EmbeddedEngine, **config: Any) -> EmbeddedEngine:
    settings: dict[str, Any] = {"max_context_len": 256, "max_num_seqs": 64, "kv_cache_tokens": 16384, **config}
    return kind(make_model(), make_tokenizer(), config=EmbeddedConfig(**settings))


def make_stream(*, num_rows: int = 20, batch_size: int = 4) -> PromptStream:
    rows = [
        PromptRow(messages=({"role": "user", "content": f"row {i}"},), environment="letters", target=None, extras={})
        for i in range(num_rows)
    ]
    return PromptStream(rows, batch_size=batch_size, seed=1)


def make_agent(generate: Any) -> Agent:
    return Agent(generate=generate, tokenizer=make_tokenizer(), environments={"letters": LetterEnv})


def make_pipeline(engine: EmbeddedEngine, stream: PromptStream, **options: Any) -> RolloutPipeline:
    settings: dict[str, Any] = {"num_ahead": 1, "max_in_flight": 1000, "stop_at_batch": False, **options}
    return RolloutPipeline(lambda gate: make_agent(gate.generate), engine, stream, SETTINGS, **settings)


def tokens(trajectories: list[Trajectory]) -> list[tuple[int, ...]]:
    return [turn.completion.token_ids for trajectory in trajectories for turn in trajectory.turns]


async def synchronous(num_batches: int) -> list[list[Trajectory]]:
    engine, stream = make_engine(), make_stream()
    result = []
    for _ in range(num_batches):
        rollouts = await run_groups(
            make_agent(engine.generate), stream.next_batch(), num_samples=3, sampling=SAMPLING, run_seed=5
        )
        result.append(rollouts.trajectories)
    await engine.close()
    return result


async def shut_after_steps(pipeline: RolloutPipeline, engine: EmbeddedEngine, count: int) -> None:
    """Let the engine make some steps, then bring everything to rest."""
    begin = (await engine.stats()).num_steps_total
    while (await engine.stats()).num_steps_total < begin + count:
        await asyncio.sleep(0)
    await pipeline.gate.shut()
    await pipeline.gate.rest()


@pytest.mark.parametrize("num_ahead", [0, 1, 3])
async def test_batches_come_in_the_streams_order_with_the_tokens_of_the_synchronous_rollout(num_ahead: int) -> None:
    engine = make_engine()
    pipeline = make_pipeline(engine, make_stream(), num_ahead=num_ahead)
    for completed, expected in enumerate(await synchronous(4)):
        await pipeline.advance(completed)
        prompts = pipeline.next_batch(completed)
        rollouts = await pipeline.roll_out(prompts)
        assert pipeline.num_ahead == num_ahead
        assert [t.id for t in rollouts.trajectories] == [t.id for t in expected]
        assert tokens(rollouts.trajectories) == tokens(expected)
        assert pipeline.staleness(prompts, completed) == min(completed, num_ahead)
        await pipeline.gate.shut()
    await pipeline.close()
    await engine.close()


async def test_what_is_shut_in_the_middle_goes_on_where_it_was_and_knows_its_versions() -> None:
    (expected,) = await synchronous(1)
    engine = make_engine()
    pipeline = make_pipeline(engine, make_stream(), max_in_flight=7)
    await pipeline.advance(0)
    prompts = pipeline.next_batch(0)
    for version in (1, 2):
        await shut_after_steps(pipeline, engine, 7)
        assert (await engine.stats()).num_running == 0 and (await engine.stats()).num_waiting == 0
        await sync_weights(engine, WeightUpdate(version=version, source=LocalWeights()))
        await pipeline.advance(0)
    rollouts = await pipeline.roll_out(prompts)
    assert tokens(rollouts.trajectories) == tokens(expected)
    for trajectory, alone in zip(rollouts.trajectories, expected, strict=True):
        got, wanted = trajectory.turns[0].completion, alone.turns[0].completion
        assert got.logprobs == pytest.approx(wanted.logprobs, abs=1e-5) and got.finish_reason == wanted.finish_reason
    crossed = [t.turns[0].completion.versions for t in rollouts.trajectories]
    assert [span.version for span in crossed[0]] == [0, 1, 2], "the first one was on its way at both updates"
    assert pipeline.gate.num_parked == 7
    await pipeline.close()
    await engine.close()


@pytest.mark.parametrize("num_steps", [1, 9, 33, 60])
async def test_a_pipeline_that_was_killed_at_rest_goes_on_to_the_same_bits(tmp_path: Path, num_steps: int) -> None:
    async def go_on(pipeline: RolloutPipeline) -> list[Trajectory]:
        found: list[Trajectory] = []
        for _ in range(3):
            await pipeline.advance(1)
            found += (await pipeline.roll_out(pipeline.next_batch(1))).trajectories
            await pipeline.gate.shut()
        return found

    options: dict[str, Any] = {"num_ahead": 2, "max_in_flight": 10}
    engine, stream = make_engine(), make_stream()
    pipeline = make_pipeline(engine, stream, **options)
    await pipeline.advance(0)
    await pipeline.roll_out(pipeline.next_batch(0))
    await shut_after_steps(pipeline, engine, num_steps)
    await engine.flush_cache()
    position = pipeline.stream_state()
    pipeline.save(tmp_path)
    expected = await go_on(pipeline)

    other_engine, other_stream = make_engine(), make_stream()
    other_stream.load_state_dict(position)
    resumed = make_pipeline(other_engine, other_stream, **options)
    resumed.load(tmp_path, 1)
    assert await go_on(resumed) == expected
    for each in (pipeline, resumed):
        await each.close()
    await engine.close()
    await other_engine.close()


async def test_rollouts_of_other_data_are_refused(tmp_path: Path) -> None:
    engine = make_engine()
    pipeline = make_pipeline(engine, make_stream())
    await pipeline.advance(0)
    await pipeline.gate.shut()
    await pipeline.gate.rest()
    pipeline.save(tmp_path)
    other = make_pipeline(engine, make_stream(num_rows=19))
    with pytest.raises(CheckpointError, match="the data or its chat template changed since"):
        other.load(tmp_path, 0)
    await other.close()
    await pipeline.close()
    await engine.close()


async def test_the_gate_shuts_by_itself_when_the_batch_in_training_and_the_next_are_there() -> None:
    engine = make_engine()
    pipeline = make_pipeline(engine, make_stream(), num_ahead=2, max_in_flight=12, stop_at_batch=True)
    await pipeline.advance(0)
    await pipeline.roll_out(pipeline.next_batch(0))
    assert pipeline.gate.is_open
    await pipeline.next_is_complete()
    assert not pipeline.gate.is_open
    await pipeline.gate.rest()
    steps = (await engine.stats()).num_steps_total
    await asyncio.sleep(0.05)
    assert (await engine.stats()).num_steps_total == steps, "nothing moves until the update has landed"
    await pipeline.close()
    await engine.close()


async def test_closing_in_the_middle_cancels_all_and_leaves_the_engine_empty() -> None:
    engine = make_engine()
    pipeline = make_pipeline(engine, make_stream(), num_ahead=3)
    await pipeline.advance(0)
    pipeline.next_batch(0)
    await asyncio.sleep(0.02)
    await pipeline.close()
    stats = await engine.stats()
    assert stats.num_running == 0 and stats.num_waiting == 0
    await engine.close()


async def test_trajectories_survive_json_exactly() -> None:
    for trajectory in (await synchronous(1))[0]:
        assert trajectory_from_json(trajectory_to_json(trajectory)) == trajectory


def test_the_gate_is_shut_at_first() -> None:
    async def check() -> None:
        engine = make_engine()
        assert not Gate(engine, num_expected=lambda: 0).is_open
        await engine.close()

    asyncio.run(check())
