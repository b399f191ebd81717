"""Which attention backend serves a model on a device."""

from __future__ import annotations

import ctypes
import warnings

import torch

from skyrl_train.engines.embedded.attention import AttentionBackend
from skyrl_train.engines.embedded.config import AttentionName, KVShape
from skyrl_train.engines.embedded.cpu_attention import CpuAttention
from skyrl_train.engines.embedded.native.build import NativeUnavailable, load_native
from skyrl_train.engines.embedded.reference_attention import ReferenceAttention
from skyrl_train.errors import ConfigError


def make_backend(
    name: AttentionName, device: torch.device, layers: dict[int, KVShape], native: ctypes.CDLL | None
) -> AttentionBackend:
    """`auto` takes the fastest that works here, and says so when that is the slow reference."""
    if name == "reference":
        return ReferenceAttention()
    problem = _cpu_problem(device, layers)
    if problem is None and native is not None:
        return CpuAttention(native)
    problem = problem or "the C kernels can't be built (see the warning above)"
    if name == "cpu":
        raise ConfigError(f"embedded engine: attention_backend 'cpu' can't be used: {problem}")
    if native is not None or device.type != "cpu":
        warnings.warn(f"embedded engine: slow reference attention is used: {problem}", stacklevel=2)
    return ReferenceAttention()


def native_or_warn(device: torch.device) -> ctypes.CDLL | None:
    """The C kernels for a model on the CPU; None, with a warning, where they can't be built."""
    if device.type != "cpu":
        return None
    try:
        return load_native()
    except NativeUnavailable as exc:
        warnings.warn(f"embedded engine: no C kernels, so attention and sampling are slow: {exc}", stacklevel=2)
        return None


def _cpu_problem(device: torch.device, layers: dict[int, KVShape]) -> str | None:
    if device.type != "cpu":
        return f"the CPU kernel can't serve a model on {device}"
    for index, shape in layers.items():
        if not CpuAttention.supports(shape):
            return (
                "the CPU kernel wants float32 or bfloat16 and a head size that 16 divides, up to 256; layer "
                f"{index} has {shape.dtype}, head size {shape.head_dim}, {shape.num_heads} heads on "
                f"{shape.num_kv_heads}"
            )
    return None
