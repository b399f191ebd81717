"""The probe that proves an engine's weights."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from skyrl_train.errors import WeightUpdateError
from skyrl_train.weight_sync.verify import Score, probe_tokens, verify_weights


def says(*values: float) -> Score:
    async def score(token_ids: Sequence[int]) -> Sequence[float]:
        return values

    return score


async def verify(score: Score, reference: Score) -> float:
    return await verify_weights(
        score, reference, token_ids=(4, 5, 6), dtype=torch.float32, engine="sglang-0", version=3
    )


async def test_the_same_numbers_pass_and_the_largest_difference_comes_back() -> None:
    assert await verify(says(-1.0, -2.0), says(-1.0, -2.0005)) == pytest.approx(0.0005)


@pytest.mark.parametrize("engine_says", [(-1.0, -2.5), (-1.0, float("nan")), (float("-inf"), -2.0)])
async def test_other_numbers_are_an_error_with_the_figures(engine_says: tuple[float, float]) -> None:
    with pytest.raises(WeightUpdateError, match=r"sglang-0 does not have the weights of version 3.*-1\.0000"):
        await verify(says(*engine_says), says(-1.0, -2.0))


async def test_an_engine_that_scores_another_number_of_tokens_is_an_error() -> None:
    with pytest.raises(WeightUpdateError, match="scored 1 of the probe's tokens, the trainer 2"):
        await verify(says(-1.0), says(-1.0, -2.0))


@pytest.mark.parametrize("vocab_size", [2, 20, 300, 151_936])
def test_the_probe_stays_in_the_vocabulary(vocab_size: int) -> None:
    tokens = probe_tokens(vocab_size)
    assert len(tokens) == 16 and all(0 <= token < vocab_size for token in tokens)
