"""What the embedded engine's fused kernels are worth on one GPU, in one command, within a time.

    python scripts/gpu_engine_speed.py --out DIR [--wheels .whl] [--archive .carry/sglang] [--minutes 9]
    python scripts/gpu_engine_speed.py --out DIR --parts tests,steps
    python scripts/gpu_engine_speed.py --out DIR --device cpu      # a rehearsal, here, on a tiny shape

Parts, in this order, each a process of its own under a limit; one that fails or is stopped costs the others nothing,
and what it had measured by then is kept:

    tests      the kernels and both kinds of engine on the GPU, right before fast
    steps      a decode step: plain, fused, the physical limit, and its kernels one by one
    rollouts   whole rollouts, prefill included: 1 to 1024 requests, long answers, groups of one prompt, sampling rules
    compiled   the same step with transformers' module under torch.compile
    sglang     SGLang on the same works in the same call, where `--archive` or `--engine-site` brings it
    7b         256 requests of the 7B shape, plain and fused

`--archive`, `--engine-site` and `--wheels` are those of gpu_engines.py. DIR gets session.log, tables.md and
results.tar.gz, which has all rows as JSON too.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from gpu_engines import COMMON, ROOT, Part, Session, collect, install, run_part, settle, unpack, versions

TINY_WORKS = "1x12x4,4x12x4"
PARTS = (
    Part(
        name="tests",
        command="pytest -q -m gpu tests/gpu/test_fused_kernels.py tests/gpu/test_fused_engine.py "
        "tests/gpu/test_kernels.py tests/gpu/test_engine_cuda.py "
        "-p no:cacheprovider -W default --durations=6 --tb=short",
        max_s=200,
        rehearsed=False,
    ),
    Part(
        name="steps",
        command=f"benchmarks.gpu_engine.steps {COMMON}",
        max_s=120,
        small=("--cases", "1x24,2x24", "--timed", "2"),
    ),
    Part(
        name="rollouts",
        command=f"benchmarks.gpu_engine.rollouts {COMMON}",
        max_s=210,
        small=("--cases", f"{TINY_WORKS},2*2x20x4", "--ruled", "2x8x3", "--repetitions", "1"),
    ),
    Part(
        name="compiled",
        command=f"benchmarks.gpu_engine.steps {COMMON} --kernels compiled --cases 256x256,1x256 --profile none",
        max_s=120,
        rehearsed=False,
    ),
    Part(
        name="sglang",
        command=f"benchmarks.gpu_engine.peer {COMMON} --site {{site}}",
        max_s=230,
        rehearsed=False,
    ),
    Part(
        name="7b",
        command=f"benchmarks.gpu_engine.rollouts {COMMON} --shape 7b --cases 256x128x256 --ruled none --name 7b "
        "--repetitions 2",
        max_s=100,
        rehearsed=False,
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python scripts/gpu_engine_speed.py", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--shape", default=None, help="default: 0.5b, tiny on the CPU")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--parts", type=lambda text: text.split(","), default=None, help="names; default: all")
    parser.add_argument("--wheels", type=Path, default=None, help="a folder of wheel files to install first")
    parser.add_argument(
        "--archive", type=Path, default=None, help="SGLang: a folder with *.tar.xz.part* and SHA256SUMS"
    )
    parser.add_argument("--engine-site", type=Path, default=None, help="SGLang's packages, or where to unpack them")
    args = parser.parse_args(argv)
    args.rehearse = args.device == "cpu"
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    session = Session(out=args.out, end=time.monotonic() + 60 * args.minutes)
    has_peer = args.archive is not None or args.engine_site is not None
    unknown = set(args.parts or ()) - {part.name for part in PARTS}
    if unknown:
        parser.error(f"--parts: there is no {', '.join(sorted(unknown))}; there are {', '.join(p.name for p in PARTS)}")
    parts = [part for part in PARTS if args.parts is None or part.name in args.parts]
    if args.rehearse:
        parts = [part for part in parts if part.rehearsed]
    if not has_peer:
        parts = [part for part in parts if part.name != "sglang"]
    failed = []
    with tempfile.TemporaryDirectory(prefix="skyrl-gpu-speed-") as folder:
        work = Path(folder)
        (work / "results").mkdir()
        environment = environment_of(args, work, session)
        session.say(versions(environment))
        for part in parts:
            chosen = part
            if part.name == "sglang":
                site = peer_site(args, work, session)
                chosen = Part(name=part.name, command=part.command.replace("{site}", site), max_s=part.max_s)
            if not run_part(chosen, args, work, {}, environment, session):
                failed.append(part.name)
            collect(work, args.out)
            if part.name == "tests":
                show_end(work / "results" / "part-tests.out", session)
            if not args.rehearse:
                settle(session)
        if (args.out / "tables.md").exists():
            print(f"\n{(args.out / 'tables.md').read_text()}", flush=True)
    session.say(f"not done: {', '.join(failed)}" if failed else "all done")
    return 1 if failed else 0


def environment_of(args: argparse.Namespace, work: Path, session: Session) -> dict[str, str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment.setdefault("SKYRL_TRAIN_CACHE", str(work / "cache"))
    if args.wheels is not None:
        site = install(args.wheels, work / "wheels", session)
        environment["PYTHONPATH"] = f"{site}{os.pathsep}{ROOT}"
    if args.rehearse:
        environment["TRITON_INTERPRET"] = "1"
    return environment


def peer_site(args: argparse.Namespace, work: Path, session: Session) -> str:
    """What goes on SGLang's PYTHONPATH."""
    site = (args.engine_site or work / "engine-site").resolve()
    unpack(args.archive, site, session)
    stubs = None if args.archive is None else args.archive.resolve() / "stubs"
    return os.pathsep.join([str(stubs), str(site)] if stubs is not None and stubs.is_dir() else [str(site)])


def show_end(log: Path, session: Session) -> None:
    if log.exists():
        for line in log.read_text(errors="replace").splitlines()[-12:]:
            session.say(f"    {line[:300]}")


if __name__ == "__main__":
    sys.exit(main())
