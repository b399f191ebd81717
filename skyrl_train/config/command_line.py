"""The command line: --config-path, --config-name, --explain and overrides."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from skyrl_train.errors import ConfigError

USAGE = """\
python -m skyrl_train.entrypoints.main_base [--config-path DIR] [--config-name FILE] [--explain[=json]] [key=value ...]

  --config-path DIR    folder of the YAML file, relative to the current directory (default: .)
  --config-name FILE   the file, with or without .yaml; without it: the built-in main job
  --explain            print every resolved key and its source, the plan of GPUs and memory, and the engines'
                       command lines; start nothing. --explain=json prints the same for programs
  key=value            overrides in Hydra's grammar, as in generator.backend=sglang trainer.seed=7
  --help               this text

Every key: docs/CONFIGURATION.md"""

ExplainFormat = Literal["text", "json"]
_OPTIONS = ("--config-path", "--config-name", "--explain", "--help")


@dataclass(frozen=True, kw_only=True)
class CommandLine:
    config_path: str | None
    config_name: str | None
    explain: ExplainFormat | None
    help: bool
    overrides: tuple[str, ...]


def parse_command_line(argv: Sequence[str]) -> CommandLine:
    """Options take `--option VALUE` or `--option=VALUE`; everything without dashes in front is an override."""
    values: dict[str, str] = {}
    overrides: list[str] = []
    pending = list(argv)
    while pending:
        word = pending.pop(0)
        if not word.startswith("-"):
            overrides.append(word)
            continue
        name, has_value, value = word.partition("=")
        name = {"-cp": "--config-path", "-cn": "--config-name", "-h": "--help"}.get(name, name)
        if name not in _OPTIONS:
            close = difflib.get_close_matches(name, _OPTIONS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"options are {', '.join(_OPTIONS)}"
            raise ConfigError(f"unknown option {word}; {hint} Settings are written key=value, without dashes")
        if name in ("--config-path", "--config-name") and not has_value:
            if not pending or pending[0].startswith("-"):
                raise ConfigError(f"{name} needs a value")
            value = pending.pop(0)
        elif name == "--explain" and not has_value:
            value = "text"
        values[name] = value
    explain = values.get("--explain")
    if explain not in (None, "text", "json"):
        raise ConfigError(f"--explain={explain}: wanted --explain or --explain=json")
    if "--config-path" in values and "--config-name" not in values:
        raise ConfigError(f"--config-path {values['--config-path']} without --config-name: say which file there")
    return CommandLine(
        config_path=values.get("--config-path"),
        config_name=values.get("--config-name"),
        explain=explain,  # type: ignore[arg-type]
        help="--help" in values,
        overrides=tuple(overrides),
    )
