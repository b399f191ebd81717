from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from skyrl_gym.envs.aime.env import AIMEEnv
from skyrl_gym.envs.registration import registry

from skyrl_train.environments.base import find_environment
from skyrl_train.environments.gsm8k import GSM8KEnv
from skyrl_train.errors import ConfigError
from skyrl_train.rollout.agent import Agent
from skyrl_train.rollout.environment_pool import EnvironmentPool
from skyrl_train.types import Prompt, SamplingParams, TrajectoryId
from tests.rollout.conversing import ASKED, ScriptedPolicy
from tests.serving.running import app_running
from tests.tiny import EOS_ID, make_tokenizer


def test_our_own_scorer_wins_over_skyrl_gyms_of_the_same_name() -> None:
    assert find_environment("gsm8k") is GSM8KEnv


def test_an_id_of_skyrl_gym_and_a_dotted_path_give_the_class() -> None:
    assert find_environment("aime") is AIMEEnv
    assert find_environment("skyrl_gym.envs.aime.env:AIMEEnv") is AIMEEnv
    assert find_environment("skyrl_gym.envs.aime.env.AIMEEnv") is AIMEEnv


def test_an_unknown_environment_is_an_error_that_lists_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"'arithmatic' is not known. Known: aime, arithmetic, .*gsm8k"):
        find_environment("arithmatic")
    with pytest.raises(ConfigError, match=r"can't be imported: ModuleNotFoundError: .*\(module no_such_package.env\)"):
        find_environment("no_such_package.env:MyEnv")
    with pytest.raises(ConfigError, match="has no 'Missing'"):
        find_environment("skyrl_gym.envs.aime.env:Missing")


def test_every_id_of_skyrl_gym_is_found_or_says_what_is_missing() -> None:
    for name in registry:
        factory = find_environment(name)
        assert callable(factory), name
    assert {"aime", "gsm8k", "gsm8k_multi_turn", "lcb", "search", "searchcode", "text2sql"} <= set(registry)


def test_those_that_read_settings_get_their_own_defaults_and_what_is_set() -> None:
    extras = {"reward_spec": {"ground_truth": "x"}}
    plain: Any = find_environment("search")(env_config="the run's", extras=dict(extras))
    assert plain.tool_group.topk == 3
    other: Any = find_environment("search", {"topk": 5})(env_config="the run's", extras=dict(extras))
    assert other.tool_group.topk == 5
    with pytest.raises(ConfigError, match=r"environment.env_config.search.top_k: no such setting; there is .*topk"):
        find_environment("search", {"top_k": 5})


def test_settings_of_a_users_class_are_read_as_entries_and_as_attributes() -> None:
    made: Any = find_environment(f"{__name__}:Settable", {"depth": 2, "inner": {"name": "n"}})
    assert made.runs_inline
    config = made(env_config=None, extras={}).env_config
    assert config["depth"] == 2 and config.inner.name == "n"


class Settable:
    runs_inline = True

    def __init__(self, *, env_config: Any, extras: dict[str, Any]) -> None:
        self.env_config = env_config


async def test_text2sql_of_skyrl_gym_runs_as_it_is_over_a_real_database(tmp_path: Path) -> None:
    database = tmp_path / "SynSQL-2.5M" / "databases" / "shop" / "shop.sqlite"
    database.parent.mkdir(parents=True)
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("CREATE TABLE items (name TEXT, price INTEGER)")
        connection.execute("INSERT INTO items VALUES ('pen', 3), ('ink', 7)")
        connection.commit()
    answers = [
        "<think>look</think><sql>SELECT name FROM items</sql>",
        "<think>yes</think><solution>SELECT max(price) FROM items</solution>",
    ]
    policy = ScriptedPolicy([(*make_tokenizer()(answer).input_ids, EOS_ID) for answer in answers])
    agent = Agent(
        generate=policy,
        tokenizer=make_tokenizer(),
        environments={"text2sql": find_environment("text2sql", {"db_path": str(tmp_path)})},
        max_turns=4,
        use_conversation_multi_turn=False,
        pool=EnvironmentPool(num_workers=2, step_timeout_s=60),
    )
    row = {
        "db_id": "shop",
        "data": "synsql",
        "reward_spec": {"ground_truth": "SELECT price FROM items WHERE name='ink'"},
    }
    prompt = Prompt(prompt_id="p", messages=ASKED, environment="text2sql", extras=row)
    trajectory = await agent.run(
        TrajectoryId(prompt_id="p", sample=0), prompt, agent.render(prompt), SamplingParams(max_new_tokens=64)
    )
    assert (trajectory.status, trajectory.rewards) == ("completed", (0.0, 1.0)), trajectory.error
    seen = make_tokenizer().decode(policy.requests[1].prompt_token_ids)
    assert "pen" in seen and "3 turns left" in seen, "the environment knows the run's bound on turns"


async def test_search_of_skyrl_gym_runs_as_it_is_over_http() -> None:
    app = FastAPI()

    @app.post("/retrieve")
    async def retrieve(query: dict[str, Any]) -> Any:
        return {"result": [[{"document": {"contents": f"about {query['query']}: Lima"}}]]}

    async with app_running(app) as url:
        settings = {"search_url": f"{url}/retrieve"}
        policy = ScriptedPolicy(
            [(*make_tokenizer()("<search>Peru</search>").input_ids,), (*b"<answer>Lima</answer>", EOS_ID)]
        )
        agent = Agent(
            generate=policy,
            tokenizer=make_tokenizer(),
            environments={"search": find_environment("search", settings)},
            max_turns=3,
            use_conversation_multi_turn=False,
            pool=EnvironmentPool(num_workers=2, step_timeout_s=60),
        )
        row = {"reward_spec": {"ground_truth": {"target": ["Lima"]}}}
        prompt = Prompt(prompt_id="p", messages=ASKED, environment="search", extras=row)
        trajectory = await agent.run(
            TrajectoryId(prompt_id="p", sample=0), prompt, agent.render(prompt), SamplingParams(max_new_tokens=64)
        )
    assert (trajectory.status, trajectory.rewards) == ("completed", (0.0, 1.0)), trajectory.error
    seen = make_tokenizer().decode(policy.requests[1].prompt_token_ids)
    assert "<search>Peru</search>\n<information>" in seen and "about Peru: Lima" in seen
