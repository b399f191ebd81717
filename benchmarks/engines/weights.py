"""Other weights for a running engine, over the path that its configuration names."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping

import torch
from transformers import PreTrainedModel

from benchmarks.engines.harness import Fleet, Ship
from skyrl_train.types import NamedWeights, WeightUpdate
from skyrl_train.weight_sync.sync import sync_weights

Make = Callable[..., PreTrainedModel]


async def give(fleet: Fleet, ship: Ship, make: Make, **options: object) -> float:
    """`make`'s model of the fleet's shape; the seconds of the update alone."""
    setup = fleet.setup
    model = make(setup.shape, device=setup.device, dtype=setup.dtype, seed=setup.seed, **options)
    seconds = await give_tensors(ship, model.state_dict())
    del model
    free(setup.device)
    fleet.report.log(f"{ship.name}: other weights after {seconds:.3f} s")
    return seconds


async def give_tensors(ship: Ship, tensors: Mapping[str, torch.Tensor]) -> float:
    """As the loop does it: pause with what runs kept, update, resume."""
    version = (await ship.engine.stats()).policy_version + 1
    start = time.perf_counter()
    await sync_weights(ship.engine, WeightUpdate(version=version, source=NamedWeights(tensors=tensors)))
    return time.perf_counter() - start


def free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
