"""Log-probabilities of given tokens, and the entropy around them, straight from hidden states.

The logits of a long batch are the largest tensor of training: 32k rows of a 152k vocabulary are 20 GB in float32.
Here they exist a chunk of rows at a time, in the forward pass and again in the backward pass.

Shapes: N predictions, H hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

MAX_CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
"""Float32 logits held at a time: a GPU needs about a thousand rows of a large vocabulary to be busy."""


@dataclass(frozen=True, kw_only=True)
class LogitTransform:
    """What a model does to its head's output: `logits = softcap * tanh(scale * raw / softcap)`; None is no cap."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, raw: torch.Tensor) -> torch.Tensor:
        logits = raw * self.scale if self.scale != 1.0 else raw
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def backward(self, grad: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Gradient for `raw` from that for `logits`, the transform's output."""
        if self.softcap is not None:
            grad = grad * (1 - (logits / self.softcap).square())
        return grad * self.scale if self.scale != 1.0 else grad


@dataclass(frozen=True, kw_only=True)
class TokenLogprobs:
    """`logprobs` [N] and `entropy` [N], float32 (float64 for a float64 model), both differentiable."""

    logprobs: torch.Tensor
    entropy: torch.Tensor


def token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target_ids: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    transform: LogitTransform | None = None,
    max_chunk_bytes: int | None = None,
) -> TokenLogprobs:
    """Of softmax(transform(hidden @ weight.T + bias) / temperature) at `target_ids` [N].

    hidden [N, H], weight [V, H], bias [V]. The temperature is that of sampling, the same for the policy, the old
    policy and the reference: their ratios are between distributions that were sampled from.
    Raises ValueError for temperature <= 0: greedy sampling has no density.
    """
    if temperature <= 0:
        raise ValueError(f"log-probabilities need a temperature > 0, found {temperature}")
    if max_chunk_bytes is None:
        max_chunk_bytes = MAX_CHUNK_BYTES.get(hidden.device.type, 64 << 20)
    num_rows = max(1, max_chunk_bytes // (4 * weight.shape[0]))
    logprobs, entropy = ChunkedLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, target_ids, temperature, transform or LogitTransform(), num_rows
    )
    return TokenLogprobs(logprobs=logprobs, entropy=entropy)


class ChunkedLogprobs(torch.autograd.Function):
    """Keeps [N] results only and makes each chunk's logits again for the gradient.

    With z the logits over temperature, p = softmax(z), H the entropy:
        d logprob[t] / d z = onehot(t) - p            d H / d z = -p (z - logsumexp(z) + H)
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        target_ids: torch.Tensor,
        temperature: float,
        transform: LogitTransform,
        num_rows: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        ctx.kernels = kernels = _kernels(hidden, transform, dtype)
        scale = transform.scale / temperature
        logprobs = torch.empty(len(target_ids), dtype=dtype, device=hidden.device)
        entropy = torch.empty_like(logprobs)
        lse = torch.empty_like(logprobs)
        for start in range(0, len(target_ids), num_rows):
            rows = slice(start, start + num_rows)
            if kernels is not None:
                logits = F.linear(hidden[rows], weight, bias)
                logprobs[rows], entropy[rows], lse[rows] = kernels.logprobs_of(logits, target_ids[rows], scale)
                continue
            z = transform(_raw_logits(hidden[rows], weight, bias, dtype)).div_(temperature)
            lse[rows] = torch.logsumexp(z, dim=-1)
            logp = z.sub_(lse[rows, None])
            logprobs[rows] = logp.gather(1, target_ids[rows, None])[:, 0]
            entropy[rows] = -torch.exp(logp).mul_(logp).sum(-1)
        ctx.save_for_backward(hidden, weight, bias, target_ids, lse, entropy)
        ctx.temperature, ctx.transform, ctx.num_rows = temperature, transform, num_rows
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[torch.Tensor | None, ...]:
        grad_logprobs, grad_entropy = grads
        if grad_logprobs is None and grad_entropy is None:
            return (None,) * 7
        hidden, weight, bias, target_ids, lse, entropy = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        # Summed over chunks in float32: bfloat16 would lose the small terms.
        grad_weight = torch.zeros_like(weight, dtype=lse.dtype) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=lse.dtype) if bias is not None and needs_bias else None
        for start in range(0, len(target_ids), ctx.num_rows):
            rows = slice(start, start + ctx.num_rows)
            if ctx.kernels is not None:
                grad_out = grad_raw = ctx.kernels.gradient_in_place(
                    F.linear(hidden[rows], weight, bias),
                    target_ids[rows],
                    torch.zeros_like(lse[rows]) if grad_logprobs is None else grad_logprobs[rows].contiguous(),
                    None if grad_entropy is None else grad_entropy[rows].contiguous(),
                    entropy[rows],
                    lse[rows],
                    ctx.transform.scale / ctx.temperature,
                )
            else:
                grad_raw = _reference_gradient(ctx, rows, grad_logprobs, grad_entropy)
                grad_out = grad_raw.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad_out @ weight
            if grad_weight is not None:
                grad_weight += grad_out.T @ hidden[rows]
            if grad_bias is not None:
                grad_bias += grad_raw.sum(0)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
            None,
        )


def _kernels(hidden: torch.Tensor, transform: LogitTransform, dtype: torch.dtype) -> Any:
    """The fused kernels' module where they apply: a GPU, no cap on the logits, float32 arithmetic."""
    if hidden.device.type != "cuda" or transform.softcap is not None or dtype != torch.float32:
        return None
    # Triton is needed from here on, and only here.
    from skyrl_train.training import triton_logprobs

    return triton_logprobs


def _reference_gradient(
    ctx: Any, rows: slice, grad_logprobs: torch.Tensor | None, grad_entropy: torch.Tensor | None
) -> torch.Tensor:
    """The gradient for a chunk of the head's output, in the arithmetic's type."""
    hidden, weight, bias, target_ids, lse, entropy = ctx.saved_tensors
    logits: torch.Tensor = ctx.transform(_raw_logits(hidden[rows], weight, bias, lse.dtype))
    logp = (logits / ctx.temperature).sub_(lse[rows, None])
    grad_z = torch.exp(logp)
    if grad_entropy is None:
        assert grad_logprobs is not None
        grad_z.mul_(-grad_logprobs[rows, None])
    else:
        by_entropy = logp.add_(entropy[rows, None]).mul_(grad_entropy[rows, None])
        if grad_logprobs is not None:
            by_entropy.add_(grad_logprobs[rows, None])
        grad_z.mul_(by_entropy).neg_()
    if grad_logprobs is not None:
        grad_z.scatter_add_(1, target_ids[rows, None], grad_logprobs[rows, None])
    gradient: torch.Tensor = ctx.transform.backward(grad_z.div_(ctx.temperature), logits)
    return gradient


def _raw_logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """A tensor of its own, free to be changed in place."""
    return F.linear(hidden, weight, bias).to(dtype)
