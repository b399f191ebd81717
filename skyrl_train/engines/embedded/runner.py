"""Runs one planned step on the model: rows in, logits of the rows that sample out."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from skyrl_train.attention import ATTENTION_NAME
from skyrl_train.engines.embedded.attention import AttentionBackend, PagedBatch, PagedContext, ShapeProbe
from skyrl_train.engines.embedded.config import KVShape
from skyrl_train.engines.embedded.kv_pool import KVPool
from skyrl_train.engines.embedded.request import Seats
from skyrl_train.engines.embedded.scheduler import StepPlan
from skyrl_train.errors import ConfigError


class ModelRunner:
    """Holds the step's persistent row buffers; T rows at most `max_rows`."""

    def __init__(
        self, model: torch.nn.Module, backend: AttentionBackend, pool: KVPool, seats: Seats, max_rows: int
    ) -> None:
        self._model = model
        self._backend = backend
        self._pool = pool
        self._seats = seats
        self._input_ids = np.zeros(max_rows, dtype=np.int64)
        self._positions = np.zeros(max_rows, dtype=np.int64)
        self._row_slots = np.zeros(max_rows, dtype=np.int64)
        self._row_seats = np.zeros(max_rows, dtype=np.int32)
        self._slot_table = torch.from_numpy(seats.slots)

    def logits(self, plan: StepPlan) -> torch.Tensor:
        """[n, V] for the plan's `sample_seats`, in their order. Writes the rows' keys and values to the pool."""
        batch, sample_rows = self._lay_out(plan)
        num_rows = plan.num_rows
        context = PagedContext(self._backend, self._pool, batch)
        with torch.inference_mode():
            output = self._model(
                input_ids=torch.from_numpy(self._input_ids[:num_rows])[None],
                position_ids=batch.row_positions[None],
                use_cache=False,
                attention_context=context,
                logits_to_keep=sample_rows,
            )
            logits: torch.Tensor = output.logits[0]
        return logits

    def _lay_out(self, plan: StepPlan) -> tuple[PagedBatch, torch.Tensor | int]:
        seats = self._seats
        n, total = len(plan.decode_seats), plan.num_rows
        ids, positions, slots, owners = self._input_ids, self._positions, self._row_slots, self._row_seats
        decoding = plan.decode_seats
        position = seats.computed[decoding] - 1
        positions[:n] = position
        ids[:n] = seats.tokens[decoding, position]
        slots[:n] = seats.slots[decoding, position]
        owners[:n] = decoding
        cu_rows = list(range(n + 1))
        sample_rows = list(range(n))
        for chunk in plan.chunks:
            begin = cu_rows[-1]
            end = begin + chunk.end - chunk.start
            ids[begin:end] = seats.tokens[chunk.seat, chunk.start : chunk.end]
            positions[begin:end] = np.arange(chunk.start, chunk.end)
            slots[begin:end] = seats.slots[chunk.seat, chunk.start : chunk.end]
            owners[begin:end] = chunk.seat
            cu_rows.append(end)
            if chunk.samples:
                sample_rows.append(end - 1)
        batch = PagedBatch(
            row_slots=torch.from_numpy(slots[:total]),
            row_positions=torch.from_numpy(positions[:total]),
            row_seats=torch.from_numpy(owners[:total]),
            request_seats=[*decoding.tolist(), *(chunk.seat for chunk in plan.chunks)],
            cu_rows=cu_rows,
            slot_table=self._slot_table,
        )
        # 0 keeps every row and spares the model a gather.
        return batch, 0 if len(sample_rows) == total else torch.tensor(sample_rows, dtype=torch.long)


def probe_layers(model: torch.nn.Module) -> dict[int, KVShape]:
    """What each attention layer caches, found by running one token through the model.

    Raises ConfigError where the model can't be served: another attention implementation, active dropout, layers
    that keep state elsewhere.
    """
    config: Any = model.config
    implementation = config.get_text_config()._attn_implementation
    if implementation != ATTENTION_NAME:
        raise ConfigError(
            f"embedded engine: the model was loaded with attn_implementation={implementation!r}; "
            f"load it with attn_implementation={ATTENTION_NAME!r}"
        )
    has_dropout = any(isinstance(part, torch.nn.Dropout) and part.p > 0 for part in model.modules())
    if model.training and (has_dropout or config.get_text_config().to_dict().get("attention_dropout")):
        raise ConfigError("embedded engine: the model is in training mode and has dropout; set its dropout to 0")
    device = next(model.parameters()).device
    probe = ShapeProbe()
    token = torch.zeros((1, 1), dtype=torch.long, device=device)
    with torch.inference_mode():
        model(input_ids=token, position_ids=token, use_cache=False, attention_context=probe)
    expected = config.get_text_config().num_hidden_layers
    if len(probe.layers) != expected:
        raise ConfigError(
            f"embedded engine: {type(model).__name__} has {expected} layers, of which {len(probe.layers)} are standard "
            "attention; state-space and other recurrent layers can't be served"
        )
    return probe.layers
