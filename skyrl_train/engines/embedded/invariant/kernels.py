"""The functions of native/invariant.c on tensors: float32, on the CPU, without gradients.

Shapes: T rows, K inputs, N outputs, H heads, D head size, V vocabulary.
"""

from __future__ import annotations

import ctypes
import functools

import torch

from skyrl_train.engines.embedded.native.build import NativeUnavailable, load_native
from skyrl_train.errors import ConfigError


@functools.cache
def invariant_kernels() -> InvariantKernels:
    """Raises ConfigError where the C kernels can't be built: torch's own operations are not invariant."""
    try:
        return InvariantKernels(load_native())
    except NativeUnavailable as exc:
        raise ConfigError(f"deterministic inference needs the C kernels, which can't be built here: {exc}") from exc


class InvariantKernels:
    """`native` is the library of native.build. Tensors must be contiguous unless strides are named."""

    def __init__(self, native: ctypes.CDLL) -> None:
        pointer, int64, int32, float32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float
        self._pack = native.invariant_pack
        self._pack.argtypes, self._pack.restype = (pointer, int64, int64, pointer, int32), None
        self._linear, self._rms_norm = native.invariant_linear, native.invariant_rms_norm
        self._activation, self._rotate = native.invariant_activation, native.invariant_rotate
        self._logprobs, self.attention = native.invariant_logprobs, native.invariant_attention
        self._linear.argtypes = (*(pointer,) * 5, int64, int64, int64, int32)
        self._rms_norm.argtypes = (*(pointer,) * 4, int64, int64, float32, float32, int32)
        self._activation.argtypes = (pointer, pointer, int64, int32, int32)
        self._rotate.argtypes = (pointer, int64, int64, pointer, *(int64,) * 3, pointer, pointer, float32, int32)
        self._logprobs.argtypes = (pointer, *(int64,) * 3, *(pointer,) * 4, int32)
        self.attention.argtypes = (pointer,)
        for function in (
            *(self._linear, self._rms_norm, self._activation, self._rotate, self._logprobs),
            self.attention,
        ):
            function.restype = None

    def pack(self, weight: torch.Tensor, packed: torch.Tensor) -> None:
        """weight [N, K] into packed [ceil(N / 32) * K * 32]."""
        num_outputs, depth = weight.shape
        self._pack(weight.data_ptr(), num_outputs, depth, packed.data_ptr(), torch.get_num_threads())

    def linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, packed: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x [..., K], weight [N, K], bias [N] -> [..., N]. `packed`: what `pack` made of the weight, for speed."""
        num_outputs, depth = weight.shape
        out = torch.empty((*x.shape[:-1], num_outputs), dtype=torch.float32)
        self._linear(
            x.data_ptr(),
            weight.data_ptr(),
            None if packed is None else packed.data_ptr(),
            None if bias is None else bias.data_ptr(),
            out.data_ptr(),
            x.numel() // depth,
            num_outputs,
            depth,
            torch.get_num_threads(),
        )
        return out

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x [..., D], weight [D] -> (weight + offset) * x / rms(x), and 1 / rms(x) [...]."""
        out, scales = torch.empty_like(x), torch.empty(x.shape[:-1], dtype=torch.float32)
        self._rms_norm(
            x.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            scales.data_ptr(),
            scales.numel(),
            x.shape[-1],
            eps,
            offset,
            torch.get_num_threads(),
        )
        return out, scales

    def activation(self, x: torch.Tensor, *, is_gelu: bool) -> torch.Tensor:
        """SiLU of each number, or GELU by its tanh."""
        out = torch.empty_like(x)
        self._activation(x.data_ptr(), out.data_ptr(), x.numel(), is_gelu, torch.get_num_threads())
        return out

    def rotate(self, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, sign: float) -> torch.Tensor:
        """x [1, H, T, D] with any strides but the last, cosine and sine [1, T, D]; sign -1 is the transposed map."""
        _, heads, rows, dim = x.shape
        out = torch.empty((1, rows, heads, dim), dtype=torch.float32)
        _, head_stride, row_stride, _ = x.stride()
        self._rotate(
            *(x.data_ptr(), row_stride, head_stride, out.data_ptr(), rows, heads, dim),
            *(cosine.data_ptr(), sine.data_ptr(), sign, torch.get_num_threads()),
        )
        return out.transpose(1, 2)

    def logprobs(
        self, logits: torch.Tensor, inverse_temperature: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """logits [T, V], whose rows may be apart, inverse_temperature float32 [T], targets int64 [T].

        -> log-probabilities [T] of softmax(logits * inverse_temperature), and the logarithms of its normalisers [T].
        """
        rows, vocab = logits.shape
        logprobs, normalisers = torch.empty(rows), torch.empty(rows)
        self._logprobs(
            *(logits.data_ptr(), logits.stride(0), rows, vocab, inverse_temperature.data_ptr(), targets.data_ptr()),
            *(logprobs.data_ptr(), normalisers.data_ptr(), torch.get_num_threads()),
        )
        return logprobs, normalisers


def inverse_of(temperature: float) -> float:
    """What the kernels multiply with; a greedy request, 0, is scored at temperature 1."""
    one = torch.ones((), dtype=torch.float32)
    return float(one / torch.tensor(temperature, dtype=torch.float32)) if temperature else 1.0
