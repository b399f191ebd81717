"""Linear maps on packed copies of their weights, on the CPU: native/packed_linear.c.

    weight [N, K], the trainer's          packed [N / 32, K, 32], ours
    32 rows far apart, each in order      what a tile of the product reads next stands next

A library packs a matrix for each product, or goes without; a decode step multiplies a few rows with every matrix of the
model, so here each is packed once per version of the weights. That is a second copy of them: memory for speed.

A copy is stale after `mark_stale`, which the engine calls for each weight update, and where the parameter was replaced
or changed in place since (its version counter says so; writes through `.data` do not count there, hence the first way).
It is packed again when it is used next.

Shapes: T rows, K inputs, N outputs.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping

import torch
from torch import nn

PANEL = 32
DTYPES = (torch.float32, torch.bfloat16)


class _Product(ctypes.Structure):
    """`Product` of packed_linear.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "packed", "bias", "out")),
        *((name, ctypes.c_int64) for name in ("x_row", "num_rows", "n", "k")),
        *((name, ctypes.c_int32) for name in ("is_bfloat16", "is_gated", "num_threads", "reserved")),
    )


class Packing:
    """The packed copies of one model."""

    def __init__(self, native: ctypes.CDLL) -> None:
        pointer, int64, int32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
        self.product = native.packed_product
        self.product.argtypes, self.product.restype = (pointer,), None
        self._pack = {torch.float32: native.pack_float32, torch.bfloat16: native.pack_bfloat16}
        for function in self._pack.values():
            function.argtypes, function.restype = (pointer, pointer, int64, int64, int64, pointer, int32), None
        self._matrices: dict[tuple[int, int], PackedMatrix] = {}
        self.generation = 0
        """Another one after each `mark_stale` and `release`."""

    def matrix(self, linear: nn.Module, up: nn.Module | None = None) -> PackedMatrix:
        """For x @ weight^T + bias; with `up`, for silu(x @ weight^T) * (x @ up^T), both without bias. One for each."""
        pair = (linear._parameters, None if up is None else up._parameters)
        key = (id(pair[0]), id(pair[1]))
        if key not in self._matrices:
            self._matrices[key] = PackedMatrix(self, *pair)
        return self._matrices[key]

    def mark_stale(self) -> None:
        """The weights changed."""
        self.generation += 1
        for matrix in self._matrices.values():
            matrix.mark_stale()

    def release(self) -> None:
        """Give the copies' memory back; they come again with the next use."""
        self.generation += 1
        for matrix in self._matrices.values():
            matrix.release()

    @property
    def num_bytes(self) -> int:
        """Of the copies that there are now."""
        return sum(matrix.num_bytes for matrix in self._matrices.values())

    def pack(self, weight: torch.Tensor, up: torch.Tensor | None, packed: torch.Tensor) -> None:
        n, k = weight.shape
        self._pack[weight.dtype](
            weight.data_ptr(),
            None if up is None else up.data_ptr(),
            n,
            k,
            weight.stride(0),
            packed.data_ptr(),
            torch.get_num_threads(),
        )


class PackedMatrix:
    """One matrix, or the pair of a gated MLP. Reads parameters through their modules' own dictionaries."""

    def __init__(
        self,
        packing: Packing,
        parameters: Mapping[str, torch.Tensor | None],
        up: Mapping[str, torch.Tensor | None] | None,
    ) -> None:
        self._packing = packing
        self._parameters = parameters
        self._up = up
        self._packed: torch.Tensor | None = None
        self._stamp: tuple[object, ...] = ()
        self._product = _Product(is_gated=up is not None)
        self._address = ctypes.addressof(self._product)

    @property
    def num_bytes(self) -> int:
        return 0 if self._packed is None else self._packed.nbytes

    def mark_stale(self) -> None:
        self._stamp = ()

    def release(self) -> None:
        self._stamp, self._packed = (), None

    @property
    def address(self) -> int:
        """Of the C structure; see `is_ready`."""
        return self._address

    @property
    def packed(self) -> torch.Tensor | None:
        """The copy itself; see `is_ready`."""
        return self._packed

    @property
    def num_outputs(self) -> int:
        """N."""
        return int(self._product.n)

    def is_ready(self, dtype: torch.dtype) -> bool:
        """Bring the C structure up to date; False where the kernel can't take the weights, or inputs of this type."""
        weight = self._parameters["weight"]
        assert weight is not None
        up = None if self._up is None else self._up["weight"]
        if dtype != weight.dtype:
            return False
        stamp = _stamp(weight, up)
        if stamp != self._stamp:
            if not _fits(weight, up):
                return False
            self._renew(weight, up)
            self._stamp = stamp
        bias = None if up is not None else self._parameters["bias"]
        self._product.bias = None if bias is None else bias.data_ptr()
        return True

    def __call__(self, x: torch.Tensor) -> torch.Tensor | None:
        """x [..., K] -> [..., N]; None where the kernel can't take these."""
        if not x.is_contiguous() or not self.is_ready(x.dtype):
            return None
        product = self._product
        out = torch.empty((*x.shape[:-1], product.n), dtype=x.dtype)
        product.x, product.out = x.data_ptr(), out.data_ptr()
        product.num_rows = x.numel() // product.k
        product.num_threads = torch.get_num_threads()
        self._packing.product(self._address)
        return out

    def _renew(self, weight: torch.Tensor, up: torch.Tensor | None) -> None:
        n, k = weight.shape
        panels = math.ceil(n * (1 if up is None else 2) / PANEL)
        size = panels * PANEL * (k if weight.dtype == torch.float32 else 2 * math.ceil(k / 2))
        if self._packed is None or self._packed.numel() != size or self._packed.dtype != weight.dtype:
            self._packed = torch.empty(size, dtype=weight.dtype)
        self._packing.pack(weight, up, self._packed)
        product = self._product
        product.packed, product.n, product.k, product.x_row = self._packed.data_ptr(), n, k, k
        product.is_bfloat16 = weight.dtype == torch.bfloat16


def can_pack(linear: nn.Module) -> bool:
    """Whether this is a linear map that the kernels know: torch's own class, on the CPU."""
    weight = linear._parameters.get("weight")
    if type(linear) is not nn.Linear or weight is None:
        return False
    bias = linear._parameters["bias"]
    return _fits(weight, None) and (bias is None or (bias.dtype == weight.dtype and bias.is_contiguous()))


def can_pack_pair(gate: nn.Module, up: nn.Module) -> bool:
    """Whether these two are the halves of one gated product."""
    if not (can_pack(gate) and can_pack(up)):
        return False
    a, b = gate._parameters, up._parameters
    assert a["weight"] is not None and b["weight"] is not None
    return a["bias"] is None and b["bias"] is None and _fits(a["weight"], b["weight"])


def packed_bytes(model: nn.Module) -> int:
    """What the packed copies of this model take, about."""
    weights = [m._parameters["weight"] for m in model.modules() if can_pack(m)]
    return sum(weight.nbytes for weight in weights if weight is not None)


def _fits(weight: torch.Tensor, up: torch.Tensor | None) -> bool:
    fits = weight.device.type == "cpu" and weight.dtype in DTYPES and weight.stride(1) == 1 and weight.numel() > 0
    if up is None:
        return fits
    return fits and (up.shape, up.dtype, up.stride()) == (weight.shape, weight.dtype, weight.stride())


def _stamp(weight: torch.Tensor, up: torch.Tensor | None) -> tuple[object, ...]:
    """Another one after a parameter was replaced or changed in place."""
    if up is None:
        return (id(weight), weight.data_ptr(), version(weight))
    return (id(weight), weight.data_ptr(), version(weight), id(up), up.data_ptr(), version(up))


def version(weight: torch.Tensor) -> int:
    """Counts writes in place; inference tensors have no counter."""
    return 0 if weight.is_inference() else weight._version
