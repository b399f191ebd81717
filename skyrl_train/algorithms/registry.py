"""Functions by name, or by dotted path for those that live outside this package."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import partial
from typing import Any, TypeVar

from skyrl_train.errors import ConfigError
from skyrl_train.extension import load_object

F = TypeVar("F", bound=Callable[..., Any])


def resolve(kind: str, table: Mapping[str, F], name: str) -> F:
    """`table[name]`, or what `package.module.attribute` names. Raises ConfigError saying what there is."""
    if name in table:
        return table[name]
    if "." not in name and ":" not in name:
        near = get_close_matches(name, table, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"no {kind} named {name!r}; {hint}known: {', '.join(table)}, or a dotted path to your own")
    found: F = load_object(name, wanted=kind)
    if not callable(found):
        raise ConfigError(f"{kind} {name!r} is a {type(found).__name__}, not a function")
    return found


def bind(function: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    """The function with those options bound that it has parameters for.

    The options of all algorithms live in one place of the configuration; each function names the ones it reads.
    """
    wanted = inspect.signature(function).parameters
    return partial(function, **{name: value for name, value in options.items() if name in wanted})


LOSS_GROUPS = ("sapo", "cispo", "clip_cov", "kl_cov")
"""Groups of trainer.algorithm whose keys are options of one loss."""

RENAMED = {"clip_cov.clip_ratio": "clip_cov_ratio"}
"""Where a key alone doesn't say whose it is."""


def flat_options(algorithm: Mapping[str, Any]) -> dict[str, Any]:
    """trainer.algorithm with the keys of the losses' groups at its top, so that a function can name them.

    {"gamma": 1, "clip_cov": {"clip_ratio": 0.1, "clip_cov_lb": 2}}  ->  and  clip_cov_ratio 0.1, clip_cov_lb 2
    """
    options = dict(algorithm)
    for group in LOSS_GROUPS:
        for key, value in algorithm.get(group, {}).items():
            name = RENAMED.get(f"{group}.{key}", key)
            assert name not in options, f"trainer.algorithm.{group}.{key}: {name} is an option already"
            options[name] = value
    return options
