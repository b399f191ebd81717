"""Every contestant runs in the fastest setting that was found for it on this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch

from benchmarks.machine import num_cores

T = TypeVar("T")


def fastest_setting(
    make: Callable[..., T], axes: Mapping[str, Sequence[Any]], seconds: Callable[[T], float]
) -> Callable[[], T]:
    """One axis after another, from each axis's first value: the fastest value stays while the next axis is tried.

    Nothing is run where there is no choice.

    axes {"threads": (1, 2), "batch": (64, 16)} tries (1, 64), (2, 64) and, if 2 won, (2, 16).
    """
    if all(len(values) == 1 for values in axes.values()):
        return partial(make, **{name: values[0] for name, values in axes.items()})
    chosen = {name: values[0] for name, values in axes.items()}
    known: dict[tuple[Any, ...], float] = {}
    for axis, values in axes.items():
        for value in values:
            setting = {**chosen, axis: value}
            if (key := tuple(setting.values())) not in known:
                known[key] = seconds(make(**setting))
        chosen[axis] = min(values, key=lambda value: known[tuple({**chosen, axis: value}.values())])
    return partial(make, **chosen)


def threads_to_try(asked: Sequence[int], device: str) -> tuple[int, ...]:
    """As asked; else one thread and all cores. With a GPU the host's threads hardly matter: torch's default."""
    return tuple(asked) or ((torch.get_num_threads(),) if device == "cuda" else tuple(sorted({1, num_cores()})))
