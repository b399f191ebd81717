"""New weights to an engine: pause, update, resume; whole or not at all. And, on a shared GPU, whose turn it is."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from skyrl_train.engines.base import Engine, Occupant
from skyrl_train.errors import WeightUpdateError
from skyrl_train.types import WeightUpdate


@dataclass(frozen=True, kw_only=True)
class Turns:
    """Trainer and engine on the same GPUs, one after the other.

        rollouts | sleep | training | wake weights, update, wake cache, resume | rollouts
                   └ `releases` are given back        └ `make_room` first: the trainer's own cached memory goes

    `releases` has "weights" only where every update brings all of them: what wakes up is memory without content.
    """

    releases: tuple[Occupant, ...]
    make_room: Callable[[], None]

    async def to_trainer(self, engine: Engine) -> None:
        """After the rollouts: the engine is drained, and gives its memory back."""
        await engine.pause("wait")
        await engine.sleep(self.releases)


async def sync_weights(engine: Engine, update: WeightUpdate, *, turns: Turns | None = None) -> None:
    """Serve `update.version` from here on.

    Running requests freeze and go on under the new weights. If the update fails the engine stays paused: a
    half-loaded engine serves nobody. Raises WeightUpdateError.
    """
    asleep: Collection[Occupant] = () if turns is None else turns.releases
    await engine.pause("keep")
    if turns is not None:
        turns.make_room()
    if "weights" in asleep:
        await engine.wake(("weights",))
    await engine.update_weights(update)
    served = (await engine.stats()).policy_version
    if served != update.version:
        raise WeightUpdateError(
            f"engine {engine.info.name} reports version {served} after an update to {update.version}; it stays paused"
        )
    if "kv_cache" in asleep:
        await engine.wake(("kv_cache",))
    await engine.resume()
