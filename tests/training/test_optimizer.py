"""Master weights, clipping and schedules, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from skyrl_train.training.optimizer import MasterAdamW, OptimizerSettings


def parameter(values: list[list[float]] | list[float], dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor(values, dtype=dtype))


def step_with(optimizer: MasterAdamW, p: torch.nn.Parameter, gradient: float) -> float:
    (p.float() * gradient).sum().backward()  # type: ignore[no-untyped-call]
    return optimizer.step().grad_norm


def test_two_steps_equal_adamw_by_hand() -> None:
    p = parameter([[1.0]])
    optimizer = MasterAdamW(
        [p], OptimizerSettings(lr=0.1, weight_decay=0.5, max_grad_norm=None, adam_betas=(0.5, 0.75))
    )
    w, m, v = 1.0, 0.0, 0.0
    for t, g in enumerate([2.0, -1.0], start=1):
        step_with(optimizer, p, g)
        m, v = 0.5 * m + 0.5 * g, 0.75 * v + 0.25 * g * g
        w -= 0.1 * 0.5 * w
        w -= 0.1 * (m / (1 - 0.5**t)) / (math.sqrt(v / (1 - 0.75**t)) + 1e-8)
        assert p.item() == pytest.approx(w, rel=1e-6)


def test_vectors_are_not_decayed() -> None:
    matrix, vector = parameter([[1.0]]), parameter([1.0])
    optimizer = MasterAdamW([matrix, vector], OptimizerSettings(lr=0.1, weight_decay=0.5))
    (0 * matrix.sum() + 0 * vector.sum()).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    assert matrix.item() == pytest.approx(0.95) and vector.item() == 1.0


def test_clipping_scales_all_gradients_by_their_global_norm() -> None:
    a, b = parameter([[3.0]]), parameter([4.0])
    # With epsilon 1 the step depends on the gradient's size: m_hat / (sqrt(v_hat) + 1) = g / (|g| + 1).
    optimizer = MasterAdamW([a, b], OptimizerSettings(lr=1.0, max_grad_norm=1.0, adam_epsilon=1.0))
    (3 * a.sum() + 4 * b.sum()).backward()  # type: ignore[no-untyped-call]
    assert optimizer.step().grad_norm == pytest.approx(5.0)
    assert a.item() == pytest.approx(3 - 0.6 / 1.6, rel=1e-4)
    assert b.item() == pytest.approx(4 - 0.8 / 1.8, rel=1e-4)


def test_steps_smaller_than_bfloat16_can_write_add_up() -> None:
    """Next to 1, bfloat16 has steps of 2^-8 = 0.0039 down; 100 steps of 1e-4 must arrive as 0.01."""
    p = parameter([[1.0]], torch.bfloat16)
    place = p.data_ptr()
    optimizer = MasterAdamW([p], OptimizerSettings(lr=1e-4, max_grad_norm=None))
    step_with(optimizer, p, 1.0)
    assert p.item() == 1.0
    for _ in range(99):
        step_with(optimizer, p, 1.0)
    assert p.item() == pytest.approx(0.99, abs=0.002)
    assert p.data_ptr() == place and p.dtype == torch.bfloat16


def test_a_state_keeps_what_bfloat16_cannot_show() -> None:
    settings = OptimizerSettings(lr=1e-4, max_grad_norm=None)
    p, q = parameter([[1.0]], torch.bfloat16), parameter([[1.0]], torch.bfloat16)
    first, second = MasterAdamW([p], settings), MasterAdamW([q], settings)
    for _ in range(30):
        step_with(first, p, 1.0)
    with torch.no_grad():
        q.copy_(p)
    saved = {name: tensor.clone() for name, tensor in first.tensors(["p"]).items()}
    assert saved.keys() == {"p.master", "p.exp_avg", "p.exp_avg_sq", "p.step"}
    loaded = second.empty_tensors(["p"], saved.keys())
    assert {name: t.shape for name, t in loaded.items()} == {name: t.shape for name, t in saved.items()}
    second.load_tensors(["p"], saved, first.num_steps_done)
    for _ in range(30):
        step_with(first, p, 1.0)
        step_with(second, q, 1.0)
        assert torch.equal(p, q)
    assert first.num_steps_done == second.num_steps_done == 60


@pytest.mark.parametrize("gradient", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_leaves_the_weights_alone(gradient: float) -> None:
    p = parameter([[1.0]])
    optimizer = MasterAdamW([p], OptimizerSettings(lr=0.1))
    with pytest.raises(FloatingPointError, match=r"gradient norm is (nan|inf) at optimizer step 0"):
        step_with(optimizer, p, gradient)
    assert p.item() == 1.0 and optimizer.num_steps_done == 0


def test_frozen_parameters_are_left_out() -> None:
    p, frozen = parameter([[1.0]]), parameter([[1.0]])
    frozen.requires_grad_(False)
    optimizer = MasterAdamW([p, frozen], OptimizerSettings(lr=0.1, weight_decay=0.5))
    step_with(optimizer, p, 1.0)
    assert frozen.item() == 1.0
    with pytest.raises(ValueError, match="no parameter to train"):
        MasterAdamW([frozen], OptimizerSettings(lr=0.1))


def test_schedules_by_hand() -> None:
    def lrs(**options: object) -> list[float]:
        settings = OptimizerSettings(lr=8.0, num_warmup_steps=2, **options)  # type: ignore[arg-type]
        return [settings.lr_at(step) for step in range(8)]

    half = 8 * 0.5 * (1 + math.cos(math.pi / 4))
    assert lrs() == [4, 8, 8, 8, 8, 8, 8, 8]
    assert lrs(scheduler="linear", num_steps=6) == pytest.approx([4, 8, 8, 6, 4, 2, 0, 0])
    assert lrs(scheduler="cosine", num_steps=6) == pytest.approx([4, 8, 8, half, 4, 8 - half, 0, 0])
    with pytest.raises(ValueError, match="'linear' needs num_steps > num_warmup_steps 2, found None"):
        OptimizerSettings(lr=1.0, scheduler="linear", num_warmup_steps=2)


def test_the_schedule_reaches_the_weights() -> None:
    p = parameter([[1.0]])
    optimizer = MasterAdamW([p], OptimizerSettings(lr=0.1, num_warmup_steps=2))
    (p.sum()).backward()  # type: ignore[no-untyped-call]
    assert optimizer.step().lr == pytest.approx(0.05)
    assert p.item() == pytest.approx(0.95, rel=1e-5)
