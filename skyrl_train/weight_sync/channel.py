"""How weights travel to one server: opened once, used for every update, closed with the engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from skyrl_train.weight_sync.plan import WeightPlan


class WeightChannel(Protocol):
    """Moves named tensors into one server that is paused, and holds the deadlines of both sides.

    Whole or not at all, as far as the server can: any failure is WeightUpdateError and the engine stays paused; the
    next push starts from nothing. No call leaves a thread or process inside a collective.
    """

    async def open(self) -> None:
        """Once the server is up, and again after each restart of it (what an earlier open made is dropped)."""
        ...

    async def prepare(self, plan: WeightPlan, tensors: Mapping[str, torch.Tensor], *, version: int) -> None:
        """What of `push` needs no pause: called before it with the same arguments, while requests run. Optional.

        The server is not touched. Raises WeightUpdateError; the engine goes on with its old weights then.
        """
        return

    async def push(self, plan: WeightPlan, tensors: Mapping[str, torch.Tensor], *, version: int) -> None:
        """All of the plan's tensors, in its order; then the server's cache is empty and its version is str(version)."""
        ...

    async def close(self) -> None:
        """Also when the server is gone. A second call does nothing."""
        ...
