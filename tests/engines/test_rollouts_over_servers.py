"""Rollouts, adapters and metrics of a run over a real server, as a run builds it."""

from __future__ import annotations

import asyncio
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from skyrl_train.algorithms.objective import PolicyObjective
from skyrl_train.algorithms.policy_losses import ppo_clip
from skyrl_train.algorithms.reductions import token_mean
from skyrl_train.config.load import load_config
from skyrl_train.engines.base import Engine
from skyrl_train.engines.build import Places, build_server_engine
from skyrl_train.entrypoints.build import weights_for
from skyrl_train.entrypoints.build_rollouts import build_sessions
from skyrl_train.observability.endpoint import MetricsEndpoint
from skyrl_train.observability.engine_watch import EngineWatch
from skyrl_train.observability.run_series import RunSeries
from skyrl_train.rollout.agent import Agent
from skyrl_train.rollout.groups import run_groups
from skyrl_train.rollout.sessions import Sessions
from skyrl_train.training.model import load_model
from skyrl_train.types import GenerateRequest, SamplingParams, Trajectory
from skyrl_train.weight_sync.sync import sync_weights
from tests.interpreters import engine_python
from tests.rollout.conversing import ScriptedEnv
from tests.rollout.test_pipeline import tokens
from tests.rollout.test_sessions import GREEDY, THREE_TURNS, asked, prompts
from tests.tiny import make_model, make_tokenizer
from tests.training.test_lora import learn, make_trainer, merged_by_peft

pytestmark = pytest.mark.engines

CONTEXT = 512
LOSS = PolicyObjective(policy_loss=ppo_clip, reduction=token_mean)


@asynccontextmanager
async def running(backend: str, folder: Path, *more: str) -> AsyncIterator[tuple[Any, Engine]]:
    """A configuration and its engine, started."""
    model = folder / "model"
    make_model(attn_implementation="eager", hidden_size=128).save_pretrained(model)
    make_tokenizer().save_pretrained(model)
    config = load_config(
        [
            f"trainer.policy.model.path={model}",
            "trainer.placement.policy_num_gpus_per_node=0",
            f"generator.backend={backend}",
            f"generator.engine_python={engine_python(backend)}",
            f"generator.max_model_len={CONTEXT}",
            "generator.max_turns=10",
            "generator.max_num_seqs=16",
            "generator.metrics.enabled=true",
            *more,
        ]
    ).config
    places = Places(model=model, logs=folder / "logs", weights=folder / "weights")
    engine = await build_server_engine(config, places, tokenizer=make_tokenizer())
    try:
        await engine.start()
        yield config, engine
    finally:
        await engine.close()


async def roll_out(engine: Engine, sessions: Sessions | None) -> list[Trajectory]:
    agent = Agent(
        generate=engine.generate if sessions is None else sessions.generate,
        tokenizer=make_tokenizer(),
        environments={"scripted": ScriptedEnv},
        max_turns=10,
        sessions=sessions,
        later_turns_first=True,
    )
    rollouts = await run_groups(agent, prompts(THREE_TURNS, 3), num_samples=2, sampling=GREEDY, run_seed=3)
    return rollouts.trajectories


@pytest.mark.parametrize("backend", ["sglang", "vllm"])
async def test_sessions_of_a_run_give_the_tokens_of_whole_prompts_and_its_metrics_are_one_page(
    backend: str, tmp_path: Path
) -> None:
    more = (
        "generator.sessions.enabled=true",
        "generator.sessions.pool_sessions=true",
        "generator.sessions.max_pool_size=3",
        "generator.scheduling.enable_priority=true",
    )
    async with running(backend, tmp_path, *more) as (config, engine):
        expected = await roll_out(engine, None)
        sessions = build_sessions(config, engine)
        assert sessions is not None
        series = RunSeries(run_name="r", backend=backend, model="m", total_steps=1)
        async with EngineWatch(engine, every_s=0.2) as watch, MetricsEndpoint(series, engine) as endpoint:
            for _ in range(2):
                found = await roll_out(engine, sessions)
                assert tokens(found) == tokens(expected) and asked(found) == asked(expected)
                assert sessions.num_whole_total == 0
            assert (await engine.stats()).num_sessions == sessions.num_open == 3
            figures = await watch.step()

            def page() -> str:
                with urllib.request.urlopen(endpoint.url, timeout=30) as answer:
                    return str(answer.read().decode())

            text = await asyncio.to_thread(page)
        await sessions.close()
        assert (await engine.stats()).num_sessions == 0
        answered = sum(len(ids) for ids in tokens(expected))
        assert figures["engine/generated_tokens"] == 2 * answered and figures["engine/up"] == 1
        names = [sample.name for family in text_string_to_metric_families(text) for sample in family.samples]
        assert sum(name.startswith("skyrl_") for name in names) > 30
        assert len({name for name in names if name.startswith(f"{backend}:")}) > 10


@pytest.mark.parametrize("backend", ["sglang", "vllm"])
@pytest.mark.parametrize("init_method", ["kaiming", "pissa"])
async def test_an_adapter_that_the_trainer_exports_is_served_as_the_merged_model(
    backend: str, init_method: Any, tmp_path: Path
) -> None:
    more = ("trainer.policy.model.lora.rank=4", f"trainer.policy.model.lora.init_method={init_method}")
    async with running(backend, tmp_path, *more) as (config, engine):
        assert weights_for(config) == "adapter"
        trainer = make_trainer(model=load_model(tmp_path / "model"), rank=4, init_method=init_method, alpha=16.0)
        learn(trainer, LOSS, steps=2)
        await sync_weights(engine, trainer.export_adapter(2))
        merged = merged_by_peft(trainer)
        merged.set_attn_implementation("eager")
        ids = (65, 66, 67, 68, 69)
        sampling = SamplingParams(max_new_tokens=8, temperature=0, ignore_eos=True)
        answer = await engine.generate(GenerateRequest(request_id="a", prompt_token_ids=ids, sampling=sampling))
        whole = torch.tensor([[*ids, *answer.token_ids]])
        with torch.no_grad():
            logprobs = merged(whole).logits.log_softmax(-1)[0, len(ids) - 1 : -1]
        wanted = logprobs.gather(1, whole[0, len(ids) :, None])[:, 0]
        assert [span.version for span in answer.versions] == [2]
        torch.testing.assert_close(torch.tensor(answer.logprobs), wanted, rtol=0, atol=2e-3)
