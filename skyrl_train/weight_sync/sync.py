"""New weights to an engine: pause, update, resume; whole or not at all."""

from __future__ import annotations

from skyrl_train.engines.base import Engine
from skyrl_train.errors import WeightUpdateError
from skyrl_train.types import WeightUpdate


async def sync_weights(engine: Engine, update: WeightUpdate) -> None:
    """Serve `update.version` from here on.

    Running requests freeze and go on under the new weights. If the update fails the engine stays paused: a
    half-loaded engine serves nobody. Raises WeightUpdateError.
    """
    await engine.pause("keep")
    await engine.update_weights(update)
    served = (await engine.stats()).policy_version
    if served != update.version:
        raise WeightUpdateError(
            f"engine {engine.info.name} reports version {served} after an update to {update.version}; it stays paused"
        )
    await engine.resume()
