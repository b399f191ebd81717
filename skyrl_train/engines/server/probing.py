"""What the interpreter of an engine has, asked once for each state of it.

Importing an engine takes seconds from a warm disk and a minute from a cold one; naming its release takes a tenth of a
second. So the answer of the long question is kept under the answer of the short one.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from skyrl_train.cache import cache_root
from skyrl_train.engines.server.environment import as_process_environment, engine_environment
from skyrl_train.errors import ConfigError

PROBE_TIMEOUT_S = 180.0

_WHICH = """
import importlib.metadata as metadata, os, sys
found = metadata.distribution({package!r})
print(found.version, found.locate_file("."), os.stat(found.locate_file({package!r})).st_mtime_ns, sys.version)
"""


def probe(python: str, environment: Mapping[str, str], *, package: str, title: str, script: Path) -> dict[str, Any]:
    """What `script` prints as one JSON object that begins with "release", run by `python` with `environment` over ours.

    Raises ConfigError naming generator.engine_python.
    """
    variables = as_process_environment(engine_environment(python, environment))
    if not Path(python).exists():
        raise ConfigError(
            f"generator.engine_python={python} can't be run (No such file or directory); name the interpreter that has "
            f"{title}"
        )
    which = _run([python, "-c", _WHICH.format(package=package)], variables, python, title)
    kept = None
    if which is not None and which.returncode == 0:
        state = json.dumps([python, sorted(environment.items()), which.stdout, script.read_text(encoding="utf-8")])
        kept = cache_root() / "engines" / f"{package}-{hashlib.sha256(state.encode()).hexdigest()[:24]}.json"
        if kept.is_file():
            known: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
            return known
    # As text: a script's own folder comes first on the path, and ours has names that engines mean otherwise.
    answer = _run([python, "-c", script.read_text(encoding="utf-8")], variables, python, title)
    start = answer.stdout.rfind('{"release"')
    if answer.returncode or start < 0:
        last = answer.stderr.strip().splitlines()[-1:] or ["no message"]
        raise ConfigError(
            f"generator.engine_python={python}: {title} can't be imported there ({last[0]}); install it in that "
            "environment, or set what it needs in generator.engine_environment"
        )
    found: dict[str, Any] = json.loads(answer.stdout[start:])
    if kept is not None:
        _keep(kept, found)
    return found


def _run(command: list[str], variables: Mapping[str, str], python: str, title: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=PROBE_TIMEOUT_S,
            check=False,
            cwd=Path(python).parent,
            env=dict(variables),
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise ConfigError(f"generator.engine_python={python}: its {title} could not be read: {exc}") from exc


def _keep(path: Path, found: Mapping[str, Any]) -> None:
    """Beside and renamed; a cache that can't be written costs the next run the question again, and nothing else."""
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(found), encoding="utf-8")
        beside.rename(path)
    except OSError:
        beside.unlink(missing_ok=True)
