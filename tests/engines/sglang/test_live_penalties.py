"""Penalties of a real SGLang server, whose scheduler then waits for its sampler, against their formula."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
import torch

from skyrl_train.errors import RequestRejected
from skyrl_train.types import SamplingParams
from tests.engines.sglang.live import PROMPT, Live, ask, assert_close, chosen, logits_of, started

pytestmark = [pytest.mark.engines, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def live(sglang_python: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Live]:
    home = tmp_path_factory.mktemp("sglang")
    async with started(sglang_python, home, "sampling_params.repetition_penalty=1.3") as server:
        yield server


@pytest.mark.parametrize(
    ("repetition", "presence", "frequency"), [(1.3, 0.0, 0.0), (1.0, 0.5, 0.25), (1.0, -0.5, 0.0), (0.8, 0.0, 0.0)]
)
async def test_log_probabilities_are_after_penalties(
    live: Live, repetition: float, presence: float, frequency: float
) -> None:
    """Of the answer's tokens alone, not the prompt's."""
    sampling = SamplingParams(
        max_new_tokens=80,
        temperature=0.7,
        presence_penalty=presence,
        frequency_penalty=frequency,
        repetition_penalty=repetition,
        ignore_eos=True,
    )
    result = await ask(live, sampling)
    logits = logits_of(live.models[0], PROMPT, result.token_ids)
    counts = torch.zeros_like(logits)
    for place in range(1, len(result.token_ids)):
        counts[place] = counts[place - 1]
        counts[place, result.token_ids[place - 1]] += 1
    seen = counts > 0
    penalised = logits - frequency * counts - presence * seen
    penalised = torch.where(seen, torch.where(penalised > 0, penalised / repetition, penalised * repetition), penalised)
    assert_close(result.logprobs, chosen(penalised / 0.7, result.token_ids))
    without = chosen(logits / 0.7, result.token_ids)
    assert (without - torch.tensor(result.logprobs)).abs().max() > 0.01, "nothing was penalised"


async def test_penalties_whose_order_is_left_to_chance_are_refused(live: Live) -> None:
    with pytest.raises(RequestRejected, match=r"repetition_penalty=1\.3, presence_penalty=0\.5: SGLang divides before"):
        await ask(live, SamplingParams(max_new_tokens=8, repetition_penalty=1.3, presence_penalty=0.5))


async def test_a_server_that_was_asked_to_penalise_can(live: Live) -> None:
    assert live.launch.arguments["disable_overlap_schedule"] is True
    assert "penalties" in live.client.traits.capabilities
