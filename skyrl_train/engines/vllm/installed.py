"""The vLLM that is installed in the engine's interpreter: its release, and the options of its `serve`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

from skyrl_train.engines.server.probing import probe
from skyrl_train.engines.vllm.args import ARGUMENTS
from skyrl_train.errors import ConfigError

_PROBE = Path(__file__).with_name("probe.py")


@dataclass(frozen=True, kw_only=True)
class InstalledVLLM:
    """`options` by name without dashes; the values are what the option may be, None for anything."""

    release: str
    options: Mapping[str, tuple[str, ...] | None]


def read_installed(python: str, environment: Mapping[str, str] | None = None) -> InstalledVLLM:
    """Asks the interpreter, once for each state of it. `environment` is generator.engine_environment.

    Raises ConfigError.
    """
    return _read(python, tuple(sorted((environment or {}).items())))


def check_options(
    options: Mapping[str, Any], installed: InstalledVLLM, *, by_user: Callable[[str], bool] = lambda key: True
) -> None:
    """Raises ConfigError naming every key whose option or value this release doesn't know. `by_user` says of a key
    whether the user set it; an option that nobody asked for is our own mistake, and said as such.
    """
    wrong = []
    for name, value in options.items():
        problem = _problem(name, value, installed)
        if problem is None:
            continue
        keys = [key for key in _keys(name) if by_user(key)]
        wrong.append(f"{' and '.join(keys) or f'option --{name}'}: vLLM {installed.release} {problem}")
    if wrong:
        raise ConfigError("\n  - ".join(["the installed vLLM can't be started like this:", *wrong]))


@lru_cache(maxsize=16)
def _read(python: str, environment: tuple[tuple[str, str], ...]) -> InstalledVLLM:
    found = probe(python, dict(environment), package="vllm", title="vLLM", script=_PROBE)
    return InstalledVLLM(
        release=found["release"].partition("+")[0],
        options={name: None if choices is None else tuple(choices) for name, choices in found["options"].items()},
    )


def _problem(name: str, value: Any, installed: InstalledVLLM) -> str | None:
    flag = f"no-{name}" if value is False else name
    if flag not in installed.options:
        near = get_close_matches(flag, installed.options, n=1)
        return f"has no option --{flag}; " + (f"the nearest is --{near[0]}" if near else "leave it out")
    choices = installed.options[flag]
    if choices is None or isinstance(value, (bool, dict)):
        return None
    values = value if isinstance(value, (list, tuple)) else [value]
    unknown = [item for item in map(str, values) if item not in choices]
    return f"knows no --{name} {', '.join(unknown)}; it has {', '.join(choices)}" if unknown else None


def _keys(option: str) -> list[str]:
    keys = list(dict.fromkeys(row.key for row in ARGUMENTS if row.option == option))
    return keys or [f"generator.engine_init_kwargs.{option.replace('-', '_')}"]
