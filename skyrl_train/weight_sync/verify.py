"""Proof that an engine has the trainer's weights: both score the same few tokens."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence

import torch

from skyrl_train.errors import WeightUpdateError

Score = Callable[[Sequence[int]], Awaitable[Sequence[float]]]
"""Log-probabilities at temperature 1 of token_ids[1:]: [L - 1]."""

TOLERANCES = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5}
"""Largest difference of one token's log-probability between two correct programs, by the type that the engine
computes in. Measured for random weights, which spread more than trained ones: float32 under 1e-5, bfloat16 0.37."""


def probe_tokens(vocab_size: int, length: int = 16) -> tuple[int, ...]:
    """`length` different ids spread over the first half of the vocabulary, where no model has its special tokens."""
    step = max(vocab_size // 2 // length, 1)
    return tuple((1 + i * step) % vocab_size for i in range(length))


async def verify_weights(
    score: Score,
    reference: Score,
    *,
    token_ids: Sequence[int],
    dtype: torch.dtype,
    engine: str,
    version: int,
    tolerance: float | None = None,
) -> float:
    """One short request to the engine (`score`), one forward of the trainer (`reference`); their largest difference.

    Raises WeightUpdateError with the figures where it is over the tolerance, or is no number.
    """
    bound = TOLERANCES[dtype] if tolerance is None else tolerance
    found, wanted = await score(token_ids), await reference(token_ids)
    if len(found) != len(wanted):
        raise WeightUpdateError(f"{engine} scored {len(found)} of the probe's tokens, the trainer {len(wanted)}")
    differences = [abs(one - other) for one, other in zip(found, wanted, strict=True)]
    worst = max(range(len(differences)), key=lambda i: -1.0 if math.isnan(differences[i]) else differences[i])
    if any(math.isnan(difference) for difference in differences) or differences[worst] > bound:
        listed = ", ".join(f"{one:.4f}/{other:.4f}" for one, other in zip(found, wanted, strict=True))
        raise WeightUpdateError(
            f"{engine} does not have the weights of version {version}: log-probabilities of the probe differ by up to "
            f"{differences[worst]:.4g} (token {worst + 1}, {token_ids[worst + 1]}), at most {bound:g} was expected for "
            f"{str(dtype).removeprefix('torch.')}. Engine/trainer: {listed}. The engine stays paused"
        )
    return differences[worst]
