"""The critic: a value head on a transformer, trained by the policy trainer's verbs.

    packed row   x y z a b      values at predict_rows     z a      the state before a, before b
    hidden       [T, H] ──────► head: H -> 1 ─────────────► [N]

A value is read from the very row whose logits predict the token: it knows what came before, not the token itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from skyrl_train.algorithms.value_loss import clipped_value_loss
from skyrl_train.data.pack import MicroBatch
from skyrl_train.errors import CheckpointError
from skyrl_train.training.attention import packed_attention
from skyrl_train.training.lora import Adapters, ChangedTensors
from skyrl_train.training.model import hidden_size, hidden_states, refuse_dropout
from skyrl_train.training.model_state import load_model_state, save_model_state
from skyrl_train.training.optimizer import MasterAdamW, OptimizerSettings, StepStats
from skyrl_train.training.trainer import checkpoint_activations, gradient_pass
from skyrl_train.types import TrainBatch


class ValueNetwork(torch.nn.Module):
    """A transformer's body with a linear head to one number, in float32 whatever the body is in.

    The head starts at 0: the first advantages are those without a critic, and no seed is needed.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Takes the body out of `model`; its language-model head is not kept. Raises ConfigError for dropout or an
        architecture that can't run packed rows."""
        super().__init__()
        body = model.base_model
        assert isinstance(body, PreTrainedModel), type(body)
        self.body = body
        refuse_dropout(self.body)
        self.head = torch.nn.Linear(hidden_size(self.body), 1, device=self.body.device, dtype=torch.float32)
        for parameter in self.head.parameters():
            torch.nn.init.zeros_(parameter)
        self.eval()

    def forward(self, micro_batch: MicroBatch) -> torch.Tensor:
        """Values [N] float32 of the states before the micro-batch's targets."""
        device = self.body.device
        hidden = hidden_states(
            self.body,
            micro_batch.token_ids.to(device),
            micro_batch.position_ids.to(device),
            packed_attention(micro_batch, device=device, dtype=self.body.dtype),
        )
        rows = hidden.index_select(0, micro_batch.predict_rows.to(device))
        values: torch.Tensor = self.head(rows.to(self.head.weight.dtype))[:, 0]
        return values


class CriticTrainer:
    """Owns a value network and its optimizer. Verbs: forward, forward_backward, optim_step, save, load."""

    def __init__(
        self,
        network: ValueNetwork,
        optimizer: OptimizerSettings,
        *,
        adapters: Adapters | None = None,
        value_clip: float = 0.2,
        gradient_checkpointing: bool = False,
    ) -> None:
        """With `adapters` of the network's body, they and the head are trained."""
        self.network = network
        self._adapters = adapters
        self._kept = network if adapters is None else ChangedTensors(network, adapters)
        self.last_step: StepStats | None = None
        self._value_clip = value_clip
        self._optimizer = MasterAdamW(list(network.parameters()), optimizer)
        self._gradient_checkpointing = gradient_checkpointing
        if gradient_checkpointing:
            checkpoint_activations(network.body)

    @torch.no_grad()
    def forward(self, batch: TrainBatch) -> list[torch.Tensor]:
        """Values [N] of each micro-batch's predictions, in its order, without gradients."""
        return [self.network(micro_batch) for micro_batch in _own(batch)]

    def forward_backward(self, batch: TrainBatch) -> dict[str, float]:
        """Add the gradient of the mean over the mini-batch's loss tokens; return `critic/loss` and the like.

        Targets and old values are the batch's `returns` and `values`.
        """
        loss = torch.zeros((), device=self.network.body.device)
        num_clipped = torch.zeros_like(loss)
        with gradient_pass(
            self.network, self._adapters, self._optimizer.num_steps_done, checkpointing=self._gradient_checkpointing
        ):
            for micro_batch in _own(batch):
                if micro_batch.returns is None or micro_batch.values is None:
                    raise ValueError("these samples have no returns and values: they were made without a critic")
                values = self.network(micro_batch)
                losses = clipped_value_loss(
                    values,
                    micro_batch.values.to(values.device),
                    micro_batch.returns.to(values.device),
                    value_clip=self._value_clip,
                )
                share = losses.values.sum() / batch.num_loss_tokens
                share.backward()  # type: ignore[no-untyped-call]
                loss += share.detach()
                num_clipped += losses.metrics["clip_frac"].sum()
        return {"critic/loss": float(loss), "critic/clip_frac": float(num_clipped) / batch.num_loss_tokens}

    def optim_step(self) -> StepStats:
        """One optimizer step on the gradients added so far; also kept as `last_step`."""
        self.last_step = self._optimizer.step()
        return self.last_step

    def save(self, folder: str | Path) -> None:
        """Write all that `load` needs for going on to the bit."""
        save_model_state(Path(folder), self._kept, self.network, self._optimizer, {})

    def load(self, folder: str | Path) -> None:
        """Into the same tensors. Raises CheckpointError for another model's checkpoint; then nothing is valid."""
        try:
            load_model_state(Path(folder), self._kept, self.network, self._optimizer)
        except (OSError, RuntimeError, ValueError, KeyError) as exc:
            body = type(self.network.body).__name__
            raise CheckpointError(f"{folder} doesn't fit a critic on {body}: {exc}") from exc


def update_critic(
    critic: CriticTrainer, mini_batches: Sequence[TrainBatch], *, num_epochs: int = 1
) -> dict[str, float]:
    """One optimizer step per mini-batch and epoch; `critic/...` metrics, means over the updates."""
    steps: list[dict[str, float]] = []
    for _ in range(num_epochs):
        for batch in mini_batches:
            metrics = critic.forward_backward(batch)
            stats = critic.optim_step()
            steps.append({**metrics, "critic/grad_norm": stats.grad_norm, "critic/lr": stats.lr})
    return {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}


def _own(batch: TrainBatch) -> tuple[MicroBatch, ...]:
    assert len(batch.micro_batches) == 1, f"one process was handed the batches of {len(batch.micro_batches)} ranks"
    return batch.micro_batches[0]
