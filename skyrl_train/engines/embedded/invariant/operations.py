"""The invariant kernels with gradients: forward is the kernel, backward the usual formula in torch.

The gradient is no more reproducible than torch's own; nothing compares it between batches.
"""

from __future__ import annotations

from typing import Any

import torch

from skyrl_train.engines.embedded.invariant.kernels import invariant_kernels


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, packed: torch.Tensor | None = None
) -> torch.Tensor:
    """x [..., K], weight [N, K], bias [N] -> [..., N]. `packed`: see kernels; it changes no bit."""
    if torch.is_grad_enabled():
        out: torch.Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return out
    return invariant_kernels().linear(x.contiguous(), weight, bias, packed)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
    """(weight + offset) * x / rms(x) over the last dimension."""
    if torch.is_grad_enabled():
        out: torch.Tensor = _RMSNorm.apply(x, weight, eps, offset)  # type: ignore[no-untyped-call]
        return out
    return invariant_kernels().rms_norm(x.contiguous(), weight, eps, offset)[0]


def silu(x: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(x)."""
    if torch.is_grad_enabled():
        out: torch.Tensor = _SiLU.apply(x)  # type: ignore[no-untyped-call]
        return out
    return invariant_kernels().activation(x.contiguous(), is_gelu=False)


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))."""
    if torch.is_grad_enabled():
        out: torch.Tensor = _GELU.apply(x)  # type: ignore[no-untyped-call]
        return out
    return invariant_kernels().activation(x.contiguous(), is_gelu=True)


def rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotary embedding in halves of x [1, H, T, D]; cosine and sine [1, T, D] are constants."""
    if torch.is_grad_enabled():
        out: torch.Tensor = _Rotate.apply(x, cosine, sine)  # type: ignore[no-untyped-call]
        return out
    return invariant_kernels().rotate(x, cosine, sine, 1.0)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return invariant_kernels().linear(x.contiguous(), weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            (grad @ weight) if needs_x else None,
            (rows.t() @ x.reshape(-1, x.shape[-1])) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
        )


class _RMSNorm(torch.autograd.Function):
    """With r = 1 / rms(x), g = weight + offset, n = x r: dx = r (g dy - n mean(g dy n)), dweight = sum(dy n)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
        out, scales = invariant_kernels().rms_norm(x.contiguous(), weight, eps, offset)
        ctx.save_for_backward(x, weight, scales)
        ctx.offset = offset
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        x, weight, scales = ctx.saved_tensors
        normal = x * scales[..., None]
        weighted = grad * (weight + ctx.offset)
        grad_x = scales[..., None] * (weighted - normal * (weighted * normal).mean(-1, keepdim=True))
        return grad_x, (grad * normal).flatten(0, -2).sum(0), None, None


class _SiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return invariant_kernels().activation(x.contiguous(), is_gelu=False)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        sigmoid = torch.sigmoid(x)
        gradient: torch.Tensor = grads[0] * sigmoid * (1 + x * (1 - sigmoid))
        return gradient


class _GELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return invariant_kernels().activation(x.contiguous(), is_gelu=True)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        gradient: torch.Tensor = torch.ops.aten.gelu_backward(grads[0], x, approximate="tanh")
        return gradient


class _Rotate(torch.autograd.Function):
    """A linear map of x; its gradient is the transposed map."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cosine, sine)
        return invariant_kernels().rotate(x, cosine, sine, 1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        cosine, sine = ctx.saved_tensors
        grad = grad if grad.stride(3) == 1 else grad.contiguous()
        return invariant_kernels().rotate(grad, cosine, sine, -1.0), None, None
