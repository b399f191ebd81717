"""Sessions of rollouts over a real engine: the same tokens, only what is new is sent, and nothing stays open."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from skyrl_train.engines.embedded.config import EmbeddedConfig
from skyrl_train.errors import EngineUnavailable, RequestRejected
from skyrl_train.rollout.agent import Agent
from skyrl_train.rollout.groups import run_groups
from skyrl_train.rollout.pipeline import RolloutPipeline, RolloutSettings
from skyrl_train.rollout.sessions import Sessions
from skyrl_train.types import (
    GenerateRequest,
    LocalWeights,
    Prompt,
    SamplingParams,
    Trajectory,
    TrajectoryId,
    WeightUpdate,
)
from skyrl_train.weight_sync.sync import sync_weights
from tests.rollout.conversing import ASKED, FORGETFUL, ScriptedEnv, says
from tests.rollout.session_engine import SessionEngine
from tests.rollout.test_pipeline import make_stream, shut_after_steps, tokens
from tests.tiny import make_model, make_tokenizer

ENDS = tuple(range(0, 300, 2))
"""A random model ends an answer by none of its own; every second token does it here."""
GREEDY = SamplingParams(max_new_tokens=20, temperature=0, min_new_tokens=3, stop_token_ids=ENDS)
SAMPLED = replace(GREEDY, temperature=1.0)
THREE_TURNS = (says("and then?", reward=0.5), says("more", reward=1.0), {"reward": 2.0})
CONTEXT = 512


def make_engine(kind: type[SessionEngine] = SessionEngine, **options: Any) -> SessionEngine:
    config = EmbeddedConfig(max_context_len=CONTEXT, max_num_seqs=32, kv_cache_tokens=16384)
    return kind(make_model(), make_tokenizer(), config=config, **options)


@asynccontextmanager
async def engine_with_sessions(**options: Any) -> AsyncIterator[SessionEngine]:
    engine = make_engine(**options)
    try:
        yield engine
    finally:
        await engine.close()


def prompts(script: Sequence[Any], count: int = 1) -> list[Prompt]:
    return [
        Prompt(prompt_id=f"p{i}", messages=ASKED, environment="scripted", extras={"script": script})
        for i in range(count)
    ]


def agent_over(engine: SessionEngine, sessions: Sessions | None, **options: Any) -> Agent:
    return Agent(
        generate=engine.generate if sessions is None else sessions.generate,
        tokenizer=options.pop("tokenizer", None) or make_tokenizer(),
        environments={"scripted": ScriptedEnv},
        max_turns=10,
        sessions=sessions,
        **options,
    )


async def roll_out(
    engine: SessionEngine,
    sessions: Sessions | None,
    script: Sequence[Any] = THREE_TURNS,
    *,
    sampling: SamplingParams = GREEDY,
    count: int = 1,
    num_samples: int = 1,
    **options: Any,
) -> list[Trajectory]:
    agent = agent_over(engine, sessions, **options)
    rollouts = await run_groups(
        agent, prompts(script, count), num_samples=num_samples, sampling=sampling, run_seed=3, max_failed_frac=1.0
    )
    return rollouts.trajectories


async def without(script: Sequence[Any] = THREE_TURNS, **options: Any) -> list[Trajectory]:
    """The same rollout with whole prompts, in an engine of its own."""
    async with engine_with_sessions() as engine:
        return await roll_out(engine, None, script, **options)


def asked(trajectories: Sequence[Trajectory]) -> list[tuple[int, ...]]:
    return [turn.prompt_token_ids for trajectory in trajectories for turn in trajectory.turns]


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
async def test_a_turn_sends_its_new_tokens_only_and_all_tokens_are_those_of_whole_prompts(
    sampling: SamplingParams,
) -> None:
    expected = await without(sampling=sampling, num_samples=2)
    async with engine_with_sessions() as engine:
        sessions = Sessions(engine, capacity=CONTEXT)
        found = await roll_out(engine, sessions, sampling=sampling, num_samples=2)
        assert [len(t.turns) for t in found] == [3, 3]
        assert tokens(found) == tokens(expected)
        assert asked(found) == asked(expected), "a trajectory keeps whole prompts"
        for trajectory in found:
            name, (first, second, third) = str(trajectory.id), trajectory.turns
            whole = [len(t.prompt_token_ids) for t in (first, second, third)]
            answers = [len(t.completion.token_ids) for t in (first, second, third)]
            assert [engine.prompts[n] for n in (name, f"{name}/t1", f"{name}/t2")] == [
                (None, whole[0]),
                (name, whole[1] - whole[0] - answers[0]),
                (f"{name}/t1", whole[2] - whole[1] - answers[1]),
            ]
        used = {r.session.session_id for r in engine.sent if r.session is not None}
        assert len(used) == 2 and sessions.num_opened_total == 2, "one for each trajectory"
        assert (sessions.num_open, len(engine.book)) == (0, 0)


@pytest.mark.parametrize("what", ["edited", "template"])
async def test_a_history_that_was_rewritten_starts_at_the_root_of_the_same_session(what: str) -> None:
    script: Sequence[Any] = THREE_TURNS
    options: dict[str, Any] = {}
    if what == "edited":
        script = (says("a"), says("b", postprocessed_action="rewritten"), says("c"), {})
    else:
        tokenizer = make_tokenizer()
        tokenizer.chat_template = FORGETFUL.replace("</think>", "e")
        options = {"tokenizer": tokenizer, "chat_history": "template"}
    expected = await without(script, **options)
    async with engine_with_sessions() as engine:
        sessions = Sessions(engine, capacity=4096)
        found = await roll_out(engine, sessions, script, **options)
        assert tokens(found) == tokens(expected) and asked(found) == asked(expected)
        assert sessions.num_whole_total == 0 and all(r.session is not None for r in engine.sent)
        if what == "edited":  # the first answer stands as it was; the second one does not
            parents = [parent for parent, _ in engine.prompts.values()]
            assert parents == [None, "p0/0/0", "p0/0/0", "p0/0/0/t2"]
        assert len(engine.book) == 0


async def test_a_template_that_drops_what_was_said_goes_to_the_root_with_the_whole_prompt() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ m['content'] }}", "{{ m['content'] | upper }}")
    async with engine_with_sessions() as engine:
        sessions = Sessions(engine, capacity=4096)
        (found,) = await roll_out(engine, sessions, tokenizer=tokenizer, chat_history="template")
        for turn, (parent, size) in zip(found.turns, engine.prompts.values(), strict=True):
            assert (parent, size) == (None, len(turn.prompt_token_ids))


async def test_two_requests_after_one_history_are_branches() -> None:
    def request(name: str, prompt: tuple[int, ...], session: Any = None) -> GenerateRequest:
        return GenerateRequest(request_id=name, prompt_token_ids=prompt, sampling=GREEDY, session=session)

    async with engine_with_sessions() as engine:
        sessions = Sessions(engine, capacity=CONTEXT)
        async with sessions.one() as ref:
            first = await sessions.generate(request("a", (65, 66, 67), ref))
            history = (65, 66, 67, *first.token_ids)
            left, right = await asyncio.gather(
                sessions.generate(request("b", (*history, 70), ref)),
                sessions.generate(request("c", (*history, 71, 72), ref)),
            )
            assert engine.prompts == {"a": (None, 3), "b": ("a", 1), "c": ("a", 2)}
            await sessions.generate(request("d", (*history, 70, *left.token_ids, 5), ref))
            assert engine.prompts["d"] == ("b", 1)
            # The same prompt once more: a request needs a token of its own.
            await sessions.generate(request("e", history, ref))
            assert engine.prompts["e"] == (None, len(history))
        alone = await engine.generate(request("f", (*history, 71, 72)))
        assert right.token_ids == alone.token_ids


@pytest.mark.parametrize("when", ["init", "step", "close"])
async def test_an_environment_that_raises_leaves_no_session(when: str) -> None:
    class Failing(ScriptedEnv):
        def init(self, prompt: Any) -> Any:
            if when == "init":
                raise ZeroDivisionError("init")
            return super().init(prompt)

        def close(self) -> None:
            if when == "close":
                raise ZeroDivisionError("close")

    script = (says("a"), ZeroDivisionError("step")) if when == "step" else (says("a"), {})
    async with engine_with_sessions() as engine:
        sessions = Sessions(engine, capacity=CONTEXT, max_idle=8)
        agent = replace(agent_over(engine, sessions), environments={"scripted": Failing})
        (prompt,) = prompts(script)
        ids = agent.render(prompt)
        trajectory = await agent.run(TrajectoryId(prompt_id="p", sample=0), prompt, ids, GREEDY)
        assert trajectory.status == "failed"
        await sessions.close()
        assert (sessions.num_open, len(engine.book)) == (0, 0)


async def test_a_trajectory_that_is_cancelled_in_the_middle_of_an_answer_leaves_no_session() -> None:
    async with engine_with_sessions() as engine:
        sessions = Sessions(engine, capacity=CONTEXT, max_idle=8)
        await engine.pause()
        task = asyncio.create_task(roll_out(engine, sessions, count=3, num_samples=2))
        while len(engine.sent) < 6:
            await asyncio.sleep(0)
        assert len(engine.book) == 6
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (sessions.num_open, len(engine.book)) == (0, 0)


async def test_a_trajectory_that_is_cancelled_while_its_session_opens_leaves_none() -> None:
    async with engine_with_sessions() as engine:
        sessions = Sessions(engine, capacity=CONTEXT)
        engine.opening.clear()
        task = asyncio.create_task(roll_out(engine, sessions, count=2))
        while len(engine.book) < 2:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len(engine.book) == 2, "the engine is not through with it yet"
        engine.opening.set()
        await sessions.close()
        assert len(engine.book) == 0


async def test_an_engine_that_fails_one_trajectory_ends_the_others_and_their_sessions() -> None:
    async with engine_with_sessions() as engine:
        sessions = Sessions(engine, capacity=CONTEXT)
        task = asyncio.create_task(roll_out(engine, sessions, count=4))
        while len(engine.sent) < 4:
            await asyncio.sleep(0)
        await engine.close()
        with pytest.raises(ExceptionGroup) as caught:
            await task
        assert caught.group_contains(EngineUnavailable)
        assert (sessions.num_open, len(engine.book)) == (0, 0)


async def test_a_session_that_is_full_lets_its_trajectory_go_on_with_whole_prompts(
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = await without(count=3)
    first = len(expected[0].turns[0].prompt_token_ids)
    async with engine_with_sessions() as engine:
        sessions = Sessions(engine, capacity=first + GREEDY.max_new_tokens)  # the first turn fits, the second does not
        with caplog.at_level(logging.WARNING):
            found = await roll_out(engine, sessions, count=3)
        assert tokens(found) == tokens(expected)
        assert sessions.num_whole_total == 3
        answered_in_sessions = [r.request_id for r in engine.sent if r.session is not None]
        assert len(answered_in_sessions) == 6, "each tried the second turn there, none the third"
        assert len([r for r in caplog.records if "generator.sessions" in r.getMessage()]) == 1
        assert "goes on with whole prompts" in caplog.text and "generator.sessions.default_capacity" in caplog.text
        assert len(engine.book) == 0


async def test_a_request_that_is_wrong_itself_is_rejected_in_a_session_too(caplog: pytest.LogCaptureFixture) -> None:
    async with engine_with_sessions() as engine:
        sessions = Sessions(engine, capacity=4096)
        async with sessions.one() as ref:
            long = GenerateRequest(request_id="a", prompt_token_ids=(65,) * CONTEXT, sampling=GREEDY, session=ref)
            with pytest.raises(RequestRejected, match="max_new_tokens"):
                await sessions.generate(long)
        assert sessions.num_whole_total == 0 and "generator.sessions" not in caplog.text
        assert len(engine.book) == 0


class Full(SessionEngine):
    async def open_session(self, capacity: int) -> str:
        raise RequestRejected("the server holds 0 sessions at most")


@pytest.mark.parametrize("kind", ["no capability", "refuses"])
async def test_an_engine_that_opens_none_gets_whole_prompts_with_one_warning(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected = await without(count=3, num_samples=2)
    engine = make_engine(Full) if kind == "refuses" else make_engine(without=["sessions"])
    try:
        sessions = Sessions(engine, capacity=CONTEXT, max_idle=2)
        with caplog.at_level(logging.WARNING):
            found = await roll_out(engine, sessions, count=3, num_samples=2)
        assert tokens(found) == tokens(expected) and asked(found) == asked(expected)
        assert all(request.session is None for request in engine.sent)
        messages = [r.getMessage() for r in caplog.records if "generator.sessions" in r.getMessage()]
        assert len(messages) == 1 and "to the same tokens" in messages[0]
    finally:
        await engine.close()


async def test_the_pool_is_bounded_gives_a_session_to_one_user_at_a_time_and_each_starts_at_the_root() -> None:
    async with engine_with_sessions() as engine:
        sessions = Sessions(engine, capacity=8 * CONTEXT, max_idle=2)
        for _ in range(2):
            async with sessions.one() as a, sessions.one() as b, sessions.one() as c:
                assert len({a, b, c}) == 3, "never one session for two"
                assert len(engine.book) == 3
            assert len(engine.book) == sessions.num_open == 2, "two are kept, the third is closed"
        expected = await without(count=2)
        found = await roll_out(engine, sessions, count=2)
        again = await roll_out(engine, sessions, count=2)
        assert tokens(found) == tokens(again) == tokens(expected)
        assert sessions.num_opened_total == 4
        firsts = [r for r in engine.sent if r.request_id.endswith("/0/0")]
        assert [r.session and r.session.parent_request_id for r in firsts] == [None] * 4
        assert len(engine.book) == 2
        await sessions.close()
        assert (sessions.num_open, len(engine.book)) == (0, 0)


async def test_a_session_that_is_used_again_is_empty() -> None:
    async with engine_with_sessions() as engine:
        sessions = Sessions(engine, capacity=CONTEXT, max_idle=1)
        expected = await roll_out(engine, sessions)
        for _ in range(8):  # together far more than the capacity
            assert tokens(await roll_out(engine, sessions)) == tokens(expected)
        assert (sessions.num_opened_total, sessions.num_whole_total, len(engine.book)) == (1, 0, 1)
        await sessions.close()


async def test_a_session_in_which_something_still_runs_is_not_handed_on() -> None:
    async with engine_with_sessions() as engine:
        sessions = Sessions(engine, capacity=CONTEXT, max_idle=4)
        await engine.pause()
        async with sessions.one() as ref:
            request = GenerateRequest(request_id="a", prompt_token_ids=(65, 66), sampling=GREEDY, session=ref)
            left_behind = asyncio.create_task(sessions.generate(request))
            while not engine.sent:
                await asyncio.sleep(0)
        assert (sessions.num_open, len(engine.book)) == (0, 0)
        left_behind.cancel()


async def test_a_run_that_ends_while_sessions_are_emptied_leaves_none() -> None:
    async with engine_with_sessions() as engine:
        sessions = Sessions(engine, capacity=CONTEXT, max_idle=2)
        engine.emptying.clear()
        task = asyncio.create_task(roll_out(engine, sessions, count=3))
        while len(engine.book) != 2 or len(engine.sent) < 9:
            await asyncio.sleep(0)
        assert sessions.num_open == 2, "the third one is closed at once: no more than two are kept"
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        engine.emptying.set()
        await sessions.close()
        assert (sessions.num_open, len(engine.book)) == (0, 0)


SETTINGS = RolloutSettings(num_samples=2, sampling=SAMPLED, seed=5, max_failed_frac=0.0)


class Letters(ScriptedEnv):
    """Three turns, whatever the row."""

    def __init__(self, *, env_config: Any, extras: dict[str, Any]) -> None:
        super().__init__(env_config=env_config, extras={"script": THREE_TURNS, **extras})


def pipeline_over(engine: SessionEngine, sessions: Sessions | None) -> RolloutPipeline:
    def agent(gate: Any) -> Agent:
        return Agent(
            generate=gate.generate,
            tokenizer=make_tokenizer(),
            environments={"letters": Letters},
            max_turns=10,
            sessions=sessions,
        )

    generate = None if sessions is None else sessions.generate
    return RolloutPipeline(
        agent,
        engine,
        make_stream(),
        SETTINGS,
        num_ahead=0,
        max_in_flight=1000,
        stop_at_batch=False,
        generate=generate,
    )


async def take(pipeline: RolloutPipeline) -> list[Trajectory]:
    await pipeline.advance(0)
    return (await pipeline.roll_out(pipeline.next_batch(0))).trajectories


async def test_through_the_gate_a_parked_request_goes_on_in_its_session() -> None:
    async with engine_with_sessions() as plain:
        expected = await take(pipeline_over(plain, None))
    async with engine_with_sessions() as engine:
        sessions = Sessions(engine, capacity=CONTEXT)
        pipeline = pipeline_over(engine, sessions)
        await pipeline.advance(0)
        num_parked = 0
        for version in range(1, 6):
            await shut_after_steps(pipeline, engine, 3)  # type: ignore[arg-type]
            num_parked += pipeline.gate.num_parked
            await sync_weights(engine, WeightUpdate(version=version, source=LocalWeights()))
            pipeline.gate.open()
        found = (await pipeline.roll_out(pipeline.next_batch(0))).trajectories
        assert tokens(found) == tokens(expected) and asked(found) == asked(expected)
        again = [r for r in engine.sent if r.partial is not None]
        assert num_parked and again and all(r.session is not None for r in again)
        assert sessions.num_whole_total == 0 and len(engine.book) == 0
        await pipeline.close()


async def test_what_was_answered_before_a_kill_is_asked_for_in_a_new_session_at_the_root(tmp_path: Path) -> None:
    async with engine_with_sessions() as plain:
        expected = await take(pipeline_over(plain, None))
    async with engine_with_sessions() as engine:
        sessions = Sessions(engine, capacity=CONTEXT)
        pipeline = pipeline_over(engine, sessions)
        await pipeline.advance(0)
        await shut_after_steps(pipeline, engine, 9)  # type: ignore[arg-type]
        pipeline.save(tmp_path)
        await pipeline.close()
        assert len(engine.book) == 0, "trajectories that are cancelled at the gate close theirs"
    async with engine_with_sessions() as engine:
        sessions = Sessions(engine, capacity=CONTEXT)
        resumed = pipeline_over(engine, sessions)
        resumed.load(tmp_path, 0)
        assert tokens(await take(resumed)) == tokens(expected)
        later = [parent for name, (parent, _) in engine.prompts.items() if "/t" in name]
        assert None in later, "its first turn was answered before; the second starts at the root"
        assert sessions.num_whole_total == 0 and len(engine.book) == 0
        await resumed.close()


async def test_later_turns_have_a_higher_priority_where_it_is_asked_for() -> None:
    async with engine_with_sessions() as engine:
        await roll_out(engine, None, later_turns_first=True)
        assert [request.priority for request in engine.sent] == [0, 1, 2]
        engine.sent.clear()
        await roll_out(engine, None)
        assert [request.priority for request in engine.sent] == [0, 0, 0]
