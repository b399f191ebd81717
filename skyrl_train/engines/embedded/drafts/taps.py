"""Outputs of single decoder layers, kept as the model runs: what an EAGLE head reads.

Taps sit in the twin alone. A hook would not do: the twin shares the dictionary of hooks with the trainer's module. So
the tapped layer's own `forward` is put before that of its class, in the twin's instance.

Shapes: T rows, H hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from skyrl_train.errors import ConfigError


class Taps:
    """`layers` as in `drafts.base.Drafter.taps`; `install` again whenever the twin was built again."""

    def __init__(self, layers: tuple[int, ...]) -> None:
        self.layers = layers
        self._seen: dict[int, torch.Tensor] = {}

    def install(self, twin: nn.Module) -> None:
        """Raises ConfigError where the model has no such layers."""
        decoder: Any = twin.get_decoder()  # type: ignore[operator]
        layers = decoder.layers
        wrong = [layer for layer in self.layers if not -1 <= layer <= len(layers)]
        if wrong:
            raise ConfigError(
                f"the draft head reads layers {wrong} of a model that has {len(layers)}; it was trained for another one"
            )
        for layer in self.layers:
            if layer == len(layers):
                _keep_output(decoder, self._seen, layer)
            elif layer == -1:
                _keep_input(layers[0], self._seen)
            else:
                _keep_output(layers[layer], self._seen, layer)

    def take(self) -> torch.Tensor:
        """[T, len(layers) * H] of the last forward pass."""
        seen = [self._seen[layer] for layer in self.layers]
        joined = torch.cat(seen, dim=-1)[0] if len(seen) > 1 else seen[0][0]
        self._seen.clear()
        return joined


def _keep_output(module: nn.Module, seen: dict[int, torch.Tensor], layer: int) -> None:
    inner = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = inner(*args, **kwargs)
        seen[layer] = output if isinstance(output, torch.Tensor) else output[0]
        return output

    module.__dict__["forward"] = forward


def _keep_input(module: nn.Module, seen: dict[int, torch.Tensor]) -> None:
    inner = module.forward

    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen[-1] = hidden_states
        return inner(hidden_states, *args, **kwargs)

    module.__dict__["forward"] = forward
