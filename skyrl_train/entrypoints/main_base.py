"""The main job: `python -m skyrl_train.entrypoints.main_base [--config-path DIR --config-name NAME] [key=value ...]`.

Exit codes: 0 done; 2 the configuration can't run as written or not on this machine, nothing was started;
3 the run failed and says why; 130 stopped by Ctrl-C, the same command goes on.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from skyrl_train.config.load import LoadedConfig, load_config
from skyrl_train.errors import ConfigError


def read_command(argv: Sequence[str]) -> LoadedConfig | int:
    """The checked configuration, or the exit code of a command that is already answered."""
    from skyrl_train.config.explain import render_explain
    from skyrl_train.config.machine import capability_report, this_machine

    try:
        loaded = load_config(argv)
        if loaded.help or loaded.explain:
            print(render_explain(loaded), flush=True)
            return 0
        for warning in loaded.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        report = capability_report(loaded.config, machine=this_machine())
    except ConfigError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    if report is not None:
        print(report, file=sys.stderr)
        return 2
    return loaded


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says; returns the exit code."""
    try:
        loaded = read_command(sys.argv[1:] if argv is None else argv)
    except BrokenPipeError:  # `--explain | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if isinstance(loaded, int):
        return loaded
    # OpenMP threads that wait by spinning take the processors from whoever has work: with one busy neighbour on two
    # cores a step took four times as long. Read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # torch and transformers take seconds to import: only once the configuration is known to run here.
    from skyrl_train.entrypoints.run import run

    return run(loaded)


if __name__ == "__main__":
    sys.exit(main())
