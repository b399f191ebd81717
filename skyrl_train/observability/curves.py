"""Curves in characters: one line of blocks, or a plot of braille dots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

BLOCKS = "▁▂▃▄▅▆▇█"


def resample(values: Sequence[float], width: int) -> list[float]:
    """At most `width` values: means over equal stretches. [1, 3, 5, 7] at width 2 gives [2, 6]."""
    if len(values) <= width:
        return list(values)
    edges = [i * len(values) // width for i in range(width + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]


def sparkline(values: Sequence[float], width: int, *, low: float | None = None, high: float | None = None) -> str:
    """One block character a value, newest at the right; values that are not finite leave a gap."""
    shown = resample(values, width)
    low, high = _bounds(shown, low, high)
    return "".join(BLOCKS[round(_scale(v, low, high) * 7)] if math.isfinite(v) else " " for v in shown)


def plot(
    values: Sequence[float], width: int, height: int, *, low: float | None = None, high: float | None = None
) -> list[str]:
    """`height` lines of `width` braille cells, 2 x 4 dots each: a line through the values over the whole width."""
    points = [v for v in resample(values, 2 * width) if math.isfinite(v)]
    if not points:
        return [" " * width] * height
    low, high = _bounds(points, low, high)
    rows = 4 * height
    ys = [round((1 - _scale(v, low, high)) * (rows - 1)) for v in points]
    cells = [[0] * width for _ in range(height)]
    last = len(ys) - 1
    before = None
    for x in range(2 * width):
        # Fewer values than dots: straight lines between them.
        position = x * last / max(2 * width - 1, 1)
        left = min(math.floor(position), last)
        right = min(left + 1, last)
        y = round(ys[left] + (ys[right] - ys[left]) * (position - left))
        # Steep parts are filled from the last height on, so that the line has no holes.
        start, stop = (y, y) if before is None else (min(before, y), max(before, y))
        if before is not None and stop > start:
            start, stop = (start + 1, stop) if y > before else (start, stop - 1)
        for dot in range(start, stop + 1):
            cells[dot // 4][x // 2] |= _DOTS[x % 2][dot % 4]
        before = y
    return ["".join(chr(0x2800 + cell) for cell in row) for row in cells]


_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))


def _bounds(values: Sequence[float], low: float | None, high: float | None) -> tuple[float, float]:
    known = [v for v in values if math.isfinite(v)] or [0.0]
    return (min(known) if low is None else low), (max(known) if high is None else high)


def _scale(value: float, low: float, high: float) -> float:
    """Place in [0, 1]; a flat curve lies in the middle."""
    if high <= low:
        return 0.5
    return min(max((value - low) / (high - low), 0.0), 1.0)
