"""A real vLLM server on this machine's CPU for the tests of its client, and what transformers says of its answers."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from skyrl_train.config import load_config
from skyrl_train.engines.server.client import Attempt, AttemptResult
from skyrl_train.engines.server.process import ServerProcess
from skyrl_train.engines.vllm.client import VLLMClient
from skyrl_train.engines.vllm.launch import vllm_launch
from skyrl_train.types import SamplingParams
from tests.tiny import VOCAB_SIZE, make_model, make_tokenizer

CONTEXT = 8000
"""Longer than any answer gets in the time that its abort may take."""
BLOCK = 128
"""Tokens of one block of the cache, the smallest prefix that is found again."""
PROMPT = tuple(range(40, 60))
LIMIT = 1e-3
SHAPE = {
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.2,
    "max_position_embeddings": CONTEXT,
}
_numbers = itertools.count()


@dataclass(frozen=True, kw_only=True)
class Live:
    """A running server with its client; `models` [2] are what its `folders` hold, the first one is served."""

    client: VLLMClient
    config: Any
    url: str
    models: tuple[PreTrainedModel, ...]
    folders: tuple[Path, ...]


@asynccontextmanager
async def started(python: Path, home: Path, *keys: str, arch: str = "qwen3") -> AsyncIterator[Live]:
    """A server of two tiny models' first, with these keys of `generator`; ended with all that it started."""
    models = tuple(make_model(arch, seed=seed, attn_implementation="eager", **SHAPE) for seed in (0, 1))
    folders = tuple(home / f"model-{seed}" for seed in (0, 1))
    for model, folder in zip(models, folders, strict=True):
        model.save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
    common = ("backend=vllm", f"engine_python={python}", f"max_model_len={CONTEXT}", "max_num_seqs=8")
    policy = f"trainer.policy.model.path={folders[0]}"
    config = load_config([policy, *(f"generator.{key}" for key in (*common, *keys))]).config
    tokenizer = make_tokenizer()
    launch = vllm_launch(config, 0, log_folder=home, vocab_size=VOCAB_SIZE, decode=tokenizer.decode)
    assert launch.spec is not None
    process = ServerProcess(launch.spec)
    try:
        url = await process.start()
        client = launch.client(url)
        try:
            await client.check_identity()
            yield Live(client=client, config=config, url=url, models=models, folders=folders)
        finally:
            await client.close()
    finally:
        await process.stop()


async def ask(live: Live, sampling: SamplingParams, ids: Sequence[int] = PROMPT, **of_attempt: Any) -> AttemptResult:
    wire_id = of_attempt.pop("wire_id", None) or f"attempt-{next(_numbers)}"
    return await live.client.generate(Attempt(wire_id=wire_id, token_ids=tuple(ids), sampling=sampling, **of_attempt))


def greedy(count: int = 8, **more: Any) -> SamplingParams:
    return SamplingParams(max_new_tokens=count, **{"temperature": 0.0, "ignore_eos": True, **more})


@torch.no_grad()
def logits_of(model: PreTrainedModel, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
    """[L, V]: what each token of the answer was drawn by."""
    logits: torch.Tensor = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
    return logits


def chosen(logits: torch.Tensor, answer: Sequence[int]) -> torch.Tensor:
    """[L]: the log-probabilities of the answer's tokens."""
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]


def assert_of(model: PreTrainedModel, result: AttemptResult, prompt: Sequence[int] = PROMPT) -> None:
    """The log-probabilities are this model's at temperature 1."""
    expected = chosen(logits_of(model, prompt, result.token_ids), result.token_ids)
    torch.testing.assert_close(torch.tensor(result.logprobs), expected, rtol=0, atol=LIMIT)


async def until_idle(live: Live) -> None:
    for _ in range(500):
        figures = await live.client.figures()
        if figures.num_running == figures.num_waiting == 0:
            return
        await asyncio.sleep(0.02)
    raise AssertionError("requests still run after 10 s")
