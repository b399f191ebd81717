"""Our own engine: the trainer's nn.Module with a paged KV cache, continuous batching and a prefix cache."""

from __future__ import annotations

from skyrl_train.engines.embedded.adapters.settings import LoraLimits
from skyrl_train.engines.embedded.config import EmbeddedConfig
from skyrl_train.engines.embedded.engine import EmbeddedEngine, StreamedTokens

__all__ = ["EmbeddedConfig", "EmbeddedEngine", "LoraLimits", "StreamedTokens"]
