"""Environments in threads: bounded, with deadlines, closed exactly once however a trajectory ends."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
from skyrl_gym.envs.base_text_env import BaseTextEnv

from skyrl_train.errors import EnvironmentsStuck, EnvironmentTimeout
from skyrl_train.rollout.environment_pool import EnvironmentPool
from skyrl_train.rollout.hosted_environment import HostedEnvironment
from tests.rollout.conversing import ScriptedEnv, ScriptedPolicy, converse, says
from tests.tiny import EOS_ID

ANSWERS = [(97, EOS_ID), (98, EOS_ID)]
AT_ONCE = 0.05
"""A deadline that a blocked call is over soon."""


class Threaded(ScriptedEnv):
    """Notes where each of its methods runs; `hold` in a script's output blocks the step until it is set."""

    runs_inline = False
    threads: list[str]

    def __init__(self, *, env_config: Any, extras: dict[str, Any]) -> None:
        super().__init__(env_config=env_config, extras=extras)
        self.threads = extras.setdefault("threads", [])

    def init(self, prompt: list[Any]) -> Any:
        self.threads.append(threading.current_thread().name)
        return prompt, {}

    def step(self, action: str) -> Any:
        self.threads.append(threading.current_thread().name)
        hold = self.script[0].pop("hold", None) if isinstance(self.script[0], dict) else None
        if hold is not None:
            assert hold.wait(60)
        return super().step(action)

    def close(self) -> None:
        self.threads.append(threading.current_thread().name)
        super().close()


async def run(script: list[Any], pool: EnvironmentPool | None, environment: Any = Threaded, **options: Any) -> Any:
    return await converse(ScriptedPolicy(ANSWERS), script, environments={"scripted": environment}, pool=pool, **options)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.001)


def hosted(pool: EnvironmentPool, extras: dict[str, Any], factory: Any = Threaded) -> HostedEnvironment:
    return HostedEnvironment("env", factory, env_config=None, extras={"max_turns": 2, **extras}, pool=pool)


async def test_every_method_of_one_that_may_block_runs_in_a_worker() -> None:
    pool = EnvironmentPool(num_workers=2, step_timeout_s=60)
    extras: dict[str, Any] = {"script": [says("x"), {}], "threads": []}
    environment = hosted(pool, extras)
    await environment.init([])
    await environment.step("a")
    await environment.finish()
    assert len(extras["threads"]) == 3 and all(name.startswith("environment-") for name in extras["threads"])
    pool.check_integrity()


async def test_one_that_only_computes_and_all_without_a_pool_run_on_the_event_loop() -> None:
    here = threading.current_thread().name

    class Inline(Threaded):
        runs_inline = True

    for pool, environment in ((EnvironmentPool(num_workers=2, step_timeout_s=60), Inline), (None, Threaded)):
        extras: dict[str, Any] = {"script": [{}], "threads": []}
        made = HostedEnvironment("env", environment, env_config=None, extras={"max_turns": 1, **extras}, pool=pool)
        await made.init([])
        await made.step("a")
        await made.finish()
        assert extras["threads"] == [here] * 3


async def test_one_with_skyrl_gyms_own_init_and_close_changes_threads_for_its_steps_alone() -> None:
    threads: list[str] = []

    class Gym(BaseTextEnv):  # type: ignore[misc]
        def __init__(self, env_config: Any = None, extras: Any = None) -> None:
            super().__init__()
            threads.append(threading.current_thread().name)

        def step(self, action: str) -> Any:
            threads.append(threading.current_thread().name)
            return {"observations": [], "reward": 1.0, "done": True, "metadata": {}}

    pool = EnvironmentPool(num_workers=1, step_timeout_s=60)
    trajectory = await run([], pool, Gym)
    assert trajectory.rewards == (1.0,)
    assert threads == [threading.current_thread().name, "environment-1"]


async def test_no_more_than_num_workers_run_at_once_and_all_get_their_turn() -> None:
    pool = EnvironmentPool(num_workers=3, step_timeout_s=60)
    together = threading.Barrier(3)
    running, most, lock = 0, 0, threading.Lock()

    class Counting(Threaded):
        def step(self, action: str) -> Any:
            nonlocal running, most
            with lock:
                running += 1
                most = max(most, running)
            together.wait(60)  # passes only when three are here
            with lock:
                running -= 1
            return super().step(action)

    trajectories = await asyncio.gather(*(run([{"reward": i}], pool, Counting) for i in range(9)))
    assert [t.reward for t in trajectories] == [float(i) for i in range(9)]
    assert most == 3
    pool.check_integrity()


async def test_a_step_over_its_deadline_fails_its_trajectory_and_closes_the_environment_when_it_returns() -> None:
    pool = EnvironmentPool(num_workers=2, step_timeout_s=AT_ONCE)
    hold, log = threading.Event(), []  # type: ignore[var-annotated]
    stuck = await run([{"hold": hold}], pool, log=log)
    assert stuck.status == "failed" and stuck.rewards == (0.0,) and len(stuck.turns) == 1
    assert "environment 'scripted': step took more than 0.05 s (environment.step_timeout_s)" in stuck.error
    assert pool.num_stuck == 1 and log == []
    pool.check_integrity()

    other = await run([{"reward": 1.0}], pool)
    assert other.reward == 1.0, "the other worker serves"
    hold.set()
    await until(lambda: pool.num_stuck == 0)
    assert log == ["a", "closed"]
    pool.check_integrity()
    assert (await run([{"reward": 1.0}], pool)).reward == 1.0


async def test_an_init_over_its_deadline_is_closed_once_it_was_made() -> None:
    hold, closed = threading.Event(), threading.Event()

    class Slow(Threaded):
        def __init__(self, *, env_config: Any, extras: dict[str, Any]) -> None:
            assert hold.wait(60)
            super().__init__(env_config=env_config, extras=extras)

        def close(self) -> None:
            closed.set()

    pool = EnvironmentPool(num_workers=2, step_timeout_s=AT_ONCE)
    trajectory = await run([{}], pool, Slow)
    assert trajectory.status == "failed" and "init took more than" in trajectory.error and not trajectory.turns
    assert not closed.is_set()
    hold.set()
    assert await asyncio.to_thread(closed.wait, 60)


async def test_when_every_worker_is_stuck_who_waits_and_who_comes_gets_an_error_instead_of_a_hang() -> None:
    pool = EnvironmentPool(num_workers=2, step_timeout_s=AT_ONCE)
    holds = [threading.Event(), threading.Event()]
    runs = [run([{"hold": hold}], pool) for hold in holds]
    waiting = [run([{}], pool) for _ in range(3)]
    results = await asyncio.gather(*runs, *waiting, return_exceptions=True)
    outcomes = [result if isinstance(result, Exception) else result.status for result in results]
    assert outcomes.count("failed") == 2
    stuck = [outcome for outcome in outcomes if isinstance(outcome, EnvironmentsStuck)]
    assert stuck and len(stuck) + outcomes.count("completed") == 3
    with pytest.raises(EnvironmentsStuck, match=r"all 2 workers \(environment.num_workers\) are stuck"):
        await run([{}], pool)
    for hold in holds:
        hold.set()
    await until(lambda: pool.num_stuck == 0)
    pool.check_integrity()
    assert (await run([{"reward": 1.0}], pool)).reward == 1.0


async def test_a_cancelled_trajectory_closes_its_environment_after_the_step_that_it_is_in() -> None:
    pool = EnvironmentPool(num_workers=1, step_timeout_s=60)
    began, hold, log = threading.Event(), threading.Event(), []  # type: ignore[var-annotated]

    class Telling(Threaded):
        def step(self, action: str) -> Any:
            began.set()
            return super().step(action)

    task = asyncio.create_task(run([{"hold": hold}], pool, Telling, log=log))
    assert await asyncio.to_thread(began.wait, 60)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert log == []
    hold.set()
    await until(lambda: log == ["a", "closed"])
    assert (await run([{"reward": 1.0}], pool)).reward == 1.0, "the worker is free again"
    pool.check_integrity()


async def test_who_is_cancelled_while_waiting_takes_no_worker() -> None:
    pool = EnvironmentPool(num_workers=1, step_timeout_s=60)
    hold = threading.Event()
    first = asyncio.create_task(run([{"hold": hold}], pool))
    await until(lambda: len(pool._waiting) == 0 and pool._num_free == 0)
    second = asyncio.create_task(run([{}], pool))
    await until(lambda: len(pool._waiting) == 1)
    second.cancel()
    third = asyncio.create_task(run([{"reward": 1.0}], pool))
    hold.set()
    assert (await first).status == "completed" and (await third).reward == 1.0
    with pytest.raises(asyncio.CancelledError):
        await second
    await until(lambda: pool._num_free == 1)
    pool.check_integrity()


async def test_what_a_thread_raises_fails_the_trajectory_and_names_the_environments_line() -> None:
    class Raising(Threaded):
        def step(self, action: str) -> Any:
            raise KeyError("column")

    log: list[str] = []
    trajectory = await run([{}], EnvironmentPool(num_workers=1, step_timeout_s=60), Raising, log=log)
    assert trajectory.status == "failed" and "KeyError: 'column' (at " in trajectory.error
    assert "test_environment_pool.py:" in trajectory.error and log == ["closed"]


async def test_a_close_that_raises_fails_its_trajectory_but_hides_no_earlier_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Unclosable(Threaded):
        def close(self) -> None:
            super().close()
            raise OSError("no such handle")

    for pool in (None, EnvironmentPool(num_workers=1, step_timeout_s=60)):
        log: list[str] = []
        trajectory = await run([{}], pool, Unclosable, log=log)
        assert trajectory.status == "failed" and "no such handle" in trajectory.error and log == ["a", "closed"]
        trajectory = await run([ZeroDivisionError("first")], pool, Unclosable)
        assert trajectory.error.startswith("ZeroDivisionError: first")
        assert "could not be closed" in caplog.text


async def test_one_that_ended_well_is_closed_even_when_no_worker_is_left_for_it() -> None:
    pool = EnvironmentPool(num_workers=1, step_timeout_s=AT_ONCE)
    hold, log = threading.Event(), []  # type: ignore[var-annotated]
    environment = hosted(pool, {"script": [{}], "log": log})
    await environment.init([])
    await environment.step("a")
    with pytest.raises(EnvironmentTimeout):
        await pool.call(lambda: hold.wait(60), what="another", started=lambda call: None)
    with pytest.raises(EnvironmentsStuck):
        await environment.finish()
    await environment.abandon()
    await until(lambda: log == ["a", "closed"])
    hold.set()
    await until(lambda: pool.num_stuck == 0)


async def test_the_pools_own_errors_say_which_call_it_was() -> None:
    pool = EnvironmentPool(num_workers=1, step_timeout_s=AT_ONCE)
    hold = threading.Event()
    with pytest.raises(EnvironmentTimeout, match=r"my call took more than 0.05 s .* 1 of 1 workers are stuck"):
        await pool.call(lambda: hold.wait(60), what="my call", started=lambda call: None)
    hold.set()
    await until(lambda: pool.num_stuck == 0)


def test_a_pool_of_no_workers_or_no_time_is_refused() -> None:
    with pytest.raises(ValueError, match="num_workers must be >= 1"):
        EnvironmentPool(num_workers=0, step_timeout_s=1)
    with pytest.raises(ValueError, match="step_timeout_s > 0"):
        EnvironmentPool(num_workers=1, step_timeout_s=0)
