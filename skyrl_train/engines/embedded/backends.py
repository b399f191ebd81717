"""Which attention backend serves a model on a device."""

from __future__ import annotations

import warnings

import torch

from skyrl_train.engines.embedded.attention import AttentionBackend
from skyrl_train.engines.embedded.config import AttentionName, KVShape
from skyrl_train.engines.embedded.cpu_attention import CpuAttention
from skyrl_train.engines.embedded.native.build import NativeUnavailable
from skyrl_train.engines.embedded.reference_attention import ReferenceAttention
from skyrl_train.errors import ConfigError


def make_backend(name: AttentionName, device: torch.device, layers: dict[int, KVShape]) -> AttentionBackend:
    """`auto` takes the fastest that works here, and says so when that is the slow reference."""
    if name == "reference":
        return ReferenceAttention()
    problem = _cpu_problem(device, layers)
    if problem is None:
        try:
            return CpuAttention()
        except NativeUnavailable as exc:
            problem = str(exc)
    if name == "cpu":
        raise ConfigError(f"embedded engine: attention_backend 'cpu' can't be used: {problem}")
    warnings.warn(f"embedded engine: slow reference attention is used, because {problem}", stacklevel=2)
    return ReferenceAttention()


def _cpu_problem(device: torch.device, layers: dict[int, KVShape]) -> str | None:
    if device.type != "cpu":
        return f"the CPU kernel can't serve a model on {device}"
    for index, shape in layers.items():
        if not CpuAttention.supports(shape):
            return (
                f"the CPU kernel wants float32 and a head size that 16 divides, up to 256; layer {index} has "
                f"{shape.dtype}, head size {shape.head_dim}, {shape.num_heads} heads on {shape.num_kv_heads}"
            )
    return None
