"""Trains an EAGLE-3 head on what the policy says of given sequences; the policy is only read.

A saved head is a folder that this engine and the servers load, with what training goes on from beside it:

    config.json  model.safetensors   the published layout (see drafts/eagle/layout)
    training/                        the optimizer's moments and the number of steps
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from skyrl_train.engines.embedded.drafts.eagle.head import Eagle3Head, Target
from skyrl_train.engines.embedded.drafts.eagle.layout import load_head, save_head
from skyrl_train.errors import CheckpointError, ConfigError
from skyrl_train.training.eagle3_loss import policy_view, unrolled_loss
from skyrl_train.training.optimizer import MasterAdamW, OptimizerSettings
from skyrl_train.training.sharded_state import load_tensors, save_tensors, stored_names
from skyrl_train.types import TokenSequence

TRAINING, VALUES = "training", "state.json"


@dataclass(frozen=True, kw_only=True)
class Eagle3Settings:
    """`num_unrolled` steps of the training-time test, of which step s counts `decay`**s. Micro-batches are of at most
    `max_tokens` tokens, padding included, or of one sequence."""

    optimizer: OptimizerSettings
    num_unrolled: int = 4
    decay: float = 0.8
    max_tokens: int = 4096


@dataclass(frozen=True, kw_only=True, eq=False)
class AnsweredSequence:
    """Token ids [L], and which of them the policy sampled [L]."""

    token_ids: torch.Tensor
    is_answer: torch.Tensor


class Eagle3Trainer:
    """Owns the head's weights, which are written in place, and its optimizer."""

    def __init__(self, model: PreTrainedModel, head: Eagle3Head, settings: Eagle3Settings) -> None:
        self._model = model
        self._target = Target.of(model)
        self.head = head
        self.settings = settings
        head.requires_grad_(True)
        self._names = [name for name, _ in head.named_parameters()]
        self._optimizer = MasterAdamW(list(head.parameters()), settings.optimizer)

    @property
    def num_steps_done(self) -> int:
        return self._optimizer.num_steps_done

    def step(self, sequences: Sequence[AnsweredSequence]) -> dict[str, float]:
        """One optimizer step on these sequences.

        `eagle3/loss` is the weighted cross-entropy by row of the first unrolled step, `eagle3/agree_<s>` the fraction
        of rows in which head and policy have the same likeliest word after s - 1 guesses. Without a row to learn from
        nothing is done, and the result is empty.
        """
        settings, device = self.settings, self.head.fc.weight.device
        batches = [(ids.to(device), answer.to(device)) for ids, answer in _padded(sequences, settings.max_tokens)]
        denominator = sum(int(answer[:, 2:].sum()) for _, answer in batches)
        if not denominator:
            return {}
        loss = 0.0
        agreed = torch.zeros(settings.num_unrolled, dtype=torch.int64)
        counted = torch.zeros(settings.num_unrolled, dtype=torch.int64)
        for token_ids, is_answer in batches:
            view = policy_view(self._model, token_ids, self.head.taps)
            part = unrolled_loss(
                self.head,
                self._target,
                view,
                token_ids,
                is_answer,
                num_steps=settings.num_unrolled,
                decay=settings.decay,
            )
            scaled = part.total / denominator
            if scaled.requires_grad:
                scaled.backward()  # type: ignore[no-untyped-call]
            loss += float(scaled.detach())
            agreed += part.agreed.cpu()
            counted += part.counted.cpu()
        if not counted[0]:
            self._optimizer.clear_gradients()
            return {}
        stats = self._optimizer.step()
        agreement = (agreed / counted.clamp(min=1)).tolist()
        return {
            "eagle3/loss": loss,
            "eagle3/grad_norm": stats.grad_norm,
            "eagle3/lr": stats.lr,
            **{f"eagle3/agree_{i + 1}": value for i, value in enumerate(agreement)},
        }

    def learn(self, sequences: Sequence[TokenSequence], num_steps: int) -> dict[str, float]:
        """`num_steps` steps at most, each on its part of these sequences; the metrics' means over the steps."""
        answered = [AnsweredSequence(token_ids=one.token_ids, is_answer=one.loss_mask) for one in sequences]
        taken = [self.step(part) for part in (answered[i::num_steps] for i in range(num_steps)) if part]
        rows = [row for row in taken if row]
        return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]} if rows else {}

    def save(self, folder: str | Path) -> None:
        """The head in the published layout, and what `load` needs for going on to the bit."""
        root = save_head(self.head, folder, num_layers=self._target.num_layers)
        training = root / TRAINING
        training.mkdir(exist_ok=True)
        save_tensors(training, self._optimizer.tensors(self._names))
        (training / VALUES).write_text(json.dumps({"num_steps_done": self.num_steps_done}))

    def load(self, folder: str | Path) -> None:
        """Into the same tensors. Raises CheckpointError for another head's folder; then nothing is valid."""
        root = Path(folder)
        training = root / TRAINING
        try:
            saved = load_head(root, "eagle3", self._target, dtype=self.head.fc.weight.dtype)
            self.head.load_state_dict(saved.state_dict())
            moments = self._optimizer.empty_tensors(self._names, stored_names(training))
            load_tensors(training, moments)
            values = json.loads((training / VALUES).read_text())
            self._optimizer.load_tensors(self._names, moments, values["num_steps_done"])
        except (ConfigError, OSError, RuntimeError, ValueError, KeyError) as exc:
            raise CheckpointError(f"{folder} can't go on as this EAGLE-3 head: {exc}") from exc


def _padded(sequences: Sequence[AnsweredSequence], max_tokens: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """token_ids and is_answer [B, L] of sequences of like length."""
    group: list[AnsweredSequence] = []
    for sequence in sorted(sequences, key=lambda sequence: len(sequence.token_ids)):
        if group and (len(group) + 1) * len(sequence.token_ids) > max_tokens:
            yield _stacked(group)
            group = []
        group.append(sequence)
    if group:
        yield _stacked(group)


def _stacked(group: Sequence[AnsweredSequence]) -> tuple[torch.Tensor, torch.Tensor]:
    ids, answers = ([getattr(one, name) for one in group] for name in ("token_ids", "is_answer"))
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(ids, batch_first=True), pad(answers, batch_first=True)
