"""The judge over real HTTP: this project's own server, with a model that was taught to say "Score: 7"."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fastapi import FastAPI, Request, Response

from skyrl_train.config.schema_data import JudgeEnvironment
from skyrl_train.data.chat import render_prompt
from skyrl_train.environments.llm_as_a_judge import LLMJudgeEnv, ask, fill, read_score
from skyrl_train.errors import EnvironmentFailure
from skyrl_train.rollout.agent import Agent
from skyrl_train.rollout.environment_pool import EnvironmentPool
from skyrl_train.rollout.groups import run_groups
from skyrl_train.serving.app import create_app
from skyrl_train.types import Prompt, SamplingParams
from tests.rollout.conversing import ScriptedPolicy
from tests.serving.running import app_running, make_engine
from tests.tiny import EOS_ID, make_model, make_tokenizer

TOKENIZER = make_tokenizer()
TEMPLATE = "Q {question} A {answer}"
KEY = "sk-very-secret-0123"


@pytest.fixture(scope="module")
def taught() -> Any:
    """A tiny model that says "Score: 7" to the tests' questions."""
    model = make_model(attn_implementation="sdpa", initializer_range=0.05)
    told = (*TOKENIZER("Score: 7").input_ids, EOS_ID)
    prompts = [
        render_prompt(TOKENIZER, [{"role": "user", "content": fill(TEMPLATE, question="2+3?", answer=str(answer))}])
        for answer in range(10)
    ]
    token_ids = torch.tensor([(*prompt, *told) for prompt in prompts])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        logits = model(input_ids=token_ids[:, :-1], use_cache=False).logits[:, -len(told) :]
        loss = F.cross_entropy(logits.flatten(0, 1), token_ids[:, -len(told) :].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
    return model.state_dict()


@pytest.fixture
async def judge(taught: Any) -> AsyncIterator[str]:
    model = make_model()
    model.load_state_dict(taught)
    engine = make_engine(model)
    async with app_running(create_app(engine, TOKENIZER, "judge", api_key=KEY)) as url:
        yield f"{url}/v1"
    await engine.close()


def keys(base_url: str | None, **more: Any) -> JudgeEnvironment:
    settings: dict[str, Any] = {
        "model": "judge",
        "api_key_env": "JUDGE_KEY",
        "prompt_template": TEMPLATE,
        "max_tokens": 24,
        "retry_delay_s": 0.0,
        **more,
    }
    return JudgeEnvironment(base_url=base_url, **settings)


async def roll_out(settings: JudgeEnvironment, *answers: str, max_failed_frac: float = 1.0) -> Any:
    agent = Agent(
        generate=ScriptedPolicy([(*TOKENIZER(answer).input_ids, EOS_ID) for answer in answers]),
        tokenizer=TOKENIZER,
        environments={"judged": LLMJudgeEnv},
        environment_config=SimpleNamespace(llm_as_a_judge=settings),
        pool=EnvironmentPool(num_workers=4, step_timeout_s=60),
    )
    prompt = Prompt(prompt_id="p", messages=({"role": "user", "content": "2+3?"},), environment="judged")
    return await run_groups(
        agent,
        [prompt],
        num_samples=len(answers),
        sampling=SamplingParams(max_new_tokens=8),
        run_seed=0,
        max_failed_frac=max_failed_frac,
    )


async def test_the_judges_score_is_the_reward(judge: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    out = await roll_out(keys(judge), "5", "4", "7")
    assert out.groups[0].rewards == (0.7, 0.7, 0.7) and out.num_failed == 0
    assert out.metrics()["environment/judge_score"] == 7.0


async def test_an_answer_without_a_score_fails_that_trajectory_and_is_counted(
    judge: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    settings = keys(judge, score_pattern=r"Points: (\d+)")
    with pytest.raises(EnvironmentFailure, match=r"2 of 2 trajectories failed .* answered '.*': no score") as caught:
        await roll_out(settings, "5", "4")
    assert "JUDGE_KEY" not in str(caught.value)


async def test_a_wrong_key_is_refused_once_and_no_key_is_ever_printed(
    judge: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("JUDGE_KEY", "sk-wrong-9876")
    with pytest.raises(EnvironmentFailure, match="refused: status 401") as caught:
        await roll_out(keys(judge), "5")
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(EnvironmentFailure, match="variable JUDGE_KEY is not set"):
        await roll_out(keys(judge), "5")
    assert "sk-wrong-9876" not in caplog.text + str(caught.value)


async def test_a_model_that_is_not_there_is_not_asked_again(judge: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with pytest.raises(EnvironmentFailure, match=r"judge other at .* refused: status 404"):
        await asyncio.to_thread(ask, keys(judge, model="other"), "Q")


async def test_a_judge_that_is_busy_is_asked_again_and_at_last_given_up() -> None:
    app, seen, lock = FastAPI(), [], threading.Lock()  # type: ignore[var-annotated]

    @app.post("/v1/chat/completions")
    async def busy(request: Request) -> Response:
        with lock:
            seen.append(await request.json())
        if len(seen) < 3:
            return Response("later", 429 if len(seen) == 1 else 503)
        return Response('{"choices": [{"message": {"content": "Score: 1, no, Score: 2.5"}}]}')

    async with app_running(app) as url:
        settings = keys(f"{url}/v1", api_key_env=None)
        text = await asyncio.to_thread(ask, settings, "Q")
        assert read_score(text, settings) == 2.5 and len(seen) == 3
        assert seen[0]["messages"] == [{"role": "user", "content": "Q"}] and seen[0]["max_tokens"] == 24
        seen.clear()
        with pytest.raises(EnvironmentFailure, match=r"can't be reached, 2 attempts; last: status 503: 'later'"):
            await asyncio.to_thread(ask, keys(f"{url}/v1", api_key_env=None, max_retries=1), "Q")
    with pytest.raises(EnvironmentFailure, match=r"can't be reached, 2 attempts; last: ConnectError"):
        await asyncio.to_thread(ask, keys(f"{url}/v1", api_key_env=None, max_retries=1), "Q")


@pytest.mark.parametrize("body", ["<html>", "[]", '{"choices": []}', '{"choices": [{"message": {"content": null}}]}'])
async def test_what_is_no_chat_completion_fails(body: str) -> None:
    app = FastAPI()

    @app.post("/v1/chat/completions")
    async def garbage() -> Response:
        return Response(body)

    async with app_running(app) as url:
        with pytest.raises(EnvironmentFailure, match="sent no chat completion"):
            await asyncio.to_thread(ask, keys(f"{url}/v1", api_key_env=None), "Q")


def test_a_score_off_the_scale_is_an_error_and_not_cut() -> None:
    with pytest.raises(EnvironmentFailure, match="score 11; its scale is 0 to 10"):
        read_score("Score: 11", keys(None))


def test_braces_in_an_answer_are_text() -> None:
    filled = fill("{question}|{answer}|{target}|{other}", question="{answer}", answer="{target}{", target="t")
    assert filled == "{answer}|{target}{|t|{other}"
