"""The vLLM that is installed in the engine's interpreter: its release, and the options of its `serve`."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

from skyrl_train.engines.server.environment import as_process_environment, engine_environment
from skyrl_train.engines.vllm.args import ARGUMENTS
from skyrl_train.errors import ConfigError

PROBE_TIMEOUT_S = 180.0
"""Importing vLLM takes 6 s from a warm disk and a minute from a cold one."""
_PROBE = Path(__file__).with_name("probe.py")


@dataclass(frozen=True, kw_only=True)
class InstalledVLLM:
    """`options` by name without dashes; the values are what the option may be, None for anything."""

    release: str
    options: Mapping[str, tuple[str, ...] | None]


def read_installed(python: str, environment: Mapping[str, str] | None = None) -> InstalledVLLM:
    """Asks the interpreter, once for each state of its file. `environment` is generator.engine_environment.

    Raises ConfigError.
    """
    try:
        changed = Path(python).stat().st_mtime_ns
    except OSError as exc:
        raise ConfigError(
            f"generator.engine_python={python} can't be run ({exc.strerror}); name the interpreter that has vLLM"
        ) from exc
    return _read(python, changed, tuple(sorted((environment or {}).items())))


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
def _read(python: str, changed: int, environment: tuple[tuple[str, str], ...]) -> InstalledVLLM:
    try:
        # As text: a script's own folder comes first on the path, and ours has names that vLLM means otherwise.
        answer = subprocess.run(
            [python, "-c", _PROBE.read_text(encoding="utf-8")],
            capture_output=True,
            text=True,
            timeout=PROBE_TIMEOUT_S,
            check=False,
            cwd=Path(python).parent,
            env=as_process_environment(engine_environment(python, dict(environment))),
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise ConfigError(f"generator.engine_python={python}: its vLLM could not be read: {exc}") from exc
    start = answer.stdout.rfind('{"release"')
    if answer.returncode or start < 0:
        last = answer.stderr.strip().splitlines()[-1:] or ["no message"]
        raise ConfigError(
            f"generator.engine_python={python}: vLLM can't be imported there ({last[0]}); install it in that "
            "environment, or set what it needs in generator.engine_environment"
        )
    found = json.loads(answer.stdout[start:])
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
