"""The SGLang that is installed in the engine's interpreter: its release, and the options of its command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

from skyrl_train.engines.server.probing import probe
from skyrl_train.engines.sglang.args import ARGUMENTS
from skyrl_train.engines.sglang.command import flag_of
from skyrl_train.errors import ConfigError

_PROBE = Path(__file__).with_name("probe.py")


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option of `sglang.launch_server`. `choices` None: any value."""

    flags: tuple[str, ...]
    choices: tuple[str, ...] | None
    default: str | int | float | bool | None
    is_switch: bool


@dataclass(frozen=True, kw_only=True)
class InstalledSGLang:
    """`options` by the field of ServerArgs that they set."""

    release: str
    options: Mapping[str, Option]


def read_installed(python: str, environment: Mapping[str, str] | None = None) -> InstalledSGLang:
    """Asks the interpreter, once for each state of it. `environment` is generator.engine_environment.

    Raises ConfigError.
    """
    return _read(python, tuple(sorted((environment or {}).items())))


def check_arguments(
    arguments: Mapping[str, Any],
    installed: InstalledSGLang,
    *,
    by_user: Callable[[str], bool] = lambda key: True,
) -> dict[str, Any]:
    """The arguments that this release takes. `by_user` says of a key whether the user set it.

    Raises ConfigError naming every key whose argument or value the release doesn't know; what no user asked for is
    left out instead.
    """
    taken, wrong = dict(arguments), []
    for field, value in arguments.items():
        problem = _problem(field, value, installed)
        if problem is None:
            continue
        keys = _keys(field)
        if keys and not any(map(by_user, keys)):
            del taken[field]
            continue
        name = " and ".join(keys) or f"generator.engine_init_kwargs.{field}"
        wrong.append(f"{name}: SGLang {installed.release} {problem}")
    if wrong:
        raise ConfigError("\n  - ".join(["the installed SGLang can't be started like this:", *wrong]))
    return taken


@lru_cache(maxsize=16)
def _read(python: str, environment: tuple[tuple[str, str], ...]) -> InstalledSGLang:
    found = probe(python, dict(environment), package="sglang", title="SGLang", script=_PROBE)
    return InstalledSGLang(
        release=found["release"],
        options={
            field: Option(
                flags=tuple(option["flags"]),
                choices=None if option["choices"] is None else tuple(option["choices"]),
                default=option["default"],
                is_switch=option["is_switch"],
            )
            for field, option in found["options"].items()
        },
    )


def _problem(field: str, value: Any, installed: InstalledSGLang) -> str | None:
    option = installed.options.get(field)
    if option is None:
        near = get_close_matches(field, installed.options, n=1)
        instead = _instead(field) or (f"the nearest is {near[0]}" if near else "leave it out")
        return f"has no {field}; {instead}"
    flag = flag_of(field)
    if flag not in option.flags:
        return f"has no option {flag} for {field}, it has {', '.join(option.flags)}"
    values = value if isinstance(value, (list, tuple)) else [value]
    unknown = [item for item in map(str, values) if option.choices is not None and item not in option.choices]
    if unknown and not option.is_switch:
        return f"knows no {field} {', '.join(unknown)}; it has {', '.join(option.choices or ())}"
    if value is True and not option.is_switch and option.choices is None and not isinstance(option.default, bool):
        return f"takes a value for {field}, found a bare true"
    return None


def _keys(field: str) -> list[str]:
    return list(dict.fromkeys(row.key for row in ARGUMENTS if row.field == field))


def _instead(field: str) -> str | None:
    return next((f"use {row.instead}" for row in ARGUMENTS if row.field == field and row.instead), None)
