"""Log-probability and entropy from a chunk of logits on a GPU: one pass forward, one pass backward.

    forward    logits [n, V] -> logsumexp, logprob of the target, entropy       reads each logit once
    backward   logits [n, V] -> gradient [n, V], written over the logits        reads and writes each once

The logits are a matrix product's output in the model's own type; all arithmetic on them is float32 in registers.
Formulas: see `logprobs.ChunkedLogprobs`, whose tensor operations are the reference of these kernels.

Shapes: n rows, V words.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 4096


@triton.jit  # type: ignore[untyped-decorator]
def _forward(  # type: ignore[no-untyped-def]
    logits, targets, logprobs, entropy, lse, row_stride, num_words, scale, BLOCK: tl.constexpr
):
    """One program a row. With m the running maximum: s = sum exp(z - m), u = sum exp(z - m) (z - m)."""
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * row_stride
    m = -float("inf")
    s = 0.0
    u = 0.0
    for begin in range(0, num_words, BLOCK):
        word = begin + tl.arange(0, BLOCK)
        z = tl.load(base + word, mask=word < num_words, other=-float("inf")).to(tl.float32) * scale
        new_m = tl.maximum(m, tl.max(z, 0))
        shift = tl.where(new_m == -float("inf"), 0.0, new_m)
        decay = tl.where(m == -float("inf"), 0.0, tl.exp(m - shift))
        weight = tl.exp(z - shift)
        # A word of probability 0 adds nothing to the entropy; 0 * -inf would add NaN.
        moment = tl.where(weight > 0, weight * (z - shift), 0.0)
        u = decay * (u + tl.where(s > 0, s * (m - shift), 0.0)) + tl.sum(moment, 0)
        s = decay * s + tl.sum(weight, 0)
        m = new_m
    total = tl.log(s)
    target = tl.load(targets + row)
    z_target = tl.load(base + target).to(tl.float32) * scale
    tl.store(logprobs + row, z_target - m - total)
    tl.store(entropy + row, total - u / s)
    tl.store(lse + row, m + total)


@triton.jit  # type: ignore[untyped-decorator]
def _backward(  # type: ignore[no-untyped-def]
    logits,
    targets,
    grad_logprobs,
    grad_entropy,
    entropy,
    lse,
    row_stride,
    num_words,
    scale,
    HAS_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a (row, block of words); the logits become their own gradient."""
    row = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    present = word < num_words
    at = logits + row * row_stride + word
    logp = tl.load(at, mask=present, other=-float("inf")).to(tl.float32) * scale - tl.load(lse + row)
    p = tl.exp(logp)
    g = tl.load(grad_logprobs + row)
    grad = tl.where(word == tl.load(targets + row), g, 0.0) - p * g
    if HAS_ENTROPY:
        pull = tl.where(p > 0, p * (logp + tl.load(entropy + row)), 0.0)
        grad -= pull * tl.load(grad_entropy + row)
    tl.store(at, (grad * scale).to(logits.dtype.element_ty), mask=present)


def logprobs_of(
    logits: torch.Tensor, target_ids: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logprobs, entropy, logsumexp) [n] float32 of softmax(logits * scale); logits [n, V], target_ids [n]."""
    n, num_words = logits.shape
    logprobs, entropy, lse = (torch.empty(n, dtype=torch.float32, device=logits.device) for _ in range(3))
    if n:
        _forward[(n,)](
            logits,
            target_ids,
            logprobs,
            entropy,
            lse,
            logits.stride(0),
            num_words,
            scale,
            BLOCK=BLOCK,
            num_warps=8,
        )
    return logprobs, entropy, lse


def gradient_in_place(
    logits: torch.Tensor,
    target_ids: torch.Tensor,
    grad_logprobs: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    entropy: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """The gradient for `logits`, written over them; the other tensors are [n], as `logprobs_of` gave them."""
    n, num_words = logits.shape
    if n:
        _backward[(n, triton.cdiv(num_words, BLOCK))](
            logits,
            target_ids,
            grad_logprobs,
            grad_logprobs if grad_entropy is None else grad_entropy,
            entropy,
            lse,
            logits.stride(0),
            num_words,
            scale,
            HAS_ENTROPY=grad_entropy is not None,
            BLOCK=BLOCK,
            num_warps=8,
        )
    return logits
