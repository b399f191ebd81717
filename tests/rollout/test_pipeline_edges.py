"""The gate and the pipeline where it is hard: other prompts and bounds after a resume, failures, cuts anywhere."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from skyrl_train.async_loop import AsyncJob, train_async
from skyrl_train.data.rows import PromptRow
from skyrl_train.data.stream import PromptStream
from skyrl_train.errors import RequestRejected, SkyRLError
from skyrl_train.rollout.agent import Agent
from skyrl_train.rollout.gate import Gate
from skyrl_train.rollout.groups import Rollouts
from skyrl_train.rollout.journal import trajectory_to_json
from skyrl_train.rollout.pipeline import RolloutPipeline, RolloutSettings
from skyrl_train.rollout.selection import DynamicSampling, Selection
from skyrl_train.types import (
    Completion,
    GenerateRequest,
    LocalWeights,
    SamplingParams,
    Trajectory,
    TrajectoryId,
    Turn,
    VersionSpan,
    WeightUpdate,
)
from skyrl_train.weight_sync.sync import sync_weights
from tests.entrypoints.letters import LetterEnv
from tests.rollout.test_pipeline import SAMPLING, make_agent, make_engine, make_pipeline, make_stream
from tests.test_async_loop import make_job
from tests.test_async_loop import make_pipeline as make_job_pipeline
from tests.tiny import make_tokenizer

SECONDS = 8


def request(name: str, prompt: tuple[int, ...] = (65, 66, 67), **sampling: Any) -> GenerateRequest:
    settings: dict[str, Any] = {"max_new_tokens": 20, "ignore_eos": True, "seed": 3, **sampling}
    return GenerateRequest(request_id=name, prompt_token_ids=prompt, sampling=SamplingParams(**settings))


async def steps(engine: Any, count: int) -> None:
    begin = (await engine.stats()).num_steps_total
    while (await engine.stats()).num_steps_total < begin + count:
        await asyncio.sleep(0)


async def test_dynamic_sampling_that_takes_a_complete_second_batch_goes_on() -> None:
    """Both batches are complete: the gate shuts; the second is taken as well, and the third never runs again."""
    engine = make_engine()
    pipeline = make_pipeline(engine, make_stream(), num_ahead=2, stop_at_batch=True, max_in_flight=24)
    await pipeline.advance(0)
    await pipeline.roll_out(pipeline.next_batch(0))
    while pipeline.gate.is_open:
        await asyncio.sleep(0)
    await pipeline.roll_out(pipeline.next_batch(0))  # dynamic sampling wants more
    try:
        await asyncio.wait_for(pipeline.next_is_complete(), SECONDS)  # the landing
    finally:
        await pipeline.close()
        await engine.close()


class HalfOfTheFirst(Selection):
    """Takes two batches a step, as dynamic sampling may."""

    @property
    def draws_one_batch(self) -> bool:
        return False

    async def draw(self, roll_out: Any, next_prompts: Any) -> Any:
        first = await roll_out(next_prompts())
        await asyncio.sleep(0)
        found = await super().draw(roll_out, next_prompts)
        return replace(
            found,
            rollouts=Rollouts(groups=first.groups + found.rollouts.groups, failed=()),
        )


@pytest.mark.parametrize("staleness", [0, 1, 2, 3])
async def test_the_loop_ends_with_a_selection_that_draws_twice(staleness: int) -> None:
    job, _ = make_job(own_weights=True, selection=HalfOfTheFirst(batch_size=4))
    pipeline = make_job_pipeline(job, staleness, deterministic=True, max_in_flight=1000)
    try:
        await asyncio.wait_for(train_async(AsyncJob(job=job, pipeline=pipeline, deterministic=True)), SECONDS)
    finally:
        await job.engine.close()


@pytest.mark.parametrize(("staleness", "max_in_flight"), [(1, 1000), (2, 1000), (3, 1000), (2, 20), (3, 17)])
async def test_the_loop_ends_with_dynamic_sampling(staleness: int, max_in_flight: int) -> None:
    sampling = DynamicSampling(type="filter", max_batches=20)
    job, _ = make_job(own_weights=True, selection=Selection(batch_size=4, dynamic_sampling=sampling))
    pipeline = make_job_pipeline(job, staleness, deterministic=True, max_in_flight=max_in_flight)
    try:
        await asyncio.wait_for(train_async(AsyncJob(job=job, pipeline=pipeline, deterministic=True)), SECONDS)
    finally:
        await job.engine.close()


async def test_a_recorded_answer_is_not_given_to_another_prompt() -> None:
    engine = make_engine()
    gate = Gate(engine, num_expected=lambda: 1)
    gate.open()
    with gate.trajectory(0, "7/0/0"):
        await gate.generate(request("7/0/0"))
        await gate.shut()
        state = gate.state()
    other = Gate(engine, num_expected=lambda: 1)
    other.load(state, {"7/0/0"})
    other.open()
    try:
        with other.trajectory(0, "7/0/0"):
            again = await other.generate(request("7/0/0", prompt=(80, 81, 82, 83)))
        fresh = await engine.generate(request("fresh", prompt=(80, 81, 82, 83)))
        assert again.token_ids == fresh.token_ids and other.num_resampled_total == 1
    finally:
        await engine.close()


async def test_a_partial_answer_is_not_continued_after_another_prompt() -> None:
    engine = make_engine()
    gate = Gate(engine, num_expected=lambda: 1)
    gate.open()

    async def run(gate: Gate, prompt: tuple[int, ...]) -> Any:
        with gate.trajectory(0, "7/0/0"):
            return await gate.generate(request("7/0/0", prompt=prompt))

    task = asyncio.create_task(run(gate, (65, 66, 67)))
    await steps(engine, 5)
    await gate.shut()
    await gate.rest()
    state = gate.state()
    task.cancel()
    assert state[0]["partial"]
    other = Gate(engine, num_expected=lambda: 1)
    other.load(state, {"7/0/0"})
    other.open()
    try:
        again = await run(other, (80, 81, 82, 83))
        fresh = await engine.generate(request("fresh", prompt=(80, 81, 82, 83)))
        assert again.token_ids == fresh.token_ids and other.num_resampled_total == 1
    finally:
        await engine.close()


class Dice:
    """Two turns; what it says after the first is not a function of the answer."""

    runs_inline = True
    rolled = 0

    def __init__(self, **_: Any) -> None:
        self.turn = 0

    def init(self, prompt: list[Any]) -> tuple[list[Any], dict[str, Any]]:
        return prompt, {}

    def step(self, action: str) -> dict[str, Any]:
        self.turn += 1
        Dice.rolled += 1
        said = [{"role": "user", "content": f"you rolled {Dice.rolled}"}]
        return {"observations": said, "reward": float(self.turn == 2), "done": self.turn == 2, "metadata": {}}

    def close(self) -> None:
        pass


def two_turns(environment: Any = Dice, pool: Any = None) -> Any:
    def make(gate: Gate) -> Agent:
        return Agent(
            generate=gate.generate,
            tokenizer=make_tokenizer(),
            environments={"letters": environment},
            max_turns=2,
            pool=pool,
        )

    return make


TWO_TURNS = RolloutSettings(
    num_samples=2,
    sampling=SamplingParams(max_new_tokens=12, stop_token_ids=tuple(range(200)), min_new_tokens=8),
    seed=5,
    max_failed_frac=0.0,
)


def two_turn_pipeline(engine: Any, stream: PromptStream, environment: Any = Dice, **options: Any) -> RolloutPipeline:
    settings: dict[str, Any] = {"num_ahead": 0, "max_in_flight": 1000, "stop_at_batch": False, **options}
    return RolloutPipeline(two_turns(environment), engine, stream, TWO_TURNS, **settings)


async def rest_in_second_turn(pipeline: RolloutPipeline) -> None:
    gate = pipeline.gate
    while not any(name.endswith("/t1") for name in gate._in_flight):
        await asyncio.sleep(0)
    for _ in range(4):
        await asyncio.sleep(0)
    await gate.shut()
    await gate.rest()


async def test_an_environment_that_says_something_else_after_a_resume_is_noticed(tmp_path: Path) -> None:
    engine, stream = make_engine(), make_stream(batch_size=2)
    pipeline = two_turn_pipeline(engine, stream)
    await pipeline.advance(0)
    await rest_in_second_turn(pipeline)
    assert any(row["done"] for row in pipeline.gate.state())
    position = pipeline.stream_state()
    pipeline.save(tmp_path)
    await pipeline.close()
    stream2 = make_stream(batch_size=2)
    stream2.load_state_dict(position)
    resumed = two_turn_pipeline(engine, stream2)
    resumed.load(tmp_path, 0)
    try:
        await resumed.advance(0)
        rollouts = await resumed.roll_out(resumed.next_batch(0))
        assert resumed.gate.num_resampled_total > 0
        for trajectory in rollouts.trajectories:
            first, second = trajectory.turns
            history = first.prompt_token_ids + first.completion.token_ids
            assert second.prompt_token_ids[: len(history)] == history
    finally:
        await resumed.close()
        await engine.close()


async def test_data_with_other_words_under_the_same_row_numbers_is_refused(tmp_path: Path) -> None:
    engine = make_engine()
    pipeline = make_pipeline(engine, make_stream())
    await pipeline.advance(0)
    await pipeline.gate.shut()
    await pipeline.gate.rest()
    position = pipeline.stream_state()
    pipeline.save(tmp_path)
    await pipeline.close()
    rows = [
        PromptRow(messages=({"role": "user", "content": f"other {i}"},), environment="letters", target=None, extras={})
        for i in range(20)
    ]
    edited = PromptStream(rows, batch_size=4, seed=1)
    edited.load_state_dict(position)
    other = make_pipeline(engine, edited)
    try:
        with pytest.raises(SkyRLError):
            other.load(tmp_path, 0)
            await other.advance(0)
            await other.roll_out(other.next_batch(0))
    finally:
        await other.close()
        await engine.close()


class Echo(Dice):
    def step(self, action: str) -> dict[str, Any]:
        self.turn += 1
        said = [{"role": "user", "content": "go on"}]
        return {"observations": said, "reward": float(self.turn == 2), "done": self.turn == 2, "metadata": {}}


async def test_a_resume_with_fewer_in_flight_keeps_every_recorded_turn(tmp_path: Path) -> None:
    engine, stream = make_engine(), make_stream(batch_size=4)
    pipeline = two_turn_pipeline(engine, stream, Echo)
    await pipeline.advance(0)
    while len([name for name in pipeline.gate._in_flight if name.endswith("/t1")]) < 6:
        await asyncio.sleep(0)
    await pipeline.gate.shut()
    await pipeline.gate.rest()
    position = pipeline.stream_state()
    pipeline.save(tmp_path)
    before = pipeline.gate.state()
    await pipeline.close()

    stream2 = make_stream(batch_size=4)
    stream2.load_state_dict(position)
    resumed = two_turn_pipeline(engine, stream2, Echo, max_in_flight=2)
    resumed.load(tmp_path, 0)
    await resumed.gate.rest()
    after = resumed.gate.state()
    await resumed.close()
    await engine.close()

    def names(state: list[dict[str, Any]]) -> dict[str, list[str]]:
        return {part: sorted(r["request_id"] for row in state for r in row[part]) for part in ("done", "partial")}

    assert names(after) == names(before)


async def test_a_smaller_bound_holds_after_a_resume_too(tmp_path: Path) -> None:
    engine, stream = make_engine(), make_stream()
    pipeline = make_pipeline(engine, stream, num_ahead=3)
    await pipeline.advance(0)
    await pipeline.roll_out(pipeline.next_batch(0))
    await pipeline.gate.shut()
    await pipeline.gate.rest()
    position = pipeline.stream_state()
    pipeline.save(tmp_path)
    await pipeline.close()
    stream2 = make_stream()
    stream2.load_state_dict(position)
    resumed = make_pipeline(engine, stream2, num_ahead=1)
    resumed.load(tmp_path, 1)
    found = []
    for completed in range(1, 5):
        await resumed.advance(completed)
        prompts = resumed.next_batch(completed)
        await resumed.roll_out(prompts)
        found.append(resumed.staleness(prompts, completed))
        await resumed.gate.shut()
        await resumed.gate.rest()
    await resumed.close()
    await engine.close()
    assert max(found) <= 1, found


class TwoAtOnce:
    """A generator that asks twice at the same time and keeps the longer answer."""

    def __init__(self, generate: Any) -> None:
        self.generate = generate

    def render(self, prompt: Any) -> tuple[int, ...]:
        return (65, 66, 67, int(prompt.prompt_id.split("-")[1]))

    async def run(
        self, trajectory_id: TrajectoryId, prompt: Any, prompt_token_ids: tuple[int, ...], sampling: SamplingParams
    ) -> Trajectory:
        answers = await asyncio.gather(
            *(
                self.generate(
                    GenerateRequest(
                        request_id=f"{trajectory_id}/{i}", prompt_token_ids=prompt_token_ids, sampling=sampling
                    )
                )
                for i in range(2)
            )
        )
        turn = Turn(prompt_token_ids=prompt_token_ids, completion=answers[0])
        return Trajectory(id=trajectory_id, turns=(turn,), rewards=(1.0,), status="completed")


async def test_a_trajectory_may_have_two_requests_at_once() -> None:
    engine = make_engine()
    make: Any = lambda gate: TwoAtOnce(gate.generate)  # noqa: E731
    settings = RolloutSettings(num_samples=3, sampling=SAMPLING, seed=5, max_failed_frac=0.0)
    pipeline = RolloutPipeline(
        make, engine, make_stream(), settings, num_ahead=0, max_in_flight=1000, stop_at_batch=False
    )
    try:
        await asyncio.wait_for(pipeline.advance(0), SECONDS)
        await steps(engine, 5)
        await pipeline.gate.shut()
        await asyncio.wait_for(pipeline.gate.rest(), SECONDS)
    finally:
        await pipeline.close()
        await engine.close()


async def test_a_failure_of_a_later_batch_does_not_lose_the_checkpoint_of_the_step_that_is_done(
    tmp_path: Path,
) -> None:
    engine = make_engine()
    stream = make_stream()
    first = {prompt.prompt_id for prompt in make_stream().next_batch()}

    def make(gate: Gate) -> Agent:
        async def generate(asked: GenerateRequest) -> Completion:
            if asked.request_id.split("/")[0] not in first:
                raise RequestRejected(f"request {asked.request_id}: the engine has no room for it")
            return await gate.generate(asked)

        return Agent(generate=generate, tokenizer=make_tokenizer(), environments={"letters": LetterEnv})

    settings = RolloutSettings(num_samples=1, sampling=SAMPLING, seed=5, max_failed_frac=1.0)
    pipeline = RolloutPipeline(make, engine, stream, settings, num_ahead=1, max_in_flight=1000, stop_at_batch=True)
    await pipeline.advance(0)
    await pipeline.roll_out(pipeline.next_batch(0))
    await pipeline.next_is_complete()
    await pipeline.gate.shut()
    await pipeline.gate.rest()
    try:
        pipeline.save(tmp_path)
        with pytest.raises(RequestRejected, match="no room"):
            await pipeline.roll_out(pipeline.next_batch(1))
    finally:
        await pipeline.close()
        await engine.close()


async def test_no_more_of_a_prompt_is_cached_than_it_has_tokens() -> None:
    engine = make_engine()
    pipeline = make_pipeline(engine, make_stream(), num_ahead=0)
    await pipeline.advance(0)
    prompts = pipeline.next_batch(0)
    await steps(engine, 30)
    await pipeline.gate.shut()
    await pipeline.gate.rest()  # no update comes: dynamic sampling opens it again
    rollouts = await pipeline.roll_out(prompts)
    await pipeline.close()
    await engine.close()
    turns = [turn for t in rollouts.trajectories for turn in t.turns]
    assert all(turn.completion.num_cached_tokens <= len(turn.prompt_token_ids) for turn in turns)
    assert rollouts.metrics()["rollout/prompt_cached_frac"] <= 1


async def test_a_trajectory_with_numpys_numbers_can_be_saved(tmp_path: Path) -> None:
    import json

    engine = make_engine()
    completion = await engine.generate(request("0/0/0"))
    trajectory = Trajectory(
        id=TrajectoryId(prompt_id="0", sample=0),
        turns=(Turn(prompt_token_ids=tuple(np.array([65, 66, 67])), completion=completion),),
        rewards=(np.float32(1),),  # type: ignore[arg-type]
        status="completed",
    )
    await engine.close()
    json.dumps(trajectory_to_json(trajectory))


async def test_nothing_is_kept_of_a_request_that_its_owner_gave_up() -> None:
    engine = make_engine()
    gate = Gate(engine, num_expected=lambda: 1)
    gate.open()

    async def run() -> None:
        with gate.trajectory(0, "7/0/0"):
            await gate.generate(request("7/0/0"))

    task = asyncio.create_task(run())
    await steps(engine, 5)
    await gate.shut()
    await gate.rest()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await engine.close()
    assert all(not row["done"] and not row["partial"] for row in gate.state())


@pytest.mark.parametrize(
    "sampling",
    [
        {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.3},
        {"min_new_tokens": 12, "stop_token_ids": tuple(range(100))},
        {"top_k": 20, "top_p": 0.9, "min_p": 0.01},
        {"ignore_eos": False},
        {"stop": ("ab", "a", "e"), "min_new_tokens": 3},
    ],
)
async def test_a_request_that_is_cut_anywhere_ends_as_the_whole_one(sampling: dict[str, Any]) -> None:
    engine = make_engine()
    for seed in range(4):
        whole = await engine.generate(request("whole", seed=seed, **sampling))
        for cut in range(1, len(whole.token_ids)):
            spans = (VersionSpan(version=0, start=0, end=cut),)
            partial = replace(
                whole,
                token_ids=whole.token_ids[:cut],
                logprobs=whole.logprobs[:cut],
                versions=spans,
                finish_reason="abort",
                stop_reason=None,
            )
            again = await engine.generate(replace(request("whole", seed=seed, **sampling), partial=partial))
            assert again.token_ids == whole.token_ids and again.finish_reason == whole.finish_reason
            assert again.stop_reason == whole.stop_reason and again.versions == whole.versions
            assert again.logprobs == pytest.approx(whole.logprobs, abs=1e-5)
    await engine.close()


async def test_a_full_context_can_be_cut_and_goes_on() -> None:
    engine = make_engine(max_context_len=64, kv_cache_tokens=128, max_num_seqs=2)
    gate = Gate(engine, num_expected=lambda: 2)
    gate.open()

    async def run(number: int) -> Any:
        with gate.trajectory(number, f"7/{number}/0"):
            return await gate.generate(
                request(f"{number}/0/0", prompt=(65, 66, 67, 68), max_new_tokens=60, seed=number)
            )

    whole = [await run(0), await run(1)]
    tasks = [asyncio.create_task(run(number)) for number in range(2)]
    for version in range(1, 6):
        await steps(engine, 10)
        await gate.shut()
        await gate.rest()
        await sync_weights(engine, WeightUpdate(version=version, source=LocalWeights()))
        engine.core.check_integrity()
        gate.open()
    found = [await task for task in tasks]
    assert [c.token_ids for c in found] == [c.token_ids for c in whole]
    await engine.close()


@pytest.mark.parametrize("fails_in", ["train", "engine", "export"])
@pytest.mark.parametrize("deterministic", [True, False])
async def test_a_failure_ends_the_run_whoever_fails(fails_in: str, deterministic: bool) -> None:
    job, _ = make_job(own_weights=True)
    pipeline = make_job_pipeline(job, 2, deterministic=deterministic, max_in_flight=9)
    policy: Any = job.policy
    engine: Any = job.engine

    class Breaks:
        num = 0

        def update(self, experience: Any) -> Any:
            Breaks.num += 1
            if fails_in == "train" and Breaks.num == 2:
                raise FloatingPointError("broken")
            if fails_in == "engine" and Breaks.num == 2:

                def broken() -> Any:
                    raise FloatingPointError("broken")

                engine.core.step = broken
            return policy.update(experience)

        def export_weights(self) -> Any:
            if fails_in == "export" and Breaks.num == 2:
                raise FloatingPointError("broken")
            return policy.export_weights()

    job = replace(job, policy=Breaks())
    with pytest.raises((FloatingPointError, SkyRLError)):
        await asyncio.wait_for(train_async(AsyncJob(job=job, pipeline=pipeline, deterministic=deterministic)), SECONDS)
    await engine.close()
    assert [t for t in asyncio.all_tasks() if t.get_name().startswith("trajectory")] == []


async def test_the_staleness_of_a_step_is_that_of_the_oldest_batch_that_it_took() -> None:
    job, log = make_job(own_weights=True, selection=HalfOfTheFirst(batch_size=4))
    pipeline = make_job_pipeline(job, 2, deterministic=False, max_in_flight=1000)
    oldest: list[int] = []
    take = pipeline.next_batch

    def next_batch(completed: int) -> Any:
        prompts = take(completed)
        oldest.append(pipeline.staleness(prompts, completed))
        return prompts

    pipeline.next_batch = next_batch  # type: ignore[method-assign]
    await asyncio.wait_for(train_async(AsyncJob(job=job, pipeline=pipeline, deterministic=False)), SECONDS)
    await job.engine.close()
    wanted = [max(oldest[i : i + 2]) for i in range(0, len(oldest), 2)]
    assert [row["async/staleness_steps"] for row in log.rows if row["step"] > 0] == wanted


async def test_parked_requests_are_those_that_came_back_unfinished() -> None:
    engine = make_engine()
    pipeline = make_pipeline(engine, make_stream(), num_ahead=2, stop_at_batch=True)
    await pipeline.advance(0)
    await pipeline.roll_out(pipeline.next_batch(0))
    await pipeline.next_is_complete()
    await pipeline.gate.rest()
    unfinished = sum(len(row["partial"]) for row in pipeline.gate.state())
    await pipeline.close()
    await engine.close()
    assert pipeline.gate.num_parked == unfinished


async def test_a_prompt_that_can_not_be_rendered_leaves_no_trajectory_behind() -> None:
    class Refuses(Agent):
        def render(self, prompt: Any) -> tuple[int, ...]:
            if prompt.prompt_id == third:
                raise ValueError("no")
            return super().render(prompt)

    third = make_stream().next_batch()[2].prompt_id
    engine = make_engine()

    def make(gate: Gate) -> Agent:
        agent = make_agent(gate.generate)
        return Refuses(generate=agent.generate, tokenizer=agent.tokenizer, environments=agent.environments)

    settings = RolloutSettings(num_samples=3, sampling=SAMPLING, seed=5, max_failed_frac=0.0)
    pipeline = RolloutPipeline(
        make, engine, make_stream(), settings, num_ahead=0, max_in_flight=1000, stop_at_batch=False
    )
    with pytest.raises(ValueError, match="no"):
        await pipeline.advance(0)
    await pipeline.close()
    left = [t for t in asyncio.all_tasks() if t.get_name().startswith("trajectory")]
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)
    await engine.close()
    assert left == []


async def test_a_request_that_belongs_to_no_trajectory_is_refused_by_name() -> None:
    engine = make_engine()
    gate = Gate(engine, num_expected=lambda: 1)
    gate.open()
    with pytest.raises(RuntimeError, match=r"request 7/0/0.*whose trajectory is this"):
        await gate.generate(request("7/0/0"))
    await engine.close()
