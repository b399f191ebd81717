"""Which tokens of a mini-batch are selected, against scalars."""

from __future__ import annotations

import pytest
import torch

from skyrl_train.algorithms.policy_losses import POLICY_LOSSES
from skyrl_train.algorithms.selections import SELECTIONS, clip_cov_tokens, covariance, kl_cov_tokens

GENERATOR = torch.Generator().manual_seed(0)
LOGPROBS, ADVANTAGES = -3 * torch.rand(50, generator=GENERATOR), torch.randn(50, generator=GENERATOR)


def slow_covariance() -> list[float]:
    p, a = LOGPROBS.tolist(), ADVANTAGES.tolist()
    mean_p, mean_a = sum(p) / len(p), sum(a) / len(a)
    return [(x - mean_p) * (y - mean_a) for x, y in zip(p, a, strict=True)]


def test_covariance_is_each_tokens_part_of_it() -> None:
    assert covariance(LOGPROBS, ADVANTAGES).tolist() == pytest.approx(slow_covariance())
    assert covariance(torch.tensor([-1.0, -3.0]), torch.tensor([1.0, -1.0])).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("seed", range(5))
def test_clip_cov_draws_among_the_tokens_within_its_bounds(seed: int) -> None:
    chosen = clip_cov_tokens(LOGPROBS, ADVANTAGES, seed=seed, clip_cov_ratio=0.1, clip_cov_lb=0.1, clip_cov_ub=1.0)
    among = {i for i, value in enumerate(slow_covariance()) if 0.1 <= value <= 1.0}
    assert len(among) > 5 == int(chosen.sum())
    assert set(chosen.nonzero()[:, 0].tolist()) < among


def test_the_seed_decides_what_clip_cov_draws() -> None:
    def draw(seed: int) -> list[bool]:
        return clip_cov_tokens(LOGPROBS, ADVANTAGES, seed=seed, clip_cov_ratio=0.1, clip_cov_lb=0.0).tolist()

    assert draw(1) == draw(1)
    assert len({tuple(draw(seed)) for seed in range(10)}) == 10


@pytest.mark.parametrize(
    ("ratio", "lower", "count"), [(0.0, 0.0, 0), (0.001, 0.0, 1), (1.0, 100.0, 0)], ids=["off", "one", "none fit"]
)
def test_clip_cov_draws_one_token_at_least_where_it_is_on(ratio: float, lower: float, count: int) -> None:
    chosen = clip_cov_tokens(LOGPROBS, ADVANTAGES, seed=0, clip_cov_ratio=ratio, clip_cov_lb=lower, clip_cov_ub=1000.0)
    assert int(chosen.sum()) == count


@pytest.mark.parametrize(("frac", "count"), [(0.0, 0), (0.001, 1), (0.25, 12), (1.0, 50)])
def test_kl_cov_takes_the_highest(frac: float, count: int) -> None:
    chosen = kl_cov_tokens(LOGPROBS, ADVANTAGES, seed=0, kl_cov_frac=frac)
    ranked = sorted(range(50), key=lambda i: -slow_covariance()[i])
    assert set(chosen.nonzero()[:, 0].tolist()) == set(ranked[:count])


def test_selections_are_those_of_losses() -> None:
    assert set(SELECTIONS) <= set(POLICY_LOSSES)
