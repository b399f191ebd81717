"""The critic's loss against a scalar reference, its gradients against finite differences."""

from __future__ import annotations

import pytest
import torch

from skyrl_train.algorithms.value_loss import clipped_value_loss


def slow(value: float, old: float, target: float, clip: float) -> tuple[float, float]:
    """Loss and whether the clip made it, one token at a time."""
    clipped = min(max(value, old - clip), old + clip)
    free_loss, clipped_loss = (value - target) ** 2 / 2, (clipped - target) ** 2 / 2
    return max(free_loss, clipped_loss), float(clipped_loss > free_loss)


def draw(seed: int, count: int = 200) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values, old, returns = torch.randn(3, count, generator=generator, dtype=torch.float64)
    return old + 0.5 * values, old, returns


@pytest.mark.parametrize("clip", [0.05, 0.2, 3.0])
def test_it_equals_the_scalar_reference(clip: float) -> None:
    values, old, returns = draw(0)
    found = clipped_value_loss(values, old, returns, value_clip=clip)
    rows = zip(values.tolist(), old.tolist(), returns.tolist(), strict=True)
    wanted = torch.tensor([slow(*row, clip) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(found.values, wanted[:, 0])
    assert found.metrics["clip_frac"].tolist() == wanted[:, 1].tolist()
    if clip < 1:
        assert 0 < found.metrics["clip_frac"].mean() < 1


def test_by_hand() -> None:
    found = clipped_value_loss(
        torch.tensor([0.5, -0.5, 0.1]), torch.zeros(3), torch.ones(3), value_clip=0.2
    )  # towards the target and clipped; away from it; within the bound
    assert found.values.tolist() == pytest.approx([0.32, 1.125, 0.405])
    assert found.metrics["clip_frac"].tolist() == [1, 0, 0]


def test_within_the_bounds_nothing_counts_as_clipped_however_it_rounds() -> None:
    """0.1 + (0.001 - 0.1) is not 0.001 in float32."""
    generator = torch.Generator().manual_seed(3)
    values, old, returns = torch.rand(3, 1000, generator=generator)
    values, old = values * 0.01, old * 0.15
    assert (old + (values - old) != values).any()
    found = clipped_value_loss(values, old, returns)
    assert found.metrics["clip_frac"].sum() == 0
    assert torch.equal(found.values, 0.5 * (values - returns).square())


def test_gradients_equal_finite_differences() -> None:
    values, old, returns = draw(1)
    leaf = values.clone().requires_grad_()
    clipped_value_loss(leaf, old, returns).values.sum().backward()
    assert leaf.grad is not None
    step = 1e-6
    up, down = (clipped_value_loss(values + s, old, returns).values for s in (step, -step))
    torch.testing.assert_close(leaf.grad, (up - down) / (2 * step), rtol=1e-6, atol=1e-6)


def test_a_clipped_token_has_no_gradient_and_the_others_have_plain_regressions() -> None:
    values, old, returns = draw(2)
    leaf = values.clone().requires_grad_()
    found = clipped_value_loss(leaf, old, returns)
    found.values.sum().backward()
    assert leaf.grad is not None
    clipped = found.metrics["clip_frac"].bool()
    assert clipped.any() and (leaf.grad[clipped] == 0).all()
    torch.testing.assert_close(leaf.grad[~clipped], (values - returns)[~clipped])
