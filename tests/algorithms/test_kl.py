"""KL estimators: value and gradient, against the definition on a small distribution."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from skyrl_train.algorithms.kl import KL_ESTIMATORS

PAIRS = [(-1.0, -1.0), (-0.2, -2.0), (-3.0, -0.1), (-1.5, -1.4)]
Scalar = Callable[[float, float], float]

BY_HAND: dict[str, Scalar] = {
    "k1": lambda new, ref: new - ref,
    "k2": lambda new, ref: (new - ref) ** 2 / 2,
    "k3": lambda new, ref: math.exp(ref - new) - 1 - (ref - new),
    "abs": lambda new, ref: abs(new - ref),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_values_equal_the_formula(name: str) -> None:
    new, ref = torch.tensor(PAIRS, dtype=torch.float64).T
    wanted = [BY_HAND[name](*pair) for pair in PAIRS]
    assert KL_ESTIMATORS[name](new, ref).tolist() == pytest.approx(wanted)


@pytest.mark.parametrize("name", BY_HAND)
def test_gradients_equal_finite_differences(name: str) -> None:
    """A KL under no_grad has the right value and does nothing."""
    step = 1e-6
    for new, ref in PAIRS:
        if name == "abs" and new == ref:
            continue
        at = torch.tensor(new, dtype=torch.float64, requires_grad=True)
        KL_ESTIMATORS[name](at, torch.tensor(ref, dtype=torch.float64)).backward()  # type: ignore[no-untyped-call]
        slope = (BY_HAND[name](new + step, ref) - BY_HAND[name](new - step, ref)) / (2 * step)
        assert at.grad is not None and at.grad.item() == pytest.approx(slope, abs=1e-7)


def test_k1_and_k3_are_unbiased_and_the_gradient_of_k2_is_the_kls() -> None:
    """Expectations over all 4 tokens of a distribution, exactly: no sampling."""
    logits = torch.tensor([0.3, -0.5, 1.0, 0.1], dtype=torch.float64, requires_grad=True)
    ref = torch.log_softmax(torch.tensor([1.0, 0.2, -0.3, 0.0], dtype=torch.float64), -1)
    new = torch.log_softmax(logits, -1)
    kl = (new.exp() * (new - ref)).sum()
    (kl_gradient,) = torch.autograd.grad(kl, logits, retain_graph=True)
    p = new.exp().detach()
    for name in ("k1", "k3"):
        assert (p * KL_ESTIMATORS[name](new, ref)).sum().item() == pytest.approx(kl.item())
    (gradient,) = torch.autograd.grad((p * KL_ESTIMATORS["k2"](new, ref)).sum(), logits, retain_graph=True)
    torch.testing.assert_close(gradient, kl_gradient)
    (gradient,) = torch.autograd.grad((p * KL_ESTIMATORS["k1"](new, ref)).sum(), logits, retain_graph=True)
    torch.testing.assert_close(gradient, torch.zeros(4, dtype=torch.float64))


def test_wild_ratios_stay_finite() -> None:
    new = torch.tensor([-500.0, 0.0], requires_grad=True)
    values = KL_ESTIMATORS["k3"](new, torch.tensor([0.0, -500.0]))
    values.sum().backward()  # type: ignore[no-untyped-call]
    assert torch.isfinite(values).all() and new.grad is not None and torch.isfinite(new.grad).all()
