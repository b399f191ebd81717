"""The trainer's forward in the engine's own arithmetic: `rl_on_policy_target`.

The log-probability of a sampled token is then, to the bit, the one that the deterministic engine gave it: both run the
same view of the model (engines.embedded.invariant), in which a row's result depends on nothing but its own sequence.
So importance ratios of fresh samples are exactly 1, whatever the packing. Gradients are torch's, of the same functions.

Shapes: N predictions, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from skyrl_train.attention import AttentionContext
from skyrl_train.data.pack import MicroBatch
from skyrl_train.engines.embedded.invariant.attention import PackedInvariantAttention
from skyrl_train.engines.embedded.invariant.kernels import invariant_kernels, inverse_of
from skyrl_train.engines.embedded.invariant.view import InvariantModel
from skyrl_train.errors import ConfigError
from skyrl_train.training.logprobs import (
    MAX_CHUNK_BYTES,
    ChunkedLogprobs,
    LogitTransform,
    TokenLogprobs,
)
from skyrl_train.training.model import PolicyHead, hidden_states


class OnPolicyHead(PolicyHead):
    """A head whose log-probabilities are the deterministic engine's. Raises ConfigError as `InvariantModel` does."""

    def __init__(self, model: PreTrainedModel, *, temperature: float) -> None:
        super().__init__(model, temperature=temperature)
        if self._transform != LogitTransform():
            raise ConfigError(
                f"generator.deterministic_inference.rl_on_policy_target: the logits of {type(model).__name__} are "
                "scaled or capped behind its head, which is not built to the bit; leave it out for this model"
            )
        self._view = InvariantModel(model)

    def over(self, model: PreTrainedModel) -> OnPolicyHead:
        other = super().over(model)
        assert isinstance(other, OnPolicyHead)
        other._view = InvariantModel(model)
        return other

    def attention(self, micro_batch: MicroBatch) -> AttentionContext:
        return PackedInvariantAttention(micro_batch, super().attention(micro_batch))

    def __call__(
        self,
        token_ids: torch.Tensor,
        position_ids: torch.Tensor,
        predict_rows: torch.Tensor,
        target_ids: torch.Tensor,
        attention_context: AttentionContext,
    ) -> TokenLogprobs:
        hidden = hidden_states(self._view.twin, token_ids, position_ids, attention_context)
        num_rows = max(1, MAX_CHUNK_BYTES["cpu"] // (4 * self._head.weight.shape[0]))
        logprobs, entropy = _InvariantLogprobs.apply(  # type: ignore[no-untyped-call]
            *(hidden.index_select(0, predict_rows), self._head.weight, self._head.bias, target_ids),
            *(self.temperature, self._transform, num_rows),
        )
        return TokenLogprobs(logprobs=logprobs, entropy=entropy)


class _InvariantLogprobs(ChunkedLogprobs):
    """The engine's head and softmax; the gradient is its parent's."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        target_ids: torch.Tensor,
        temperature: float,
        transform: LogitTransform,
        num_rows: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        kernels, inverse = invariant_kernels(), inverse_of(temperature)
        logprobs, entropy, lse = (torch.empty(len(target_ids)) for _ in range(3))
        for start in range(0, len(target_ids), num_rows):
            rows = slice(start, start + num_rows)
            targets = target_ids[rows].contiguous()
            z = kernels.linear(hidden[rows].contiguous(), weight, bias)
            logprobs[rows], lse[rows] = kernels.logprobs(z, torch.full((len(z),), inverse), targets)
            logp = z.mul_(inverse).sub_(lse[rows, None])
            entropy[rows] = -torch.exp(logp).mul_(logp).sum(-1)
        ctx.save_for_backward(hidden, weight, bias, target_ids, lse, entropy)
        ctx.kernels, ctx.temperature, ctx.transform, ctx.num_rows = None, temperature, transform, num_rows
        ctx.set_materialize_grads(False)
        return logprobs, entropy
