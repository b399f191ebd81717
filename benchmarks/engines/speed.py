"""The benchmarks of one server in one process over shared engines: each writes its own table as soon as it is done.

    python -m benchmarks.engines.speed --engine sglang --device cuda --shape 0.5b --budget-s 300

On a GPU, starting engines takes longer than measuring them; here each variant is started once.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence

from benchmarks.engines import colocated, rollouts_vs_own_engine, sessions, side_by_side, speculation
from benchmarks.engines.harness import SERVERS, Failed, cell, keep_logs, names, new_report, open_fleet, parser_of

BENCHMARKS = {
    "rollouts": rollouts_vs_own_engine,
    "side_by_side": side_by_side,
    "sessions": sessions,
    "speculation": speculation,
    "colocated": colocated,
}
OF_SGLANG = ("rollouts",)
VARIANTS: dict[str, tuple[str, ...]] = {
    "rollouts": ("plain",),
    "side_by_side": ("plain",),
    "sessions": tuple(variant for _, variant in sessions.WAYS),
    "colocated": ("plain",),
    "speculation": speculation.VARIANTS,
}
"""Of the server, by benchmark; plain comes first."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("python -m benchmarks.engines.speed", __doc__)
    parser.add_argument("--engine", choices=SERVERS, default="sglang")
    parser.add_argument("--benchmarks", type=names(tuple(BENCHMARKS)), default=tuple(BENCHMARKS))
    for name in BENCHMARKS:
        parser.add_argument(f"--{name}", default="", metavar="OPTIONS", help=f"options of {name}, in quotes")
    args = parser.parse_args(argv)
    asyncio.run(run_all(args))


async def run_all(args: argparse.Namespace) -> None:
    chosen = [name for name in args.benchmarks if name not in OF_SGLANG or args.engine == "sglang"]
    async with open_fleet(args, new_report("speed-{engine}", "Benchmarks of {engine}", args)) as fleet:
        await fleet.muster(args.engine, *dict.fromkeys(variant for name in chosen for variant in VARIANTS[name]))
        for name in chosen:
            module = BENCHMARKS[name]
            own = options(name, module, args)
            report = fleet.report = new_report(module.NAME, module.TITLE, args)
            done = await cell(fleet, name, lambda m=module, r=report, o=own: m.measure(fleet, r, o), limit_s=3600)
            if isinstance(done, Failed):
                report.text(f"It did not come to its end: {done}")
            report.save()
            keep_logs(fleet.setup, args.out)


def options(name: str, module: object, args: argparse.Namespace) -> argparse.Namespace:
    """The benchmark's own options beside the common ones."""
    parser = argparse.ArgumentParser(prog=name)
    module.add_arguments(parser)  # type: ignore[attr-defined]
    given = getattr(args, name).split()
    own = parser.parse_args(given)
    if hasattr(own, "engines") and not any(word.startswith("--engines") for word in given):
        own.engines = ("embedded", args.engine)
    return argparse.Namespace(**{**vars(args), **vars(own), "engine": args.engine})


if __name__ == "__main__":
    main()
