"""Chunked log-probabilities against log_softmax over the whole matrix of logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from skyrl_train.training.logprobs import LogitTransform, token_logprobs

NUM_ROWS, HIDDEN, VOCAB = 23, 8, 31


def inputs(dtype: torch.dtype = torch.float64, num_rows: int = NUM_ROWS) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_rows, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    bias = torch.randn(VOCAB, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(0, VOCAB, (num_rows,), generator=generator)
    return hidden, weight, bias, targets


def whole(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    temperature: float,
    transform: LogitTransform,
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = F.linear(hidden, weight, bias) * transform.scale
    if transform.softcap is not None:
        logits = torch.tanh(logits / transform.softcap) * transform.softcap
    logp = F.log_softmax(logits / temperature, dim=-1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(scale=0.3), LogitTransform(scale=2, softcap=3)])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("rows_at_a_time", [1, 5, 100])
def test_chunks_equal_log_softmax_in_value_and_gradient(
    transform: LogitTransform, with_bias: bool, rows_at_a_time: int
) -> None:
    hidden, weight, bias, targets = inputs()
    leaves = [x.requires_grad_() for x in ((hidden, weight, bias) if with_bias else (hidden, weight))]
    used_bias = bias if with_bias else None
    generator = torch.Generator().manual_seed(1)
    up_logprobs, up_entropy = torch.randn(2, NUM_ROWS, generator=generator, dtype=torch.float64)

    logprobs, entropy = whole(hidden, weight, used_bias, targets, 0.7, transform)
    wanted = [logprobs, entropy, *torch.autograd.grad(logprobs @ up_logprobs + entropy @ up_entropy, leaves)]
    result = token_logprobs(
        hidden,
        weight,
        targets,
        bias=used_bias,
        temperature=0.7,
        transform=transform,
        max_chunk_bytes=rows_at_a_time * VOCAB * 4,
    )
    total = result.logprobs @ up_logprobs + result.entropy @ up_entropy
    found = [result.logprobs, result.entropy, *torch.autograd.grad(total, leaves)]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_one_result_alone_has_its_own_gradient() -> None:
    for name in ("logprobs", "entropy"):
        hidden, weight, _, targets = inputs()
        hidden.requires_grad_()
        logprobs, entropy = whole(hidden, weight, None, targets, 1.0, LogitTransform())
        (wanted,) = torch.autograd.grad((logprobs if name == "logprobs" else entropy).sum(), hidden)
        (found,) = torch.autograd.grad(getattr(token_logprobs(hidden, weight, targets), name).sum(), hidden)
        torch.testing.assert_close(found, wanted)


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, weight, _, targets = inputs()
    hidden.requires_grad_()
    token_logprobs(hidden, weight, targets).logprobs.sum().backward()
    assert hidden.grad is not None and weight.grad is None


def test_no_targets_give_no_logprobs_and_a_zero_gradient() -> None:
    hidden, weight, _, targets = inputs(num_rows=0)
    weight.requires_grad_()
    result = token_logprobs(hidden, weight, targets)
    result.logprobs.sum().backward()
    assert result.logprobs.shape == (0,)
    assert weight.grad is not None and not weight.grad.any()


class LargestTensor(TorchDispatchMode):
    """Remembers the largest number of elements that any operation returned."""

    num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.num_elements = max(self.num_elements, tensor.numel())
        return out


def test_the_whole_matrix_of_logits_never_exists() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1000, 4, generator=generator, requires_grad=True)
    weight = torch.randn(500, 4, generator=generator, requires_grad=True)
    targets = torch.randint(0, 500, (1000,), generator=generator)
    with LargestTensor() as largest:
        result = token_logprobs(hidden, weight, targets, max_chunk_bytes=10 * 500 * 4)
        (result.logprobs.sum() + result.entropy.sum()).backward()
    assert largest.num_elements == 10 * 500


def test_bfloat16_heads_give_float32_logprobs() -> None:
    hidden, weight, _, targets = inputs(torch.bfloat16)
    hidden.requires_grad_(), weight.requires_grad_()
    result = token_logprobs(hidden, weight, targets)
    assert result.logprobs.dtype == torch.float32
    logits = (hidden @ weight.T).float()  # rounded to bfloat16 once, by the product
    wanted = F.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(result.logprobs, wanted)
    result.logprobs.sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.bfloat16


def test_greedy_sampling_has_no_density() -> None:
    hidden, weight, _, targets = inputs()
    with pytest.raises(ValueError, match="temperature > 0, found 0"):
        token_logprobs(hidden, weight, targets, temperature=0)
