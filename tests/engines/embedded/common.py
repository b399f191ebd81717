"""Ways to drive an EngineCore in tests, and the slow reference: transformers' own generate and forward."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from skyrl_train.engines.embedded import EmbeddedConfig
from skyrl_train.engines.embedded.core import EngineCore
from skyrl_train.engines.embedded.drafts.base import DraftSource
from skyrl_train.types import Completion, GenerateRequest, SamplingParams
from tests.tiny import EOS_ID, PAD_ID, make_model, make_tokenizer

Prompt = tuple[int, ...]


def make_core(model: Any = None, *, drafts: DraftSource | None = None, **config: Any) -> EngineCore:
    """A small engine: 4 seats, 16 rows a step, 256 slots, contexts of 128."""
    settings = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "kv_cache_tokens": 256, "max_context_len": 128}
    model = model if model is not None else make_model()
    return EngineCore(model, make_tokenizer(), config=EmbeddedConfig(**{**settings, **config}), drafts=drafts)


def request(
    name: str, prompt: Iterable[int], max_new: int = 16, *, priority: int = 0, **sampling: Any
) -> GenerateRequest:
    """Greedy unless told otherwise."""
    params = SamplingParams(max_new_tokens=max_new, **{"temperature": 0.0, **sampling})
    return GenerateRequest(request_id=name, prompt_token_ids=tuple(prompt), sampling=params, priority=priority)


def run(core: EngineCore, requests: Sequence[GenerateRequest]) -> list[Completion]:
    """Add all requests, step until all are done, check the owners of slots after each step."""
    for item in requests:
        core.add(item)
    done: dict[str, Completion] = {}
    while core.has_work:
        done |= {item.completion.request_id: item.completion for item in core.step()}
        core.check_integrity()
    return [done[item.request_id] for item in requests]


def random_prompts(*lengths: int, seed: int = 0) -> list[Prompt]:
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(0, 256, (n,), generator=generator).tolist()) for n in lengths]


def greedy_reference(model: Any, prompt: Prompt, max_new: int) -> Prompt:
    """transformers' greedy generate on one unpadded prompt; the model is loaded with eager attention."""
    ids = torch.tensor([prompt])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new,
        do_sample=False,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )
    return tuple(output[0, len(prompt) :].tolist())


@torch.no_grad()
def logits_reference(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    """[L, V] of one plain forward pass."""
    logits: torch.Tensor = model(input_ids=torch.tensor([list(tokens)])).logits[0]
    return logits


def logprob_reference(model: Any, prompt: Prompt, answer: Sequence[int], temperature: float = 1.0) -> torch.Tensor:
    """[len(answer)]: log-probabilities of the answer's tokens."""
    logits = logits_reference(model, (*prompt, *answer))[len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(-1, torch.tensor(list(answer))[:, None])[:, 0]
