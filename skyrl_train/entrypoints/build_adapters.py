"""Adapters in the embedded engine: which it may serve, and a policy that is one beside the frozen model it shares.

    trainer    h = W x + s B A x        A and B are trained
               :     shared              snapshot at each update
    engine     h = W x + s B'A'x

So there is one W, whatever the loop is: it is never written, and the asynchronous trainer moves A and B alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from skyrl_train.config.schema import Config
from skyrl_train.engines.embedded.adapters.settings import LoraLimits
from skyrl_train.engines.embedded.engine import EmbeddedEngine
from skyrl_train.training.learner import Learner
from skyrl_train.types import AdapterWeights
from skyrl_train.weight_sync.adapter import HIGH, LOW, PREFIX


def adapter_limits(config: Config) -> LoraLimits | None:
    """What generator.lora asks of the embedded engine; None where it is off."""
    keys = config.generator.lora
    if not keys.enabled:
        return None
    return LoraLimits(
        paths=keys.paths,
        max_rank=keys.max_rank,
        target_modules=None if keys.target_modules is None else tuple(keys.target_modules),
        max_in_batch=keys.max_loras_per_batch or LoraLimits.max_in_batch,
        max_loaded=keys.max_loaded_loras,
        eviction_policy=keys.eviction_policy or LoraLimits.eviction_policy,
    )


def serves_policy_as_adapter(config: Config) -> bool:
    """Whether the policy is an adapter for the engine too, and not merged."""
    return bool(config.trainer.policy.model.lora.rank and config.generator.lora.enabled)


def serve_trained_adapter(engine: EmbeddedEngine, learner: Learner) -> Callable[[], PreTrainedModel]:
    """From here on requests without an adapter are answered by the trainer's, as it is now.

    Returns what makes a plain module of that answer, to be looked at when engine and trainer part.
    """
    adapters, update = engine.core.adapters, learner.export_weights()
    assert adapters is not None and isinstance(update.source, AdapterWeights)
    adapters.set_policy(adapters.make_policy(update.source))
    return lambda: merged_view(engine)


@torch.no_grad()
def merged_view(engine: EmbeddedEngine) -> PreTrainedModel:
    """A plain module of the model with the policy's adapter merged; all that has no adapter is the very tensor."""
    model, adapters = engine.core.model, engine.core.adapters
    assert isinstance(model, PreTrainedModel) and adapters is not None and adapters.policy is not None
    source = adapters.policy.source
    assert source is not None
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    plain = copy.deepcopy(model, shared)
    for site, pair in adapters.policy.pairs.items():
        module = plain.get_submodule(site)
        weight: torch.Tensor = module.weight  # type: ignore[assignment]
        dtype = torch.promote_types(weight.dtype, torch.float32)
        low, high = (source.tensors[f"{PREFIX}{site}{end}"].to(dtype) for end in (LOW, HIGH))
        change = high @ low * pair.scale
        merged = weight.to(dtype) + (change.T if isinstance(module, Conv1D) else change)
        module.weight = torch.nn.Parameter(merged.to(weight.dtype), requires_grad=False)
    return plain
