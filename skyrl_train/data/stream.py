"""The resumable stream of prompts: each row once an epoch, in an order that the seed fixes.

The order is a function of (seed, epoch) alone, so the position is two integers and a resumed run goes on
with exactly the next row. Batches run on across the end of an epoch: no remainder is dropped.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler
from torchdata.stateful_dataloader import StatefulDataLoader

from skyrl_train.data.rows import PromptRow
from skyrl_train.errors import ConfigError
from skyrl_train.types import Prompt


class PromptStream:
    """Yields batches of prompts for ever; `state_dict` and `load_state_dict` move its position.

    A prompt's id is `<epoch>-<row>`, unique within the run.
    """

    def __init__(self, rows: Sequence[PromptRow], *, batch_size: int, seed: int, shuffle: bool = True) -> None:
        if len(rows) < batch_size:
            raise ConfigError(
                f"trainer.train_batch_size is {batch_size}, the training data has {len(rows)} rows; "
                "lower the first or add rows"
            )
        self.num_rows = len(rows)
        self.batch_size = batch_size
        with warnings.catch_warnings():
            # torchdata 0.11 calls a hook that torch 2.13 deprecates.
            warnings.filterwarnings("ignore", message=".*set_vital.*")
            self._loader = StatefulDataLoader(
                _Rows(rows),
                batch_size=batch_size,
                sampler=_EpochSampler(len(rows), seed=seed, shuffle=shuffle),
                collate_fn=list,
            )
        self._batches: Iterator[list[Prompt]] | None = None

    def num_steps(self, epochs: int) -> int:
        """Whole batches in `epochs` passes over the rows."""
        return epochs * self.num_rows // self.batch_size

    def next_batch(self) -> list[Prompt]:
        if self._batches is None:
            self._batches = iter(self._loader)
        return next(self._batches)

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = self._loader.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._loader.load_state_dict(dict(state))
        self._batches = None


def eval_prompts(rows: Sequence[PromptRow]) -> list[Prompt]:
    """The held-out rows as prompts, in order; their ids start with `eval-`."""
    return [_prompt(row, f"eval-{index}") for index, row in enumerate(rows)]


def _prompt(row: PromptRow, prompt_id: str) -> Prompt:
    return Prompt(
        prompt_id=prompt_id, messages=row.messages, environment=row.environment, target=row.target, extras=row.extras
    )


class _Rows(Dataset[Prompt]):
    """(epoch, row) -> Prompt."""

    def __init__(self, rows: Sequence[PromptRow]) -> None:
        self._rows = rows

    def __getitem__(self, index: tuple[int, int]) -> Prompt:
        epoch, row = index
        return _prompt(self._rows[row], f"{epoch}-{row}")

    def __len__(self) -> int:
        return len(self._rows)


class _EpochSampler(Sampler[tuple[int, int]]):
    """Endless (epoch, row) pairs. StatefulDataLoader saves and restores it through the state methods."""

    def __init__(self, num_rows: int, *, seed: int, shuffle: bool) -> None:
        self._num_rows = num_rows
        self._seed = seed
        self._shuffle = shuffle
        self._consumed = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        while True:
            epoch, first = divmod(self._consumed, self._num_rows)
            for row in self._order(epoch)[first:]:
                self._consumed += 1
                yield epoch, row

    def _order(self, epoch: int) -> list[int]:
        if not self._shuffle:
            return list(range(self._num_rows))
        # Two words into one seed: neighbouring (seed, epoch) pairs must not share an order.
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        order: list[int] = torch.randperm(self._num_rows, generator=generator).tolist()
        return order

    def state_dict(self) -> dict[str, int]:
        return {"consumed": self._consumed, "num_rows": self._num_rows, "seed": self._seed}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        if (state["num_rows"], state["seed"]) != (self._num_rows, self._seed):
            raise ConfigError(
                f"the checkpoint was made with {state['num_rows']} data rows and seed {state['seed']}, this run has "
                f"{self._num_rows} and {self._seed}: resume with the same, or start anew with trainer.resume_mode=none"
            )
        self._consumed = state["consumed"]
