"""The one attention function that every model here runs with.

transformers calls it from each attention layer with q, k, v of the current rows. What those rows may
look at is decided by the caller's `AttentionContext`, handed through the model's forward as a keyword:

    model(input_ids=[1, T], position_ids=[1, T], use_cache=False, attention_context=context)

The engine's context reads and writes the paged KV pool; the trainer's attends within packed sequences.
So the engine and the trainer share one `nn.Module` and never switch anything on it.

Shapes: T rows (tokens of many sequences, one after the other), Hq query heads, Hkv key/value heads, D head size.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from transformers import AttentionInterface

ATTENTION_NAME = "skyrl"
"""Pass as `attn_implementation`. transformers builds no mask for a name it has no mask function for."""


class AttentionContext(Protocol):
    """Computes attention for the rows of one forward pass."""

    def attend(
        self,
        layer_idx: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float,
        sliding_window: int | None,
    ) -> torch.Tensor:
        """query [T, Hq, D], key and value [T, Hkv, D] -> [T, Hq, D]. Strides are arbitrary except the last."""
        ...


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    attention_context: AttentionContext | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [1, Hq, T, D] -> ([1, T, Hq, D], None)."""
    name = type(module).__name__
    if attention_context is None:
        raise RuntimeError(
            f"{name} was called without attention_context: this model runs inside skyrl_train's engine or trainer. "
            "For a plain forward, load it again without attn_implementation='skyrl'."
        )
    if softcap is not None or kwargs.get("s_aux") is not None:
        raise NotImplementedError(f"{name} needs soft-capped logits or attention sinks, which are not supported")
    if dropout:
        raise NotImplementedError(f"{name} asks for attention dropout {dropout}; set attention_dropout to 0")
    assert attention_mask is None and query.shape[0] == 1, (name, attention_mask is None, query.shape)
    layer_idx: int = module.layer_idx  # type: ignore[assignment]
    out = attention_context.attend(
        layer_idx,
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        scaling=scaling if scaling is not None else query.shape[-1] ** -0.5,
        sliding_window=sliding_window,
    )
    return out.unsqueeze(0), None


AttentionInterface.register(ATTENTION_NAME, attention_forward)
