"""Rollouts over a scripted policy: a plain function of the request that satisfies `GenerateFn`."""

import asyncio
from typing import Any

import pytest

from skyrl_train.data.chat import render_prompt
from skyrl_train.errors import EngineUnavailable, EnvironmentFailure
from skyrl_train.rollout.agent import Agent, request_seed
from skyrl_train.rollout.groups import run_groups
from skyrl_train.types import Completion, GenerateRequest, Prompt, SamplingParams, TrajectoryId, VersionSpan
from tests.tiny import EOS_ID, make_tokenizer

TOKENIZER = make_tokenizer()
SAMPLING = SamplingParams(max_new_tokens=8)


class LengthEnv:
    """Rewards the length of the answer; raises on "boom"; counts what is open."""

    open_count = 0

    def __init__(self, *, env_config: Any, extras: dict[str, Any]) -> None:
        LengthEnv.open_count += 1
        self.prefix = extras.get("prefix", "")

    def init(self, prompt: list[Any]) -> tuple[list[Any], dict[str, Any]]:
        return ([{"role": "system", "content": self.prefix}, *prompt] if self.prefix else prompt), {}

    def step(self, action: str) -> Any:
        if action == "boom":
            raise ZeroDivisionError("no such answer")
        return {"observations": [], "reward": len(action), "done": True, "metadata": {}}

    def close(self) -> None:
        LengthEnv.open_count -= 1


def prompt(name: str, **extras: Any) -> Prompt:
    return Prompt(
        prompt_id=name, messages=({"role": "user", "content": f"q{name}"},), environment="length", extras=extras
    )


def answer(request: GenerateRequest, text: str, finish: str = "stop") -> Completion:
    ids = (*TOKENIZER(text).input_ids, EOS_ID)
    return Completion(
        request_id=request.request_id,
        token_ids=ids,
        logprobs=(-0.5,) * len(ids),
        finish_reason=finish,  # type: ignore[arg-type]
        versions=(VersionSpan(version=0, start=0, end=len(ids)),),
    )


def make_agent(generate: Any) -> Agent:
    return Agent(generate=generate, tokenizer=TOKENIZER, environments={"length": LengthEnv})


async def test_groups_keep_the_prompts_order_whatever_finishes_first() -> None:
    async def generate(request: GenerateRequest) -> Completion:
        prompt_id, sample, _ = request.request_id.split("/")
        await asyncio.sleep(0.02 if prompt_id == "a" else 0.0)
        return answer(request, prompt_id * (int(sample) + 1))

    out = await run_groups(
        make_agent(generate), [prompt("a"), prompt("b")], num_samples=3, sampling=SAMPLING, run_seed=0
    )
    assert [str(t.id) for t in out.trajectories] == ["a/0/0", "a/1/0", "a/2/0", "b/0/0", "b/1/0", "b/2/0"]
    assert [group.rewards for group in out.groups] == [(1.0, 2.0, 3.0), (1.0, 2.0, 3.0)]
    assert out.metrics()["reward/mean"] == 2.0 and LengthEnv.open_count == 0


async def test_a_reward_that_raises_fails_its_trajectory_alone() -> None:
    async def generate(request: GenerateRequest) -> Completion:
        return answer(request, "boom" if request.request_id == "a/1/0" else "fine")

    out = await run_groups(
        make_agent(generate), [prompt("a")], num_samples=4, sampling=SAMPLING, run_seed=0, max_failed_frac=0.25
    )
    assert [str(t.id) for t in out.trajectories] == ["a/0/0", "a/2/0", "a/3/0"]
    (failed,) = (t for group in out.failed for t in group.trajectories)
    assert (str(failed.id), failed.status) == ("a/1/0", "failed")
    assert failed.error is not None and failed.error.startswith("ZeroDivisionError: no such answer (at ")
    assert "test_groups.py:" in failed.error
    assert out.metrics()["rollout/num_failed"] == 1 and LengthEnv.open_count == 0


async def test_more_failures_than_allowed_stop_the_run_and_name_the_first() -> None:
    async def generate(request: GenerateRequest) -> Completion:
        return answer(request, "boom")

    with pytest.raises(EnvironmentFailure, match=r"2 of 2 trajectories failed.*first: a/0/0: ZeroDivisionError"):
        await run_groups(make_agent(generate), [prompt("a")], num_samples=2, sampling=SAMPLING, run_seed=0)


async def test_an_engine_that_dies_ends_the_batch_and_leaves_no_environment_open() -> None:
    cancelled = 0

    async def generate(request: GenerateRequest) -> Completion:
        nonlocal cancelled
        if request.request_id == "a/0/0":
            await asyncio.sleep(0.01)
            raise EngineUnavailable("gone")
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled += 1
            raise
        raise AssertionError

    with pytest.raises(ExceptionGroup) as caught:
        await run_groups(make_agent(generate), [prompt("a")], num_samples=3, sampling=SAMPLING, run_seed=0)
    assert caught.group_contains(EngineUnavailable)
    assert cancelled == 2 and LengthEnv.open_count == 0


async def test_an_environment_may_rewrite_the_prompt() -> None:
    seen: list[tuple[int, ...]] = []

    async def generate(request: GenerateRequest) -> Completion:
        seen.append(request.prompt_token_ids)
        return answer(request, "x")

    await run_groups(
        make_agent(generate), [prompt("a", prefix="Be brief")], num_samples=1, sampling=SAMPLING, run_seed=0
    )
    messages = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "qa"}]
    assert seen == [render_prompt(TOKENIZER, messages)]


async def test_each_sample_has_its_own_seed_and_a_greedy_one_has_none() -> None:
    seeds: list[int | None] = []

    async def generate(request: GenerateRequest) -> Completion:
        seeds.append(request.sampling.seed)
        return answer(request, "x")

    agent = make_agent(generate)
    await run_groups(agent, [prompt("a"), prompt("b")], num_samples=8, sampling=SAMPLING, run_seed=5)
    assert None not in seeds and len(set(seeds)) == 16
    assert (
        seeds[0]
        == request_seed(5, TrajectoryId(prompt_id="a", sample=0))
        != request_seed(6, TrajectoryId(prompt_id="a", sample=0))
    )
    seeds.clear()
    greedy = SamplingParams(max_new_tokens=8, temperature=0)
    await run_groups(agent, [prompt("a")], num_samples=1, sampling=greedy, run_seed=5)
    assert seeds == [None]
