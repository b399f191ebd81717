"""One trajectory of several turns: when it ends, what it is called, what it leaves behind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from skyrl_train.rollout.agent import Agent, request_seed
from skyrl_train.rollout.groups import run_groups
from skyrl_train.types import Prompt, SamplingParams, TrajectoryId
from tests.rollout.conversing import ASKED, ScriptedEnv, ScriptedPolicy, converse, says
from tests.tiny import EOS_ID, make_tokenizer


def answers(*texts: bytes) -> Sequence[tuple[int, ...]]:
    return [(*text, EOS_ID) for text in texts]


async def test_it_goes_on_until_the_environment_is_done_with_a_reward_for_each_turn() -> None:
    log: list[str] = []
    script = [says("more", reward=0.5), says("more", reward=-1), {"reward": 2, "done": True}, {}]
    trajectory = await converse(ScriptedPolicy(answers(b"a", b"b", b"c", b"d")), script, log=log)
    assert (trajectory.status, trajectory.rewards, trajectory.reward) == ("completed", (0.5, -1.0, 2.0), 1.5)
    assert log == ["a", "b", "c", "closed"]


async def test_each_turn_has_a_request_name_and_a_seed_of_its_own_and_the_first_ones_are_the_trajectorys() -> None:
    policy = ScriptedPolicy(answers(b"a", b"b", b"c"))
    await converse(policy, [says("x"), says("x"), {}])
    assert [request.request_id for request in policy.requests] == ["p/0/0", "p/0/0/t1", "p/0/0/t2"]
    seeds = [request.sampling.seed for request in policy.requests]
    assert seeds[0] == request_seed(7, TrajectoryId(prompt_id="p", sample=0)) and len(set(seeds)) == 3
    again = ScriptedPolicy(answers(b"z", b"b", b"c"))
    await converse(again, [says("y"), says("x"), {}])
    assert [request.sampling.seed for request in again.requests] == seeds


async def test_the_bound_on_turns_truncates_and_the_environment_knows_it() -> None:
    seen: list[int] = []

    class Bounded(ScriptedEnv):
        def __init__(self, *, env_config: Any, extras: dict[str, Any]) -> None:
            super().__init__(env_config=env_config, extras=extras)
            seen.append(self.max_turns)

    policy = ScriptedPolicy(answers(b"a", b"b", b"c"))
    script = [says("x", reward=0.25), says("x", reward=0.5), {}]
    trajectory = await converse(policy, script, max_turns=2, environments={"scripted": Bounded})
    assert (trajectory.status, trajectory.rewards) == ("truncated", (0.25, 0.5))
    assert seen == [2]


@pytest.mark.parametrize(("finish", "status"), [("length", "truncated"), ("abort", "aborted")])
async def test_an_answer_that_was_cut_off_is_scored_and_ends_it(finish: str, status: str) -> None:
    policy = ScriptedPolicy(answers(b"a", b"b", b"c"), finish=["stop", finish])
    trajectory = await converse(policy, [says("x"), says("x", reward=0.5), {}])
    assert (trajectory.status, trajectory.rewards) == (status, (0.0, 0.5))


async def test_a_history_over_the_input_length_ends_it_before_the_next_request() -> None:
    script = [says("x" * 40, reward=0.5), {"reward": 1}]
    probe = ScriptedPolicy(answers(b"a", b"b"))
    await converse(probe, script)
    length = len(probe.requests[1].prompt_token_ids)
    within = await converse(ScriptedPolicy(answers(b"a", b"b")), script, max_input_length=length)
    over = await converse(ScriptedPolicy(answers(b"a", b"b")), script, max_input_length=length - 1)
    assert (within.status, within.rewards) == ("completed", (0.5, 1.0))
    assert (over.status, over.rewards) == ("truncated", (0.5,))


async def test_a_prompt_that_init_makes_too_long_fails_it() -> None:
    class Wordy(ScriptedEnv):
        def init(self, prompt: list[Any]) -> Any:
            return [{"role": "system", "content": "x" * 100}, *prompt], {}

    options: dict[str, Any] = {"environments": {"scripted": Wordy}, "max_input_length": 90}
    trajectory = await converse(ScriptedPolicy(answers(b"a")), [{}], **options)
    assert trajectory.status == "failed" and "generator.max_input_length is 90" in str(trajectory.error)


async def test_an_environment_that_raises_later_keeps_the_turns_so_far_and_is_closed_once() -> None:
    log: list[str] = []
    script = [says("x", reward=0.5), ZeroDivisionError("no such answer")]
    trajectory = await converse(ScriptedPolicy(answers(b"a", b"b")), script, log=log)
    assert (trajectory.status, trajectory.rewards, len(trajectory.turns)) == ("failed", (0.5, 0.0), 2)
    assert str(trajectory.error).startswith("ZeroDivisionError: no such answer (at ")
    assert log == ["a", "b", "closed"]


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), "much", None])
async def test_a_reward_that_is_no_finite_number_fails_it(reward: Any) -> None:
    trajectory = await converse(ScriptedPolicy(answers(b"a")), [{"reward": reward}])
    assert trajectory.status == "failed" and trajectory.rewards == (0.0,)


async def test_what_the_environment_measured_is_kept_the_last_turn_wins_and_text_is_left_out() -> None:
    class Measuring(ScriptedEnv):
        def get_metrics(self) -> dict[str, Any]:
            return {"steps": len(self.log), "name": "m"}

    script = [
        says("x", metadata={"calls": 1, "tool": "calc", "first": True}),
        {"metadata": {"calls": 2, "nan": float("nan")}},
    ]
    policy = ScriptedPolicy(answers(b"a", b"b"))
    trajectory = await converse(policy, script, environments={"scripted": Measuring})
    assert trajectory.metrics == {"calls": 2.0, "first": 1.0, "steps": 2.0}


async def test_a_step_without_metadata_is_fine() -> None:
    trajectory = await converse(ScriptedPolicy(answers(b"a")), [{"metadata": None}])
    assert trajectory.status == "completed" and trajectory.metrics == {}


async def test_a_batch_counts_its_turns_and_what_stood_between_them() -> None:
    prompts = [
        Prompt(prompt_id=name, messages=ASKED, environment="scripted", extras={"script": script})
        for name, script in (("a", [{"metadata": {"calls": 0}}]), ("b", [says("obs"), {"metadata": {"calls": 1}}]))
    ]
    agent = Agent(
        generate=ScriptedPolicy(answers(b"1", b"2", b"3")),
        tokenizer=make_tokenizer(),
        environments={"scripted": ScriptedEnv},
        max_turns=2,
    )
    out = await run_groups(agent, prompts, num_samples=1, sampling=SamplingParams(max_new_tokens=8), run_seed=0)
    metrics = out.metrics()
    assert (metrics["rollout/turns_mean"], metrics["rollout/turns_max"]) == (1.5, 2)
    between = "\n<|im_start|>user\nobs<|im_end|>\n<|im_start|>assistant\n"
    assert metrics["rollout/observation_len_mean"] == len(make_tokenizer()(between).input_ids) / 2
    assert metrics["environment/calls"] == 0.5
    assert metrics["rollout/response_len_mean"] == 3.0, "tokens of all turns, for each trajectory"
