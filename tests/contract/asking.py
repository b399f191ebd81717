"""Requests, and the slow reference that answers are held against: one plain forward pass of transformers."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from skyrl_train.engines.base import Engine, LogprobSpace
from skyrl_train.types import Completion, GenerateRequest, SamplingParams, SessionRef
from tests.tiny import EOS_ID

Ids = tuple[int, ...]
LIMIT = 1e-3
"""Largest difference of a log-probability between an engine and transformers, float32."""
MAX_LOOKS = 1500
"""Of 0.02 s at least: half a minute on an idle machine."""

_numbers = itertools.count()


def ask(
    prompt: Sequence[int],
    max_new: int = 12,
    *,
    session: SessionRef | None = None,
    adapter: str | None = None,
    priority: int = 0,
    partial: Completion | None = None,
    **sampling: Any,
) -> GenerateRequest:
    """A request with an id of its own; greedy unless told otherwise, and not ended by the end token."""
    settings = {"temperature": 0.0, "ignore_eos": True, **sampling}
    return GenerateRequest(
        request_id=f"request-{next(_numbers)}",
        prompt_token_ids=tuple(prompt),
        sampling=SamplingParams(max_new_tokens=max_new, **settings),
        session=session,
        adapter=adapter,
        priority=priority,
        partial=partial,
    )


def prompts(*lengths: int, seed: int = 0) -> list[Ids]:
    """Random bytes."""
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(0, 256, (length,), generator=generator).tolist()) for length in lengths]


@torch.no_grad()
def reference_rows(model: PreTrainedModel, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
    """[len(answer), V]: log-probabilities of every token at the places of the answer, temperature 1."""
    ids = torch.tensor([[*prompt, *answer]])
    rows: torch.Tensor = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    return rows


@torch.no_grad()
def reference_greedy(model: PreTrainedModel, prompt: Sequence[int], max_new: int) -> Ids:
    """transformers' greedy answer, not ended by the end token."""
    ids = torch.tensor([list(prompt)])
    config = model.generation_config
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=config.pad_token_id,
    )
    return tuple(output[0, len(prompt) :].tolist())


def assert_greedy(model: PreTrainedModel, prompt: Sequence[int], answer: Completion) -> None:
    """Every token is the likeliest (up to LIMIT: float32 in another order), every log-probability transformers'."""
    rows = reference_rows(model, prompt, answer.token_ids)
    for place, token in enumerate(answer.token_ids):
        best = rows[place].argmax().item()
        assert rows[place, token] > rows[place].max() - LIMIT, f"token {place} is {token}, the likeliest is {best}"
    assert_logprobs(rows, answer)


def assert_logprobs(rows: torch.Tensor, answer: Completion) -> None:
    """`rows` [L, V] are the distributions that the answer's log-probabilities should be of."""
    wanted = rows.gather(-1, torch.tensor(answer.token_ids)[:, None])[:, 0]
    found = torch.tensor(answer.logprobs)
    worst = int((wanted - found).abs().argmax())
    assert (wanted - found).abs().max() < LIMIT, f"token {worst}: {found[worst]:.5f}, transformers {wanted[worst]:.5f}"


def in_space(rows: torch.Tensor, space: LogprobSpace, temperature: float) -> torch.Tensor:
    """What an engine of this space reports where nothing but the temperature reshapes the distribution."""
    return rows if space == "raw" else (rows / temperature).log_softmax(-1)


def answer_that_ends(model: PreTrainedModel, *, max_new: int = 48) -> tuple[Ids, int]:
    """A prompt whose greedy answer has the end token, and the place of that token; it is not the first."""
    for prompt in prompts(*[9] * 200, seed=11):
        answer = reference_greedy(model, prompt, max_new)
        if EOS_ID in answer[2:] and EOS_ID not in answer[:2]:
            return prompt, answer.index(EOS_ID)
    raise AssertionError("no prompt of 200 has an answer that ends")


async def until(condition: Callable[[], Any]) -> None:
    """Waits for what the engine will do soon. `condition` may be async; it returns what is true in the end."""
    for _ in range(MAX_LOOKS):
        value = condition()
        if asyncio.iscoroutine(value):
            value = await value
        if value:
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"{condition.__qualname__} did not come true in {MAX_LOOKS} looks")


MOMENTS = (0.2, 0.05, 0.5, 0.02, 1.0, 2.0, 4.0)
"""Seconds after which a request is met half way, tried in turn: engines and machines differ. A server that is busy
answers no question about what runs, so asking it would come too late."""
LONG = 1900
"""Tokens of an answer that is to be met half way, and is read to its end."""
ENDLESS = 8000
"""Tokens of an answer that nobody waits for: a process that gets no processor for two seconds is still in time."""


async def idle(engine: Engine) -> None:
    """Until nothing runs and nothing waits."""

    async def is_idle() -> bool:
        stats = await engine.stats()
        return stats.num_running == stats.num_waiting == 0

    await until(is_idle)


def chi_square(counts: dict[Any, int], odds: dict[Any, float]) -> tuple[float, float]:
    """Pearson's statistic, and the value that it passes once in a million times when `odds` are right.

    Outcomes that are expected fewer than 5 times are counted as one. The limit is Wilson and Hilferty's approximation.
    """
    total = sum(counts.values())
    bins: list[tuple[float, float]] = []
    rare_found = rare_expected = 0.0
    for outcome, probability in odds.items():
        expected, found = total * probability, counts.get(outcome, 0)
        if expected < 5:
            rare_found, rare_expected = rare_found + found, rare_expected + expected
        else:
            bins.append((found, expected))
    if rare_expected >= 5:
        bins.append((rare_found, rare_expected))
    statistic = sum((found - expected) ** 2 / expected for found, expected in bins)
    freedom = len(bins) - 1
    spread = 2 / (9 * freedom)
    limit = freedom * (1 - spread + 4.753 * math.sqrt(spread)) ** 3
    return statistic, limit
