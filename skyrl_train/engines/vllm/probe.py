"""Runs inside the interpreter that has vLLM: prints, as JSON, its release and the options of `vllm serve`.

Imports nothing of skyrl_train. Only the front end's options are printed where the engine's need a device that is not
there.
"""

import json
import sys
from importlib.metadata import version


def main() -> None:
    from vllm.entrypoints.cli.serve import ServeSubcommand  # type: ignore[import-not-found, unused-ignore]
    from vllm.utils.argparse_utils import FlexibleArgumentParser  # type: ignore[import-not-found, unused-ignore]

    parser = FlexibleArgumentParser()
    serve = ServeSubcommand().subparser_init(parser.add_subparsers())
    options: dict = {}  # type: ignore[type-arg]
    for action in serve._actions:
        for flag in action.option_strings:
            if flag.startswith("--"):
                options[flag[2:]] = None if action.choices is None else sorted(map(str, action.choices))
    json.dump({"release": version("vllm"), "options": options}, sys.stdout)


if __name__ == "__main__":
    main()
