"""Which rows of a step use which adapter, and what that adds to a linear map's output.

The runner calls `select` before each forward; the twin's linear maps look at `form`, and add nothing where it is None.
Of three ways to compute the same sum, a step takes the cheapest:

    alone      one adapter     y += s (x A^T * m) B^T              m [T, 1]: 0 for rows without it; none if all have it
    together   K of them       rows gathered once into K equal lots, padded; two batched products
    parts      K of them       lot by lot; where lots are too unequal to be padded (a long prompt, short answers)

Shapes: T rows of a step, K adapters of the batch, r their rank (padded with zeros to the greatest), L rows of the
longest lot.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from skyrl_train.engines.embedded.adapters.adapter import LoraAdapter, LowRank
from skyrl_train.engines.embedded.adapters.places import Places

LOT_COST = 16
"""What one lot by itself costs beside its products, in rows."""

MASKED_ROWS = 64
"""Up to so many rows, computing all of them and weighing some with 0 is cheaper than picking those."""


class Form(Protocol):
    def add(self, site: str, x: torch.Tensor, y: torch.Tensor) -> None:
        """y [T, out] += what the adapters make of x [T, in]; in place."""
        ...


class RowAdapters:
    """The one object between the runner and the linear maps."""

    def __init__(self, places: Places) -> None:
        self.form: Form | None = None
        self._places = places
        self._stacks = _Stacks(places)

    def select(self, row_seats: npt.NDArray[np.int32]) -> None:
        """For the next forward: row t belongs to the request in seat row_seats[t]."""
        self.form = None if not self._places.num_adapted else self._chosen(row_seats)

    def _chosen(self, row_seats: npt.NDArray[np.int32]) -> Form | None:
        adapters = self._places.adapters
        place = self._places.of_seat[row_seats]
        counts = np.bincount(place, minlength=len(adapters))
        used = [k for k in np.nonzero(counts)[0].tolist() if adapters[k] is not None]
        if not used:
            return None
        total, num_used = len(place), int(counts[used].sum())
        if len(used) == 1:
            (adapter,) = (adapters[k] for k in used)
            assert adapter is not None
            if num_used == total:
                return Alone(adapter=adapter, num_rows=total)
            if total <= MASKED_ROWS or 2 * num_used >= total:
                return Alone(adapter=adapter, num_rows=total, mask=torch.from_numpy(place == used[0])[:, None])
        longest = int(counts[used].max())
        if self._stacks.num_adapters * longest <= num_used + LOT_COST * len(used):
            return self._together(place, used, longest)
        return Parts(num_rows=total, lots=tuple(_lot(adapters[k], np.nonzero(place == k)[0]) for k in used))

    def _together(self, place: npt.NDArray[np.int32], used: Sequence[int], longest: int) -> Form:
        order = np.argsort(place, kind="stable")
        order = order[np.isin(place[order], used)]
        lot = self._stacks.lot_of_place[place[order]]
        starts = np.searchsorted(lot, np.arange(self._stacks.num_adapters))
        at = lot * longest + np.arange(len(order)) - starts[lot]
        gathered = np.zeros(self._stacks.num_adapters * longest, dtype=np.int64)
        gathered[at] = order
        everyone = len(order) == len(place)
        if everyone:
            back = np.empty(len(place), dtype=np.int64)
            back[order] = at
        else:
            back = at
        return Together(
            stacks=self._stacks,
            num_rows=len(place),
            gathered=torch.from_numpy(gathered),
            back=torch.from_numpy(back),
            rows=None if everyone else torch.from_numpy(order),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Alone:
    """One adapter; `mask` [T, 1] where some rows are without it."""

    adapter: LoraAdapter
    num_rows: int
    mask: torch.Tensor | None = None

    def add(self, site: str, x: torch.Tensor, y: torch.Tensor) -> None:
        pair = self.adapter.pairs.get(site)
        if pair is None:
            return
        assert len(x) == self.num_rows, (site, x.shape, self.num_rows)
        inner = nn.functional.linear(x, pair.low)
        if self.mask is not None:
            inner *= self.mask
        y.addmm_(inner, pair.high, alpha=pair.scale)


@dataclass(frozen=True, kw_only=True, eq=False)
class Together:
    """`gathered` [K * L]: the rows by lot, row 0 as padding. `back`: where in the lots the result of a row is, for
    each of `rows`, or of all rows where that is None.
    """

    stacks: _Stacks
    num_rows: int
    gathered: torch.Tensor
    back: torch.Tensor
    rows: torch.Tensor | None

    def add(self, site: str, x: torch.Tensor, y: torch.Tensor) -> None:
        stack = self.stacks.at(site)
        if stack is None:
            return
        assert len(x) == self.num_rows, (site, x.shape, self.num_rows)
        low, high = stack
        lots = x.index_select(0, self.gathered).view(len(low), -1, x.shape[1])
        change = torch.bmm(torch.bmm(lots, low), high).view(len(self.gathered), -1).index_select(0, self.back)
        if self.rows is None:
            y += change
        else:
            y.index_add_(0, self.rows, change)


@dataclass(frozen=True, kw_only=True, eq=False)
class Parts:
    """(adapter, its rows): a slice where they are neighbours."""

    num_rows: int
    lots: tuple[tuple[LoraAdapter, slice | torch.Tensor], ...]

    def add(self, site: str, x: torch.Tensor, y: torch.Tensor) -> None:
        assert len(x) == self.num_rows, (site, x.shape, self.num_rows)
        for adapter, rows in self.lots:
            pair = adapter.pairs.get(site)
            if pair is None:
                continue
            if isinstance(rows, slice):
                y[rows].addmm_(nn.functional.linear(x[rows], pair.low), pair.high, alpha=pair.scale)
            else:
                inner = nn.functional.linear(x.index_select(0, rows), pair.low)
                y.index_add_(0, rows, inner @ pair.high, alpha=pair.scale)


def _lot(adapter: LoraAdapter | None, rows: npt.NDArray[np.int64]) -> tuple[LoraAdapter, slice | torch.Tensor]:
    assert adapter is not None
    first, last = int(rows[0]), int(rows[-1])
    return adapter, slice(first, last + 1) if last - first + 1 == len(rows) else torch.from_numpy(rows)


class _Stacks:
    """The tensors of all adapters that have a place, one upon the other; made when they are asked for.

    low [K, in, r] (a view of [K, r, in]), high [K, r, out], scaled.
    """

    def __init__(self, places: Places) -> None:
        self._places = places
        self._made_at = -1
        self._adapters: list[LoraAdapter] = []
        self._lot_of_place = np.zeros(0, dtype=np.int64)
        self._stacks: dict[str, tuple[torch.Tensor, torch.Tensor] | None] = {}

    @property
    def num_adapters(self) -> int:
        self._refresh()
        return len(self._adapters)

    @property
    def lot_of_place(self) -> npt.NDArray[np.int64]:
        self._refresh()
        return self._lot_of_place

    def at(self, site: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """None where no adapter changes this module."""
        if site not in self._stacks:
            self._stacks[site] = self._stacked([adapter.pairs.get(site) for adapter in self._adapters])
        return self._stacks[site]

    def _refresh(self) -> None:
        if self._made_at == self._places.num_changes:
            return
        self._made_at = self._places.num_changes
        has_one = np.array([adapter is not None for adapter in self._places.adapters])
        self._adapters = [adapter for adapter in self._places.adapters if adapter is not None]
        self._lot_of_place = np.cumsum(has_one) - 1
        self._stacks = {}

    @staticmethod
    def _stacked(pairs: Sequence[LowRank | None]) -> tuple[torch.Tensor, torch.Tensor] | None:
        known = [pair for pair in pairs if pair is not None]
        if not known:
            return None
        rank = max(len(pair.low) for pair in known)
        low = known[0].low.new_zeros(len(pairs), rank, known[0].low.shape[1])
        high = known[0].high.new_zeros(len(pairs), rank, known[0].high.shape[1])
        for k, pair in enumerate(pairs):
            if pair is not None:
                low[k, : len(pair.low)] = pair.low
                torch.mul(pair.high, pair.scale, out=high[k, : len(pair.high)])
        return low.transpose(1, 2), high


@dataclass(kw_only=True, eq=False)
class Witness:
    """A form that adds nothing and notes which maps were reached."""

    seen: set[str] = field(default_factory=set)

    def add(self, site: str, x: torch.Tensor, y: torch.Tensor) -> None:
        self.seen.add(site)


class _NotSelected:
    def add(self, site: str, x: torch.Tensor, y: torch.Tensor) -> None:
        raise AssertionError(f"{site} is computed, and nobody said which rows have which adapter: call select first")


NOT_SELECTED: Form = _NotSelected()
"""Between two steps: a forward that was not told of would be answered by the plain model without a word."""


def adapted_class(kind: type[nn.Module]) -> type[nn.Module]:
    """A linear map's class in the twin, which adds the adapters' part to what it computes.

    Its instances have `row_adapters` and `adapter_site` in their __dict__.
    """
    plain: Callable[[Any, torch.Tensor], torch.Tensor] = kind.forward

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = plain(self, x)
        form = self.row_adapters.form
        if form is not None:
            form.add(self.adapter_site, x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1]))
        return y

    return type(f"Adapted{kind.__name__}", (kind,), {"forward": forward, "__module__": kind.__module__})


class AdaptedMaps:
    """Which modules of one model are `sites`, and what becomes of them in its twin."""

    def __init__(self, sites: Collection[str], rows: RowAdapters) -> None:
        self.rows = rows
        self._sites = frozenset(sites)
        self._site_of: dict[int, str] = {}
        self._classes: dict[type[nn.Module], type[nn.Module]] = {}

    def __contains__(self, module: nn.Module) -> bool:
        return id(module) in self._site_of

    def site_of(self, module: nn.Module) -> str | None:
        return self._site_of.get(id(module))

    def find(self, model: nn.Module) -> None:
        """Before a twin of `model` is built."""
        self._site_of = {id(module): name for name, module in model.named_modules() if name in self._sites}

    def adopt(self, copy: nn.Module, module: nn.Module) -> None:
        """`copy` is the twin of `module`, which is one of them."""
        kind = type(copy)
        if kind not in self._classes:
            self._classes[kind] = adapted_class(kind)
        copy.__class__ = self._classes[kind]
        copy.__dict__ |= {"row_adapters": self.rows, "adapter_site": self._site_of[id(module)]}
