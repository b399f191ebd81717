"""What adapters one engine may serve."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from skyrl_train.errors import ConfigError

EvictionPolicy = Literal["lru", "fifo"]


@dataclass(frozen=True, kw_only=True)
class LoraLimits:
    """`paths` names folders in peft's format. `target_modules`: names, or ends of names after a dot, of linear maps
    that adapters may change; None is each of them but the head.

    At most `max_in_batch` of them run at once, and the model without any counts as one. `max_loaded` bounds what is
    kept in memory: past it, an adapter that no open request asks for leaves, and comes back from its folder when one
    does. Those that open requests ask for are kept, be they more.
    """

    paths: Mapping[str, str] = field(default_factory=dict)
    max_rank: int | None = None
    target_modules: tuple[str, ...] | None = None
    max_in_batch: int = 8
    max_loaded: int | None = None
    eviction_policy: EvictionPolicy = "lru"

    def __post_init__(self) -> None:
        for name in ("max_rank", "max_in_batch", "max_loaded"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"embedded engine: lora.{name} must be at least 1, found {value}")
