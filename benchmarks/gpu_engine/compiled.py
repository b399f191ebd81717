"""A peer for the fused kernels: transformers' module under torch.compile, with the engine's own attention kernel.

Takes the place of the plain runner's model, so graphs, sampling and scheduling are the engine's.
"""

from __future__ import annotations

from typing import Any

import torch

from skyrl_train.engines.embedded.cuda_runner import CudaContext, CudaRunner


class _Current:
    context: CudaContext | None = None


@torch.library.custom_op("skyrl_bench::attend", mutates_args=())
def attend(
    layer_idx: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, window: int
) -> torch.Tensor:
    assert _Current.context is not None
    return _Current.context.attend(
        layer_idx, query, key, value, scaling=scaling, sliding_window=None if window < 0 else window
    )


@attend.register_fake
def _(
    layer_idx: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, window: int
) -> torch.Tensor:
    return torch.empty(query.shape, dtype=query.dtype, device=query.device)


class TraceableContext:
    """An AttentionContext that a compiler sees through to one operation."""

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
        window = -1 if sliding_window is None else sliding_window
        result: torch.Tensor = torch.ops.skyrl_bench.attend(layer_idx, query, key, value, scaling, window)
        return result


class CompiledModel:
    """Called as InferenceModel is."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.original = model
        self._compiled = torch.compile(model, dynamic=False)
        self._context = TraceableContext()

    def __call__(self, *, attention_context: CudaContext, **inputs: Any) -> Any:
        _Current.context = attention_context
        try:
            if "logits_to_keep" in inputs:  # prompts come in any length: not compiled
                return self.original(attention_context=attention_context, **inputs)
            return self._compiled(attention_context=self._context, **inputs)
        finally:
            _Current.context = None

    def refresh(self) -> bool:
        return False

    def weights_changed(self) -> bool:
        return False


def compile_runner(runner: CudaRunner) -> None:
    """Before its first decode step."""
    runner._model = CompiledModel(runner._model.original)  # type: ignore[assignment]
