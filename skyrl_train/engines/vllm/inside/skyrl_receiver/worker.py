"""Named by --worker-extension-cls, so that every worker imports it: importing registers the transfer engine."""

from __future__ import annotations

from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from .transfer import SkyRLTransferEngine

BACKEND = "skyrl"


class WorkerExtension:
    """Adds nothing to the worker."""


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, SkyRLTransferEngine)
