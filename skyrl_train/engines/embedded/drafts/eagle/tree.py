"""A tree of guesses that grows where the head is surest (EAGLE-2, arXiv:2406.16858, section 4).

    level 1   the best `topk` words after the last token
    level d   each of the best `topk` guesses of level d - 1, by the product of probabilities along its path, gets its
              best `topk` words
    kept      the best guesses of all levels, by the same product: a parent is never worse than its child

Shapes: n requests, B = topk branches that go on, C candidates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

ROOT = -1
WINDOW = 0.1
"""Half the width around a uniform number within which a word's share of probability counts; see `near_sample`."""

Longs = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Level:
    """The branches that go on: their words, hidden states' rows in the level before, and scores."""

    words: torch.Tensor  # [n, B]
    branches: torch.Tensor  # [n, B] in [0, B): the branch of the level before that each follows; 0 in level 1
    scores: torch.Tensor  # [n, B] log of the product


class GrowingTree:
    """Candidates of n requests, level by level."""

    def __init__(self, topk: int) -> None:
        self._topk = topk
        self._words: list[torch.Tensor] = []
        self._parents: list[torch.Tensor] = []
        self._scores: list[torch.Tensor] = []
        self._going_on: torch.Tensor | None = None
        self._level: Level | None = None

    def grow(self, chances: torch.Tensor) -> Level:
        """Add a level: `chances` [n, W] of the words after the root, then [n, B, W] after the branches that go on."""
        topk = self._topk
        if self._level is None:
            best = chances.log().topk(min(topk, chances.shape[-1]), dim=-1)
            scores, words = best.values, best.indices
            parents = torch.full_like(words, ROOT)
            self._add(words, parents, scores)
            self._going_on = torch.arange(words.shape[1]).expand_as(words)
            self._level = Level(words=words, branches=torch.zeros_like(words), scores=scores)
            return self._level
        assert self._going_on is not None
        num_before = sum(words.shape[1] for words in self._words)
        best = chances.log().topk(min(topk, chances.shape[-1]), dim=-1)  # [n, B, B]
        num_branches = best.indices.shape[2]
        scores = (self._level.scores[:, :, None] + best.values).flatten(1)
        words = best.indices.flatten(1)
        self._add(words, self._going_on.repeat_interleave(num_branches, dim=1), scores)
        chosen = scores.topk(min(topk, scores.shape[1]), dim=-1).indices
        self._going_on = num_before + chosen
        self._level = Level(
            words=words.gather(1, chosen), branches=chosen // num_branches, scores=scores.gather(1, chosen)
        )
        return self._level

    def keep(self, room: npt.NDArray[np.integer]) -> tuple[Longs, Longs, Longs]:
        """The best `room` [n] candidates of each request: words [n, M], parents [n, M], counts [n].

        Parents come before their children; what can't be drawn at all is left out; what stands behind is filler.
        """
        words, parents, scores = (torch.cat(x, dim=1).numpy() for x in (self._words, self._parents, self._scores))
        num_candidates = words.shape[1]
        counts = np.minimum(np.isfinite(scores).sum(1), room)
        # Stable: of equals the earlier goes first, and parents are earlier.
        order = np.argsort(-scores, axis=1, kind="stable")
        order[np.arange(num_candidates) >= counts[:, None]] = num_candidates
        kept = np.sort(order, axis=1)[:, : max(int(counts.max()), 1)]
        filler = kept == num_candidates
        kept = np.where(filler, 0, kept)
        place = np.full(words.shape, ROOT, dtype=np.int64)
        rows, columns = np.nonzero(~filler)
        place[rows, kept[rows, columns]] = columns
        parent = np.take_along_axis(parents, kept, axis=1)
        parent_place = np.where(parent == ROOT, ROOT, np.take_along_axis(place, np.maximum(parent, 0), axis=1))
        return np.take_along_axis(words, kept, axis=1), np.where(filler, ROOT, parent_place), counts

    def _add(self, words: torch.Tensor, parents: torch.Tensor, scores: torch.Tensor) -> None:
        self._words.append(words)
        self._parents.append(parents)
        self._scores.append(scores)


def near_sample(chances: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """How likely each word is what the model will draw at `uniform` [n, 1...]; chances [n, ..., W] -> the same shape.

    The model draws by the inverse of its cumulative distribution, which is near the head's: only words whose interval
    is near the number can be drawn. Each counts with its share of the window around it.
    """
    upper = chances.double().cumsum(-1)
    lower = upper - chances
    begin, end = (uniform - WINDOW).clamp(min=0)[..., None], (uniform + WINDOW).clamp(max=1)[..., None]
    inside = torch.minimum(upper, end) - torch.maximum(lower, begin)
    return (inside.clamp(min=0) / (end - begin)).float()
