"""Guesses of an EAGLE head: a chain, or a tree that grows where the head is surest.

    follow    keep the model's (fused) hidden states under the slots of its rows; a row's old key is worthless now
    propose   keys of the known tokens that have none yet, then `num_steps` guesses from the head's own hidden states

A request's keys are computed when it is first asked for guesses, and then as it grows. `_has_key` says for each slot
whether the head's key of that token is there (see rows): a prefix that another request has brought is not computed
again, and one that nobody needed guesses for costs nothing. Wrong contents would cost accepted guesses, never a wrong
answer: what the model says is what counts.

Guesses of a request with a temperature: the word at the request's own uniform number in the head's distribution, which
is the model's next token wherever the two distributions agree there. Greedy: the best word.

Shapes: n seats, T rows, H hidden size, W words of the head, K guesses at most, B branches.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from skyrl_train.engines.embedded.attention import AttentionBackend, PagedContext
from skyrl_train.engines.embedded.backends import make_backend
from skyrl_train.engines.embedded.config import AttentionName, KVShape
from skyrl_train.engines.embedded.drafts.base import Drafts, FollowedRows, Indices, Ints
from skyrl_train.engines.embedded.drafts.eagle.head import Head, Target, logits_of, word_ids
from skyrl_train.engines.embedded.drafts.eagle.rows import guess_rows, known_rows
from skyrl_train.engines.embedded.drafts.eagle.tree import GrowingTree, near_sample
from skyrl_train.engines.embedded.kv_pool import KVPool
from skyrl_train.engines.embedded.request import Seats
from skyrl_train.engines.embedded.sampler import NativePick, Pick, pick, truncated
from skyrl_train.engines.embedded.twin import InferenceModel
from skyrl_train.engines.embedded.uniforms import uniforms

Longs = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class EagleSettings:
    """`num_steps` levels of guesses; with `topk` 1 a chain of them, else a tree of which `max_guesses` are kept."""

    num_steps: int
    topk: int
    max_guesses: int

    @property
    def num_spare(self) -> int:
        """Slots beyond the model's that one request needs: its last known token's, and those of guesses."""
        return 1 + (self.num_steps - 1) * self.topk


class EagleDrafter:
    """See base.Drafter."""

    has_weights = True

    def __init__(
        self,
        head: Head,
        target: Target,
        *,
        settings: EagleSettings,
        num_slots: int,
        num_seats: int,
        native: ctypes.CDLL | None = None,
        attention_backend: AttentionName = "auto",
        packs_weights: bool = False,
        max_rows: int = 4096,
        words: torch.Tensor | None = None,
    ) -> None:
        """`words` [W] rising: ids of the model that a head without a vocabulary of its own guesses among."""
        self.name = head.algorithm
        self.max_tokens = settings.max_guesses
        self.taps = head.taps
        self._head = InferenceModel(head, native, packs_weights=packs_weights)
        self._target = target
        self._settings = settings
        self._words = words if words is not None else word_ids(head)
        self._hot = words
        self._logits = logits_of(self._head.twin, target, words)  # type: ignore[arg-type]
        parameter = next(head.parameters())
        self._shape = kv_shape(head, parameter.dtype)
        self._pool = KVPool({0: self._shape}, num_slots + 1 + num_seats * settings.num_spare, parameter.device)
        self.pools: tuple[KVPool, ...] = (self._pool,)
        self.models: tuple[InferenceModel, ...] = (self._head,)
        self._backend: AttentionBackend = make_backend(attention_backend, parameter.device, {0: self._shape}, native)
        self._pick: Pick = pick if native is None else NativePick(native)
        self._num_slots = num_slots
        self._max_rows = max_rows
        self._hidden = torch.zeros(num_slots + 1, head.config.hidden_size, dtype=parameter.dtype)
        self._has_key = np.zeros(num_slots + 1, dtype=bool)
        self._tenancy = np.full(num_seats, -1, dtype=np.int64)
        self._done = np.zeros(num_seats, dtype=np.int64)
        """Tokens at positions [1, _done) have their keys, for the occupant `_tenancy` of the seat."""

    @property
    def head(self) -> Head:
        """Its weights may be written in place; call `weights_changed` after that."""
        original = self._head.original
        return original  # type: ignore[return-value]

    # -- base.Drafter

    def follow(self, rows: FollowedRows) -> None:
        assert rows.hidden is not None
        slots = rows.batch.row_slots
        with torch.inference_mode():
            self._hidden[slots] = self._head.twin.fuse(rows.hidden)  # type: ignore[operator]
        self._has_key[slots.numpy()] = False

    def weights_changed(self) -> None:
        self._head.weights_changed()
        self._logits = logits_of(self._head.twin, self._target, self._hot)  # type: ignore[arg-type]
        self._has_key[:] = False
        self._tenancy[:] = -1

    def propose(self, seats: Seats, chosen: Indices, room: Ints) -> Drafts:
        if not len(chosen) or not room.max():
            nothing = np.zeros((len(chosen), 1), dtype=np.int32)
            return Drafts(tokens=nothing, parents=nothing - 1, counts=np.zeros(len(chosen), dtype=np.int32))
        with torch.inference_mode():
            guessing = _Guessing(seats, chosen, np.minimum(room, self.max_tokens), self._settings, self._num_slots)
            hidden, logits = self._catch_up(seats, chosen, guessing)
            return (
                self._tree(guessing, hidden, logits)
                if self._settings.topk > 1
                else self._chain(guessing, hidden, logits)
            )

    def check_integrity(self, seats: Seats) -> None:
        """Assert that what a seat counts as done has its keys. For tests, between steps."""
        for seat in np.nonzero(self._tenancy == seats.tenancy)[0]:
            done = int(self._done[seat])
            assert done < seats.length[seat], (seat, done, seats.length[seat])
            assert self._has_key[seats.slots[seat, 1:done]].all(), f"seat {seat} lacks keys of known tokens"

    # -- known tokens

    def _catch_up(self, seats: Seats, chosen: Indices, guessing: _Guessing) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the rows of known tokens that have no keys; hidden states [n, H] and logits [n, W] of the last."""
        length = guessing.length
        first = np.empty(len(chosen), dtype=np.int64)
        newcomer = self._tenancy[chosen] != seats.tenancy[chosen]
        for i in np.nonzero(newcomer)[0]:
            slots = seats.slots[chosen[i], 1 : length[i] - 1]
            missing = ~self._has_key[slots]
            first[i] = 1 + (int(missing.argmax()) if missing.any() else len(slots))
            # A sibling that comes next in this very batch finds them: all keys are written before any row attends.
            self._has_key[slots] = True
        first[~newcomer] = self._done[chosen[~newcomer]]
        self._tenancy[chosen], self._done[chosen] = seats.tenancy[chosen], length - 1
        width = int(length.max())
        tokens, slots = seats.tokens[chosen, :width], seats.slots[chosen, :width]
        owner_slots = slots[np.arange(width)[None] < (length - 1)[:, None]]
        self._has_key[owner_slots] = True
        hidden, logits_from = [], []
        for begin, end in _blocks(length - first, self._max_rows):
            part = slice(begin, end)
            known = known_rows(
                tokens[part], slots[part], first[part], length[part], guessing.spare[part, 0], guessing.table[part]
            )
            out, for_logits = self._forward(
                known.token_ids,
                self._hidden[torch.from_numpy(known.hidden_slots)],
                PagedContext(self._backend, self._pool, known.batch),
                known.batch.row_positions,
            )
            hidden.append(out[known.last_rows])
            logits_from.append(for_logits[known.last_rows])
        return torch.cat(hidden), self._logits(torch.cat(logits_from)).float()

    # -- guesses

    def _chain(self, guessing: _Guessing, hidden: torch.Tensor, logits: torch.Tensor) -> Drafts:
        guesses: list[Longs] = []
        while True:
            words = self._guess(guessing, len(guesses), logits)
            guesses.append(self._ids(words))
            step = len(guesses)
            if step == guessing.num_steps:
                break
            hidden, logits = self._go_on(guessing, step, guesses[-1], hidden)
        tokens = np.stack(guesses, axis=1)
        parents = np.broadcast_to(np.arange(-1, tokens.shape[1] - 1, dtype=np.int32), tokens.shape)
        return Drafts(
            tokens=tokens.astype(np.int32),
            parents=np.ascontiguousarray(parents),
            counts=np.minimum(guessing.room, tokens.shape[1]).astype(np.int32),
        )

    def _tree(self, guessing: _Guessing, hidden: torch.Tensor, logits: torch.Tensor) -> Drafts:
        tree = GrowingTree(self._settings.topk)
        for step in range(1, guessing.num_steps + 1):
            level = tree.grow(self._chances(guessing, step - 1, logits))
            if step == guessing.num_steps:
                break
            rows = torch.from_numpy(guessing.branch(level.branches.numpy()))
            tokens = self._ids(level.words.flatten().numpy())
            hidden, logits = self._go_on(guessing, step, tokens, hidden[rows])
            logits = logits.view(*level.words.shape, -1)
        words, parents, counts = tree.keep(guessing.room)
        return Drafts(
            tokens=self._ids(words).astype(np.int32), parents=parents.astype(np.int32), counts=counts.astype(np.int32)
        )

    def _go_on(
        self, guessing: _Guessing, step: int, tokens: Longs, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of the guesses `tokens` [n * B] of level `step`, from the hidden states of what each follows."""
        batch = guess_rows(*guessing.rows(step))
        context = PagedContext(self._backend, self._pool, batch)
        hidden, for_logits = self._forward(tokens, hidden, context, batch.row_positions)
        return hidden, self._logits(for_logits).float()

    def _forward(
        self, token_ids: Longs, hidden: torch.Tensor, context: PagedContext, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        embeds = self._target.embed(torch.from_numpy(token_ids))
        out, for_logits = self._head(
            embeds=embeds[None], hidden=hidden[None], position_ids=positions[None], attention_context=context
        )
        return out[0], for_logits[0]

    def _guess(self, guessing: _Guessing, index: int, logits: torch.Tensor) -> Longs:
        """A word for each request [n], guess number `index`; logits [n, W]."""
        seats, chosen = guessing.seats, guessing.chosen
        if seats.sampling.truncates[chosen].any():
            logits = truncated(logits, seats.sampling, chosen)
        words, _ = self._pick(logits, logits, seats.sampling.temperature[chosen], guessing.uniforms(index))
        return np.clip(words, 0, logits.shape[1] - 1)  # logits that are not finite have no place: any guess will do

    def _chances(self, guessing: _Guessing, index: int, logits: torch.Tensor) -> torch.Tensor:
        """[n, ..., W]: how likely each word is the model's at guess number `index`."""
        temperature = guessing.seats.sampling.temperature[guessing.chosen]
        per_request = (-1, *(1,) * (logits.dim() - 1))
        divisor = torch.from_numpy(np.where(temperature == 0, np.float32(1), temperature)).view(per_request)
        chances = (logits / divisor).softmax(-1)
        if not temperature.any():
            return chances
        uniform = torch.from_numpy(guessing.uniforms(index)).view(per_request[:-1]).expand(chances.shape[:-1])
        greedy = torch.from_numpy(temperature == 0).view(per_request)
        return torch.where(greedy, chances, near_sample(chances, uniform))

    def _ids(self, words: Longs) -> Longs:
        return words if self._words is None else self._words.numpy()[words]


class _Guessing:
    """One round of guesses: where the keys of guesses go, and through which slots each branch attends.

    `table` [n * B, C]: the head's slots by position, one row a branch. `spare` [n, num_spare].
    """

    def __init__(self, seats: Seats, chosen: Indices, room: Ints, settings: EagleSettings, num_slots: int) -> None:
        self.seats, self.chosen, self.room = seats, chosen, room
        self.length = seats.length[chosen].astype(np.int64)
        self.num_steps = min(settings.num_steps, int(room.max()))
        self._topk = settings.topk
        n, width = len(chosen), int(self.length.max())
        self.spare = num_slots + 1 + np.arange(n * settings.num_spare, dtype=np.int64).reshape(n, -1)
        self.table = np.zeros((n, width + self.num_steps), dtype=np.int32)
        self.table[:, : width - 1] = seats.slots[chosen, 1:width]
        self.table[np.arange(n), self.length - 2] = self.spare[:, 0]

    def uniforms(self, index: int) -> npt.NDArray[np.float64]:
        """The numbers [n] that the model's tokens after `index` guesses are drawn with."""
        position = self.length + index - self.seats.prompt_len[self.chosen]
        return uniforms(self.seats.sampling.key[self.chosen], position)

    def branch(self, branches: Longs) -> Longs:
        """From now on there are B branches a request, each goes on from one of those before [n, B]: its row there."""
        num_before = len(self.table) // len(self.length)
        rows: Longs = (branches + np.arange(len(self.length))[:, None] * num_before).ravel()
        self.table = self.table[rows]
        return rows

    def rows(self, step: int) -> tuple[Longs, Longs, Ints]:
        """For the guesses of level `step`: their rows' positions [n * B], key slots [n * B], and the table."""
        num_branches = len(self.table) // len(self.length)
        begin = 1 + (step - 1) * self._topk
        slots = np.ascontiguousarray(self.spare[:, begin : begin + num_branches]).ravel()
        positions = np.repeat(self.length - 2 + step, num_branches)
        self.table[np.arange(len(positions)), positions] = slots
        return positions, slots, self.table


def kv_shape(head: Head, dtype: torch.dtype) -> KVShape:
    config = head.config
    return KVShape(
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads or config.num_attention_heads,
        head_dim=config.head_dim or config.hidden_size // config.num_attention_heads,
        dtype=dtype,
    )


def _blocks(counts: Longs, max_rows: int) -> list[tuple[int, int]]:
    """Requests [begin, end) of at most `max_rows` rows together, or of one request."""
    blocks, begin, rows = [], 0, 0
    for i, count in enumerate(counts.tolist()):
        if rows and rows + count > max_rows:
            blocks.append((begin, i))
            begin, rows = i, 0
        rows += count
    return [*blocks, (begin, len(counts))]
