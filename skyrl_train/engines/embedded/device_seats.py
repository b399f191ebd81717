"""What a device must know of the running requests to compute their next tokens without the host.

    slot_table [S, C]   where each position's key and value lie
    tokens     [S, C]   each seat's text, for penalties
    last_token [S]      the one that the next step starts from
    end_ids    [S, K]   what may not come before a minimal length
    marks      [n, V]   of rows with penalties or early end tokens, see triton_rules; made when first needed

A seat's rows are brought up to date while its prompt is computed; from then on each decode step adds to them itself.
There is one seat more than requests can have, for the padding rows of steps of a fixed size.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from skyrl_train.engines.embedded.request import Seats
from skyrl_train.engines.embedded.stops import NO_ID

Indices = npt.NDArray[np.intp]

MAX_END_IDS = 64
"""K. A request with more of them and a minimal length is sampled on the host."""


class DeviceSeats:
    def __init__(self, seats: Seats, *, no_slot: int, vocab_size: int, device: torch.device) -> None:
        self._seats = seats
        self._device = device
        self._vocab_size = vocab_size
        num_seats, context_len = seats.num_seats + 1, seats.slots.shape[1]
        self.slot_table = torch.full((num_seats, context_len), no_slot, dtype=torch.int32, device=device)
        # The padding's token goes behind its position, 0, whatever the context's length.
        self.tokens = torch.zeros((num_seats, context_len + 1), dtype=torch.int32, device=device)
        self.last_token = torch.zeros(num_seats, dtype=torch.int64, device=device)
        self.end_ids = torch.full((num_seats, MAX_END_IDS), NO_ID, dtype=torch.int32, device=device)
        self._marks: torch.Tensor | None = None

    @property
    def padding_seat(self) -> int:
        return self._seats.num_seats

    def marks(self) -> torch.Tensor:
        if self._marks is None:
            shape = (self._seats.num_seats, self._vocab_size)
            self._marks = torch.zeros(shape, dtype=torch.int32, device=self._device)
        return self._marks

    def bring_prompts(self, chunk_seats: list[int]) -> None:
        """Slots, text and end tokens of these seats as the host has them."""
        if not chunk_seats:
            return
        seats, rows = self._seats, self.to_device(np.asarray(chunk_seats))
        width = int(seats.allocated[chunk_seats].max())
        self.slot_table[rows, :width] = self.to_device(seats.slots[chunk_seats, :width])
        self.tokens[rows, :width] = self.to_device(seats.tokens[chunk_seats, :width])
        ids = seats.stops.ids[chunk_seats, :MAX_END_IDS]
        self.end_ids[rows] = NO_ID
        self.end_ids[rows, : ids.shape[1]] = self.to_device(ids)

    def bring_slots(self, decoding: Indices, position: npt.NDArray[np.int32]) -> None:
        """The slot of one position of each of these seats."""
        if len(decoding):
            slots = self.to_device(self._seats.slots[decoding, position])
            self.slot_table[self.to_device(decoding), self.to_device(position.astype(np.int64))] = slots

    def early(self) -> npt.NDArray[np.bool_]:
        """[seats]: whose next token may not end the answer. A token on its way counts."""
        seats = self._seats
        result: npt.NDArray[np.bool_] = seats.length + seats.in_flight < seats.min_len
        return result

    def needs_host(self) -> npt.NDArray[np.bool_]:
        """[seats]: whose tokens only the host's sampler can draw: grammars, processors, too many end tokens."""
        seats = self._seats
        if seats.stops.ids.shape[1] <= MAX_END_IDS:
            return seats.has_rule
        many = (seats.stops.ids != NO_ID).sum(1) > MAX_END_IDS
        result: npt.NDArray[np.bool_] = seats.has_rule | (many & self.early())
        return result

    def has_rules(self) -> npt.NDArray[np.bool_]:
        """[seats]: who has something for triton_rules to do."""
        table = self._seats.sampling
        result: npt.NDArray[np.bool_] = table.penalises | table.truncates | self.early()
        return result

    def to_device(self, array: npt.NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device, non_blocking=True)
