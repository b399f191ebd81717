"""A real SGLang server on this machine's CPU for the tests of its client, and what transformers says of its answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from skyrl_train.config import load_config
from skyrl_train.engines.server.client import Attempt, AttemptResult
from skyrl_train.engines.server.process import ServerProcess
from skyrl_train.engines.sglang.client import SGLangClient
from skyrl_train.engines.sglang.launch import SGLangLaunch, sglang_launch
from skyrl_train.types import SamplingParams
from tests.tiny import make_model, make_tokenizer

CONTEXT = 1000
BOS_ID = 257
PROMPT = tuple(range(40, 60))
SHAPE = {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.2}
GREEDY = partial(SamplingParams, max_new_tokens=8, temperature=0.0, ignore_eos=True)
_wire_ids = iter(range(10**9))


@dataclass(frozen=True, kw_only=True)
class Live:
    """A running server with its client; `models` [2] are what its `folders` hold, the first one is served."""

    client: SGLangClient
    launch: SGLangLaunch
    config: Any
    url: str
    models: tuple[PreTrainedModel, ...]
    folders: tuple[str, ...]


@asynccontextmanager
async def started(python: Path, home: Path, *keys: str) -> AsyncIterator[Live]:
    """A server of two tiny models' first, with these keys of `generator`; ended with all that it started."""
    tokenizer = make_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    models = tuple(make_model("qwen3", seed=seed, attn_implementation="eager", **SHAPE) for seed in (0, 1))
    folders = tuple(str(home / f"model-{seed}") for seed in (0, 1))
    for model, folder in zip(models, folders, strict=True):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    common = ("backend=sglang", f"engine_python={python}", f"max_model_len={CONTEXT}")
    policy = f"trainer.policy.model.path={folders[0]}"
    config = load_config([policy, *(f"generator.{key}" for key in (*common, *keys))]).config
    launch = sglang_launch(config, 0, log_folder=home, bos_token_id=BOS_ID)
    process = ServerProcess(launch.spec)
    try:
        url = await process.start()
        client = launch.client(url)
        try:
            await client.check_identity()
            yield Live(client=client, launch=launch, config=config, url=url, models=models, folders=folders)
        finally:
            await client.close()
    finally:
        await process.stop()


async def ask(live: Live, sampling: SamplingParams, ids: tuple[int, ...] = PROMPT, **of_attempt: Any) -> AttemptResult:
    wire_id = of_attempt.pop("wire_id", None) or f"attempt-{next(_wire_ids)}"
    return await live.client.generate(Attempt(wire_id=wire_id, token_ids=ids, sampling=sampling, **of_attempt))


@torch.no_grad()
def logits_of(model: PreTrainedModel, prompt: tuple[int, ...], answer: tuple[int, ...]) -> torch.Tensor:
    """[L, V]: what each token of the answer was drawn by."""
    logits: torch.Tensor = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return logits


def chosen(logits: torch.Tensor, answer: tuple[int, ...]) -> torch.Tensor:
    """[L]: the log-probabilities of the answer's tokens."""
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]


def assert_close(logprobs: tuple[float, ...], expected: torch.Tensor) -> None:
    torch.testing.assert_close(torch.tensor(logprobs), expected, rtol=0, atol=1e-4)


def text_of(ids: tuple[int, ...]) -> str:
    return str(make_tokenizer().decode(ids, skip_special_tokens=False))


async def until_running(live: Live, count: int = 1) -> None:
    for _ in range(500):
        if (await live.client.figures()).num_running >= count:
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"no {count} requests run after 10 s")
