"""Runs inside the interpreter that has SGLang: prints, as JSON, its release and the options of its command line.

Imports nothing of skyrl_train. Options are those of SGLang's own parser: their names are not always the fields'.
"""

import argparse
import json
import sys
from importlib.metadata import version


def main() -> None:
    from sglang.srt.server_args import ServerArgs  # type: ignore[import-not-found, unused-ignore]

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    options: dict = {}  # type: ignore[type-arg]
    for action in parser._actions:
        if not action.option_strings or action.dest == "help":
            continue
        flags = list(action.option_strings)
        known = options.setdefault(action.dest, {"flags": [], "choices": None, "default": None, "is_switch": False})
        known["flags"] += flags
        known["choices"] = None if action.choices is None else sorted(map(str, action.choices))
        known["default"] = action.default if isinstance(action.default, (str, int, float, bool)) else None
        known["is_switch"] = known["is_switch"] or action.nargs == 0
    json.dump({"release": version("sglang"), "options": options}, sys.stdout)


if __name__ == "__main__":
    main()
