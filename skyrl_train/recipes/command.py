"""The command line of a recipe: its keys, --help and --explain, what the machine lacks; then its own loop."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from skyrl_train.config.load import LoadedConfig, load_config
from skyrl_train.config.machine import capability_report, this_machine
from skyrl_train.entrypoints.run import DONE, REFUSED, run
from skyrl_train.errors import ConfigError
from skyrl_train.recipes.own_keys import explained, refuse_other_keys


def run_recipe(
    argv: Sequence[str] | None,
    body: Callable[[LoadedConfig, Path], int],
    *,
    applies: Sequence[str],
    recipe: str,
    manual: str | None,
    warn: Callable[[LoadedConfig], None] = lambda loaded: None,
) -> int:
    """Run `body` as the command line says; the exit code. `applies` are the keys that `recipe` reads.

    `warn` may say something of a configuration that is about to run.
    """
    try:
        loaded = load_config(sys.argv[1:] if argv is None else argv)
        refuse_other_keys(loaded, applies, recipe)
        if loaded.help or loaded.explain:
            print(manual if loaded.help else explained(loaded, applies))
            return DONE
        report = capability_report(loaded.config, machine=this_machine())
    except ConfigError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return REFUSED
    if report is not None:
        print(report, file=sys.stderr)
        return REFUSED
    warn(loaded)
    return run(loaded, body)
