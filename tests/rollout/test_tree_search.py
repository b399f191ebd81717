"""Tree search: which node is next, what comes back to be trained on, and that it is worth its tokens."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from benchmarks.tree_search import LockEnv, compare, puzzles
from skyrl_train.algorithms.advantages import grpo
from skyrl_train.engines.embedded import EmbeddedConfig
from skyrl_train.errors import ConfigError, EngineUnavailable
from skyrl_train.rollout.branches import by_branches, num_sampled
from skyrl_train.rollout.groups import run_groups
from skyrl_train.rollout.journal import trajectory_from_json, trajectory_to_json
from skyrl_train.rollout.own_agent import own_agent
from skyrl_train.rollout.pipeline import RolloutPipeline, RolloutSettings
from skyrl_train.rollout.search_tree import Node, back_up, best, select
from skyrl_train.rollout.selection import with_copies
from skyrl_train.rollout.sessions import Sessions
from skyrl_train.rollout.tree_search import TreeSearch
from skyrl_train.training.experience import ExperienceMaker
from skyrl_train.types import LocalWeights, SamplingParams, ScoredGroup, Trajectory, WeightUpdate
from skyrl_train.weight_sync.sync import sync_weights
from tests.rollout.session_engine import SessionEngine
from tests.rollout.test_pipeline import make_stream, shut_after_steps
from tests.tiny import make_model, make_tokenizer

ENDS = tuple(range(0, 300, 2))
SAMPLING = SamplingParams(max_new_tokens=20, stop_token_ids=ENDS)


class Small(TreeSearch):
    """What a user writes to set it."""

    width = 3
    num_expansions = 7


# -- the tree


def child(parent: Node, number: int, reward: float, status: Any = None) -> Node:
    node = Node(parent=parent, number=number, reward=reward, status=status)
    parent.children.append(node)
    back_up(node, node.earned)
    return node


def test_values_are_means_over_all_that_was_found_below() -> None:
    root = Node()
    first = child(root, 0, 0.5)
    second = child(root, 1, 0.0)
    deep = child(first, 2, 0.25)
    assert (root.num_visits, first.num_visits, second.num_visits) == (3, 2, 1)
    assert (deep.value, first.value, second.value) == (0.75, 0.625, 0.0)
    assert root.value == pytest.approx((0.5 + 0.0 + 0.75) / 3)
    assert [node.number for node in deep.path()] == [0, 2] and deep.earned == 0.75


def test_selection_goes_to_the_best_and_comes_back_to_what_was_tried_less() -> None:
    root = Node()
    assert select(root, width=2, exploration=0.5) is root
    good, bad = child(root, 0, 1.0), child(root, 1, 0.0)
    assert select(root, width=2, exploration=0.5) is good
    # ln N / n: a large bonus makes up for a value that is lower by all of the scale.
    for _ in range(20):
        back_up(good, 1.0)
    assert select(root, width=2, exploration=0.1) is good
    assert select(root, width=2, exploration=2.0) is bad
    assert select(root, width=3, exploration=0.1) is root, "it has fewer children than it may have"


def test_what_is_over_is_not_gone_on_from_and_a_tree_that_is_done_grows_at_its_root() -> None:
    root = Node()
    over = child(root, 0, 1.0, "completed")
    going = child(root, 1, 0.0)
    assert select(root, width=2, exploration=0.0) is going
    child(going, 2, 0.0, "truncated"), child(going, 3, 0.5, "completed")
    assert select(root, width=2, exploration=0.0) is root
    assert best(root) is over
    child(root, 4, 1.0)
    assert best(root) is over, "of equal ones a complete conversation"


# -- searches over a real engine


@asynccontextmanager
async def running() -> AsyncIterator[SessionEngine]:
    config = EmbeddedConfig(max_context_len=512, max_num_seqs=32, kv_cache_tokens=16384)
    engine = SessionEngine(make_model(num_hidden_layers=1), make_tokenizer(), config=config)
    try:
        yield engine
    finally:
        await engine.close()


def agent_over(generate: Any, sessions: Sessions | None, kind: str = f"{__name__}.Small", **options: Any) -> Any:
    arguments = {
        "generate": generate,
        "tokenizer": make_tokenizer(),
        "environments": {"lock": LockEnv},
        "max_turns": 10,
        "sessions": sessions,
        **options,
    }
    return own_agent(kind, arguments)


async def search(
    engine: SessionEngine, *, sessions: Sessions | None = None, sampling: SamplingParams = SAMPLING, **options: Any
) -> list[ScoredGroup]:
    generate = engine.generate if sessions is None else sessions.generate
    agent = agent_over(generate, sessions, **options)
    prompts = puzzles(2, 4, strict=False, seed=3)
    rollouts = await run_groups(agent, prompts, num_samples=2, sampling=sampling, run_seed=5)
    return list(rollouts.groups)


def sampled(trajectories: Sequence[Trajectory]) -> list[tuple[int, ...]]:
    return [turn.completion.token_ids for t in trajectories for b in (t, *t.branches) for turn in b.turns]


async def test_the_best_path_comes_back_with_all_that_was_sampled_as_branches() -> None:
    async with running() as engine:
        sessions = Sessions(engine, capacity=4096)
        groups = await search(engine, sessions=sessions)
        assert len(engine.book) == 0
        asked_for = sum(r.session is not None and r.session.parent_request_id is not None for r in engine.sent)
    assert asked_for >= 4 * 6 * 3, "all but the first answers go on in a session"
    for group in groups:
        for trajectory in group.trajectories:
            branches = trajectory.branches
            assert len(branches) == 7 * 3 == trajectory.metrics["search_nodes"]
            assert [b.id.branch for b in branches] == list(range(1, 22)), "0 is the best path"
            assert num_sampled(trajectory) == trajectory.metrics["search_sampled_tokens"]
            # Each answer of the best path is one of the branches, and goes on after the one before it.
            by_prompt = {(b.turns[0].prompt_token_ids, b.turns[0].completion.token_ids) for b in branches}
            so_far: tuple[int, ...] = ()
            for turn in trajectory.turns:
                assert (turn.prompt_token_ids, turn.completion.token_ids) in by_prompt
                assert turn.prompt_token_ids[: len(so_far)] == so_far
                so_far = turn.prompt_token_ids + turn.completion.token_ids
            assert trajectory.reward == pytest.approx(sum(trajectory.rewards))
            assert trajectory.reward >= max(b.reward for b in branches) - 1e-9, "none is worth more on the mean"


async def test_the_same_seed_searches_the_same_with_sessions_and_without() -> None:
    async with running() as engine:
        plain = await search(engine)
        again = await search(engine, sessions=Sessions(engine, capacity=4096))
        full = await search(engine, sessions=Sessions(engine, capacity=60))
    for groups in (again, full):
        for one, other in zip(plain, groups, strict=True):
            assert sampled(one.trajectories) == sampled(other.trajectories)
            assert one.rewards == other.rewards


async def test_each_node_gets_its_advantage_over_its_siblings() -> None:
    async with running() as engine:
        groups = await search(engine)
    parts = by_branches(groups)
    assert [g.prompt.prompt_id for g in parts] == sorted(g.prompt.prompt_id for g in parts)
    # The roots of both searches of a prompt answer the same: they are compared with each other.
    assert [len(part.trajectories) for part in parts if part.trajectories[0].id.branch == 1] == [6, 6]
    assert {len(part.trajectories) for part in parts if part.trajectories[0].id.branch != 1} == {3}
    experience = ExperienceMaker(estimator=partial(grpo, grpo_norm_by_std=False))(groups)
    nodes = [branch for group in groups for t in group.trajectories for branch in t.branches]
    assert {s.trajectory_id for s in experience.samples} == {node.id for node in nodes}
    assert sum(int(s.loss_mask.sum()) for s in experience.samples) == sum(map(num_sampled, nodes)), "each token once"
    for part in parts:
        mean = sum(part.rewards) / len(part.rewards)
        for node, value in zip(part.trajectories, part.rewards, strict=True):
            assert experience.advantages[node.id] == pytest.approx(value - mean, abs=1e-6)
    assert max(map(abs, experience.advantages.values())) > 0.05
    sample = experience.samples[0]
    assert torch.equal(sample.advantages[sample.loss_mask].unique(), sample.advantages[sample.loss_mask][:1])


async def test_a_search_without_branches_in_it_is_trained_as_ever() -> None:
    async with running() as engine:
        groups = await search(engine)
    bare = [replace(g, trajectories=tuple(replace(t, branches=()) for t in g.trajectories)) for g in groups]
    assert by_branches(bare) == bare
    mixed = replace(groups[0], trajectories=(groups[0].trajectories[0], bare[0].trajectories[1]))
    first = by_branches([mixed])[0]
    assert [t.id.branch for t in first.trajectories] == [1, 2, 3, 0], "it answers the same prompt as the first nodes"
    assert first.rewards[-1] == mixed.rewards[1]


async def test_branches_are_kept_in_journals_and_copies() -> None:
    async with running() as engine:
        (group, _) = await search(engine)
    for trajectory in group.trajectories:
        assert trajectory_from_json(trajectory_to_json(trajectory)) == trajectory
    copies = with_copies([group], 2, seed=0)
    assert {b.id.prompt_id for t in copies[1].trajectories for b in t.branches} == {f"{group.prompt.prompt_id}#1"}
    with pytest.raises(ValueError, match="ids of their own"):
        replace(group.trajectories[0], branches=(group.trajectories[0],))


async def test_greedy_is_one_conversation_and_simulation_reaches_an_end_from_each_node() -> None:
    class Simulating(TreeSearch):
        width, num_expansions, simulate = 3, 1, True

    async with running() as engine:
        for group in await search(engine, sampling=replace(SAMPLING, temperature=0.0)):
            for trajectory in group.trajectories:
                assert len(trajectory.turns) == 4 == len(trajectory.branches)
        agent = Simulating(
            generate=engine.generate, tokenizer=make_tokenizer(), environments={"lock": LockEnv}, max_turns=10
        )
        rollouts = await run_groups(
            agent, puzzles(1, 4, strict=False, seed=1), num_samples=1, sampling=SAMPLING, run_seed=0
        )
    (trajectory,) = rollouts.trajectories
    assert trajectory.status == "completed" and len(trajectory.turns) == 4
    assert len(trajectory.branches) == 3 * 4, "three answers, and the rest of three conversations"
    first = [b for b in trajectory.branches if b.id.branch <= 3]
    assert max(b.reward for b in first) == pytest.approx(trajectory.reward), "worth what their conversation earned"


async def test_an_environment_that_does_not_repeat_itself_fails_and_an_engine_that_fails_ends_it() -> None:
    class Fickle(LockEnv):
        made = 0

        def step(self, action: str) -> Any:
            Fickle.made += 1
            return {**super().step(action), "reward": float(Fickle.made)}

    async with running() as engine:
        agent = agent_over(engine.generate, None, environments={"lock": Fickle})
        (prompt,) = puzzles(1, 4, strict=False, seed=1)
        with pytest.raises(Exception, match="repeats itself"):
            await run_groups(agent, [prompt], num_samples=1, sampling=SAMPLING, run_seed=0)
        await engine.close()
        with pytest.raises(ExceptionGroup) as caught:
            await search(engine)
        assert caught.group_contains(EngineUnavailable)
    with pytest.raises(ConfigError, match=r"width must be >= 1"):
        type("Empty", (TreeSearch,), {"width": 0})(generate=engine.generate, tokenizer=None, environments={})


async def test_through_the_gate_a_search_goes_on_where_it_was() -> None:
    def pipeline_over(engine: SessionEngine, sessions: Sessions) -> RolloutPipeline:
        class Lock(LockEnv):
            def __init__(self, env_config: Any = None, extras: dict[str, Any] | None = None) -> None:
                super().__init__(extras={"code": (0, 1, 2, 3), "strict": False})

        return RolloutPipeline(
            lambda gate: agent_over(gate.generate, sessions, environments={"letters": Lock}),
            engine,
            make_stream(batch_size=2),
            RolloutSettings(num_samples=2, sampling=SAMPLING, seed=5, max_failed_frac=0.0),
            num_ahead=0,
            max_in_flight=1000,
            stop_at_batch=False,
            generate=sessions.generate,
        )

    async with running() as engine:
        pipeline = pipeline_over(engine, Sessions(engine, capacity=4096))
        await pipeline.advance(0)
        expected = (await pipeline.roll_out(pipeline.next_batch(0))).trajectories
        await pipeline.close()
    async with running() as engine:
        pipeline = pipeline_over(engine, Sessions(engine, capacity=4096))
        await pipeline.advance(0)
        num_parked = 0
        for version in range(1, 5):
            await shut_after_steps(pipeline, engine, 3)
            num_parked += pipeline.gate.num_parked
            await sync_weights(engine, WeightUpdate(version=version, source=LocalWeights()))
            pipeline.gate.open()
        found = (await pipeline.roll_out(pipeline.next_batch(0))).trajectories
        await pipeline.close()
        assert len(engine.book) == 0
    assert num_parked and sampled(found) == sampled(expected)


async def test_it_finds_more_than_best_of_n_in_as_many_sampled_tokens() -> None:
    """16 locks, fixed seeds. benchmarks/tree_search.py has more, and a task where the margin is small."""
    async with running() as engine:
        found = await compare(
            engine,
            make_tokenizer(),
            puzzles(16, 5, strict=True, seed=0),
            SAMPLING,
            seed=0,
            max_sampled_tokens=60,
        )
    assert all(mine.num_tokens <= other.num_tokens for mine, other in zip(found.search, found.best_of_n, strict=True))
    assert found.margin > 0.1 and found.margin > 3 * found.margin_error, (found.margin, found.margin_error)
