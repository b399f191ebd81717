"""Guesses of a small model of the same vocabulary.

Its keys and values lie in a pool of its own under the slots of the served model's, so a prefix that the cache shares is
shared here too, and what is evicted there is gone here. They are computed when guesses are first asked for: for each
slot it is known whether this model's keys of its token are there. What the served model computes without us
(`follow`) has none yet.

A guess is the small model's token at the request's own uniform number, the number by which the served model's token
will be drawn: where the two distributions agree, so do the tokens.

Shapes: n seats, S seats of the engine, T rows, V words, C positions.
"""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from skyrl_train.engines.embedded.attention import PagedBatch, PagedContext
from skyrl_train.engines.embedded.backends import make_backend
from skyrl_train.engines.embedded.config import AttentionName, KVShape
from skyrl_train.engines.embedded.drafts.base import Drafts, FollowedRows, Indices, Ints
from skyrl_train.engines.embedded.kv_pool import KVPool
from skyrl_train.engines.embedded.request import Seats
from skyrl_train.engines.embedded.sampler import NativePick, Pick, pick, truncated
from skyrl_train.engines.embedded.twin import InferenceModel
from skyrl_train.engines.embedded.uniforms import uniforms

Longs = npt.NDArray[np.int64]

MAX_ROWS = 4096
"""Known tokens that are computed at once, but for a single request's, which aren't cut."""


class StandaloneDrafter:
    """See base.Drafter."""

    name = "standalone"
    taps: tuple[int, ...] = ()
    has_weights = True

    def __init__(
        self,
        model: InferenceModel,
        layers: dict[int, KVShape],
        *,
        max_guesses: int,
        num_slots: int,
        num_seats: int,
        native: ctypes.CDLL | None,
        attention_backend: AttentionName = "auto",
    ) -> None:
        self.max_tokens = max_guesses
        self._model = model
        device = next(model.original.parameters()).device
        self._pool = KVPool(layers, num_slots, device)
        self.pools: tuple[KVPool, ...] = (self._pool,)
        self.models: tuple[InferenceModel, ...] = (self._model,)
        self._backend = make_backend(attention_backend, device, layers, native)
        self._pick: Pick = pick if native is None else NativePick(native)
        self._has_keys = np.zeros(num_slots + 1, dtype=bool)
        self._step = 0
        self._written_at = np.full(num_slots + 1, -1, dtype=np.int64)
        self._tenancy = np.full(num_seats, -1, dtype=np.int64)
        self._done = np.zeros(num_seats, dtype=np.int64)
        """Tokens of the seat's occupant `_tenancy` whose keys are here, whatever `_has_keys` says."""

    @property
    def model(self) -> PreTrainedModel:
        """Its weights may be written in place; call `refreshed` after that."""
        original = self._model.original
        assert isinstance(original, PreTrainedModel)
        return original

    def refreshed(self) -> None:
        """The small model's weights were changed: its keys are worthless."""
        self._model.weights_changed()
        self._has_keys[:] = False
        self._tenancy[:] = -1

    def weights_changed(self) -> None:
        """The small model stays as it was; that all slots are free now, it learns as they are used again."""

    def follow(self, rows: FollowedRows) -> None:
        slots = rows.batch.row_slots.numpy()
        self._has_keys[slots] = self._written_at[slots] == self._step
        self._step += 1

    def propose(self, seats: Seats, chosen: Indices, room: Ints) -> Drafts:
        room = np.minimum(room, self.max_tokens)
        tokens = np.zeros((len(chosen), int(room.max())), dtype=np.int32)
        length = seats.length[chosen].astype(np.int64)
        with torch.inference_mode():
            logits = self._catch_up(seats, chosen, length)
            going = np.arange(len(chosen))
            for step in range(tokens.shape[1]):
                tokens[going, step] = self._draw(seats, chosen[going], length[going] + step, logits)
                still = room[going] > step + 1
                going, position = going[still], (length[going] + step)[still]
                if not len(going):
                    break
                logits = self._forward(seats, chosen[going], position, position + 1, tokens[going, step])
        parents = np.broadcast_to(np.arange(-1, tokens.shape[1] - 1, dtype=np.int32), tokens.shape)
        return Drafts(tokens=tokens, parents=parents, counts=room.astype(np.int32))

    def _catch_up(self, seats: Seats, chosen: Indices, length: Longs) -> torch.Tensor:
        """Compute the known tokens that have no keys here, and the last one; logits [n, V] after that."""
        first = np.empty(len(chosen), dtype=np.int64)
        for i, seat in enumerate(chosen.tolist()):
            done = self._done[seat] if self._tenancy[seat] == seats.tenancy[seat] else 0
            slots = seats.slots[seat, done : length[i] - 1]
            there = self._has_keys[slots]
            first[i] = done + (len(slots) if there.all() else int(there.argmin()))
            # A sibling further on in this very batch finds them: all keys are written before any row attends.
            self._has_keys[slots] = True
        self._tenancy[chosen], self._done[chosen] = seats.tenancy[chosen], length
        parts, begin = [], 0
        total = np.cumsum(length - first)
        while begin < len(chosen):
            before = int(total[begin - 1]) if begin else 0
            end = max(begin + 1, int(np.searchsorted(total, before + MAX_ROWS, side="right")))
            part = slice(begin, end)
            parts.append(self._forward(seats, chosen[part], first[part], length[part]))
            begin = end
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _forward(
        self, seats: Seats, chosen: Indices, first: Longs, end: Longs, guesses: Ints | None = None
    ) -> torch.Tensor:
        """Compute tokens [first, end) of each seat, known ones or one guess each; logits [n, V] of the last ones."""
        count = end - first
        ends = np.cumsum(count)
        row = np.repeat(np.arange(len(chosen)), count)
        position = np.arange(int(ends[-1])) + (first - (ends - count))[row]
        owner = chosen[row]
        ids = seats.tokens[owner, position] if guesses is None else guesses
        slots = seats.slots[owner, position].astype(np.int64)
        self._has_keys[slots] = True
        self._written_at[slots] = self._step
        batch = PagedBatch(
            row_slots=torch.from_numpy(slots),
            row_positions=torch.from_numpy(position),
            row_seats=torch.from_numpy(owner.astype(np.int32)),
            request_seats=chosen.tolist(),
            cu_rows=[0, *ends.tolist()],
            slot_table=torch.from_numpy(seats.slots),
        )
        output = self._model(
            input_ids=torch.from_numpy(ids.astype(np.int64))[None],
            position_ids=batch.row_positions[None],
            use_cache=False,
            attention_context=PagedContext(self._backend, self._pool, batch),
            logits_to_keep=0 if len(row) == len(chosen) else torch.from_numpy(ends - 1),
        )
        logits: torch.Tensor = output.logits[0]
        return logits.float()

    def _draw(self, seats: Seats, chosen: Indices, position: Longs, logits: torch.Tensor) -> Longs:
        """This model's tokens [n] for these positions."""
        table = seats.sampling
        if table.truncates[chosen].any():
            logits = truncated(logits, table, chosen)
        uniform = uniforms(table.key[chosen], position - seats.prompt_len[chosen])
        return self._pick(logits, logits, table.temperature[chosen], uniform)[0]
