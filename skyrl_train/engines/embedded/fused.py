"""Parts of a layer in one pass each, for inference on the CPU: RMSNorm, rotary embedding, gated MLP.

Each stands in for a part of transformers' module that it was seen to equal: it is recognised by what it computes on
random float32 numbers (see `as_rms_norm`, `as_gated_mlp`, `as_rotary`), not by its name, and reads the same parameters.
What isn't recognised stays as it is. Inputs that the kernels can't take go to the original.

Shapes: T rows, H heads, D head size.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from skyrl_train.engines.embedded.adapters.rows import RowAdapters
from skyrl_train.engines.embedded.packed_linear import PackedMatrix

LANES = 16
DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = 2e-6

Rotary = Callable[..., tuple[torch.Tensor, torch.Tensor]]


class _Rotated(ctypes.Structure):
    """`Rotated` of elementwise.c."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("row_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
        ("out", ctypes.c_void_p),
        ("heads", ctypes.c_int64),
    )


class Kernels:
    """The functions of native/elementwise.c on tensors, on the CPU; all float32, or all bfloat16."""

    def __init__(self, native: ctypes.CDLL) -> None:
        pointer, int64, int32, float32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float
        self._rms_norm, self._rotate, self._silu_times = native.rms_norm, native.rotate, native.silu_times
        self._rms_norm.argtypes = (pointer, pointer, pointer, int64, int64, float32, float32, int32, int32)
        self._rotate.argtypes = (pointer, int64, int64, int64, pointer, pointer, int32, int32)
        self._rotated = (_Rotated * 2)()
        self._silu_times.argtypes = (pointer, pointer, int64, int32, int32)
        for function in (self._rms_norm, self._rotate, self._silu_times):
            function.restype = None

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
        """x [..., dim], contiguous -> the same shape."""
        out = torch.empty_like(x)
        dim = x.shape[-1]
        rows, threads = x.numel() // dim, torch.get_num_threads()
        half = x.dtype == torch.bfloat16
        self._rms_norm(x.data_ptr(), weight.data_ptr(), out.data_ptr(), rows, dim, eps, offset, half, threads)
        return out

    def rotate(
        self, q: torch.Tensor, k: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q and k [1, H, T, D] with any strides but the last, cosine and sine [1, T, D] -> rotated q and k."""
        _, _, rows, dim = q.shape
        outs = []
        for part, x in zip(self._rotated, (q, k), strict=True):
            out = torch.empty((1, rows, x.shape[1], dim), dtype=x.dtype)
            _, part.head_stride, part.row_stride, _ = x.stride()
            part.x, part.out, part.heads = x.data_ptr(), out.data_ptr(), x.shape[1]
            outs.append(out.transpose(1, 2))
        threads = torch.get_num_threads()
        half = q.dtype == torch.bfloat16
        self._rotate(self._rotated, 2, rows, dim, cosine.data_ptr(), sine.data_ptr(), half, threads)
        return outs[0], outs[1]

    def silu_times(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up, written over `gate`; both contiguous."""
        half = gate.dtype == torch.bfloat16
        self._silu_times(gate.data_ptr(), up.data_ptr(), gate.numel(), half, torch.get_num_threads())
        return gate


def is_plain(x: torch.Tensor) -> bool:
    return x.dtype in DTYPES and x.is_contiguous()


class FusedRMSNorm(nn.Module):
    """(weight + offset) * x / rms(x)."""

    def __init__(self, original: nn.Module, kernels: Kernels, eps: float, offset: float) -> None:
        super().__init__()
        self._parameters = original._parameters  # the dictionary itself: what the trainer puts there is seen here
        self._modules["original"] = original
        self._kernels, self._eps, self._offset = kernels, eps, offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self._parameters["weight"]
        assert weight is not None
        if is_plain(x) and x.dtype == weight.dtype:
            return self._kernels.rms_norm(x, weight, self._eps, self._offset)
        out: torch.Tensor = self._modules["original"](x)  # type: ignore[misc]
        return out

    __call__ = forward  # nobody can hook what only we know


class FusedGatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, original: nn.Module, kernels: Kernels) -> None:
        super().__init__()
        self._modules = original._modules
        self._kernels = kernels
        self.pair: PackedMatrix | None = None
        """silu(gate(x)) * up(x) in one product, where the two are plain linear maps."""
        self.row_adapters: RowAdapters | None = None
        """Where adapters may add to gate and up: in steps in which some do, those are computed one by one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts: dict[str, Any] = self._modules
        adds = self.row_adapters is not None and self.row_adapters.form is not None
        if self.pair is not None and not (adds or _is_hooked(parts["gate_proj"]) or _is_hooked(parts["up_proj"])):
            product = self.pair(x)
            if product is not None:
                narrowed: torch.Tensor = parts["down_proj"](product)
                return narrowed
        gate, up = parts["gate_proj"](x), parts["up_proj"](x)
        if is_plain(gate) and is_plain(up) and gate.dtype == up.dtype and gate.numel() % LANES == 0:
            gated = self._kernels.silu_times(gate, up)
        else:
            gated = parts["act_fn"](gate) * up
        out: torch.Tensor = parts["down_proj"](gated)
        return out

    __call__ = forward


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


@torch.no_grad()
def as_rms_norm(module: nn.Module, kernels: Kernels) -> FusedRMSNorm | None:
    """The fused form of a module that is an RMSNorm, None if it isn't one."""
    weight = module._parameters.get("weight")
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, torch.Tensor) or list(module._parameters) != ["weight"] or module._modules:
        return None
    if weight.dim() != 1 or len(weight) % LANES or weight.dtype not in DTYPES or not isinstance(eps, float):
        return None
    generator = torch.Generator().manual_seed(0)
    # Weights of its own, as fresh ones say little; rows down to where eps matters.
    trial_weight = torch.randn(weight.shape, generator=generator)
    trial = _copy_with(module, _parameters={"weight": trial_weight})
    x = torch.randn((4, len(weight)), generator=generator) * torch.tensor([[10.0], [1.0], [0.01], [eps**0.5]])
    expected = trial(x)
    for offset in (0.0, 1.0):
        if expected.shape == x.shape and _agree(kernels.rms_norm(x, trial_weight, eps, offset), expected):
            return FusedRMSNorm(module, kernels, eps, offset)
    return None


@torch.no_grad()
def as_gated_mlp(module: nn.Module, kernels: Kernels) -> FusedGatedMLP | None:
    """The fused form of a SiLU-gated MLP of three linear maps, None if the module is something else."""
    parts = module._modules
    if set(parts) != {"gate_proj", "up_proj", "down_proj", "act_fn"} or module._parameters:
        return None
    # Small maps with random weights in place of its own: a fresh model's may be zero and would prove nothing.
    maps = {"gate_proj": nn.Linear(24, 2 * LANES), "up_proj": nn.Linear(24, 2 * LANES), "down_proj": nn.Linear(32, 24)}
    generator = torch.Generator().manual_seed(0)
    for parameter in (parameter for part in maps.values() for parameter in part.parameters()):
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    trial = _copy_with(module, _modules={**maps, "act_fn": parts["act_fn"]})
    x = torch.randn((4, 24), generator=generator)
    try:
        expected = trial(x)
    except (RuntimeError, TypeError, ValueError):  # it wants something that our maps lack: not the MLP that we know
        return None
    return FusedGatedMLP(module, kernels) if _agree(FusedGatedMLP(trial, kernels)(x), expected) else None


@torch.no_grad()
def as_rotary(original: Rotary, kernels: Kernels) -> Rotary | None:
    """The fused form of an `apply_rotary_pos_emb(q, k, cos, sin)` that rotates halves, None if it does otherwise."""

    def rotary(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        dim = q.shape[-1]
        fits = cos.shape == sin.shape == (1, q.shape[2], dim) and k.shape[-1] == dim and q.shape[0] == 1
        plain = is_plain(cos) and is_plain(sin) and q.dtype == k.dtype == cos.dtype == sin.dtype
        if args or kwargs or not fits or not plain or dim % (2 * LANES) or q.stride(3) != 1 or k.stride(3) != 1:
            return original(q, k, cos, sin, *args, **kwargs)
        return kernels.rotate(q, k, cos, sin)

    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn((1, 3, heads, 4 * LANES), generator=generator).transpose(1, 2) for heads in (4, 2))
    cos, sin = (torch.randn((1, 3, 4 * LANES), generator=generator) for _ in range(2))
    try:
        expected = original(q, k, cos, sin)
    except TypeError:  # another signature: not the function that we know
        return None
    agrees = all(_agree(mine, theirs) for mine, theirs in zip(rotary(q, k, cos, sin), expected, strict=True))
    return rotary if agrees else None


def _agree(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE * float(b.abs().max()))


def _copy_with(module: nn.Module, **attributes: Any) -> nn.Module:
    """The module with other attributes; the original is not touched."""
    copy = object.__new__(type(module))
    children = attributes.get("_modules", {})
    copy.__dict__ = {name: value for name, value in module.__dict__.items() if name not in children} | attributes
    return copy
