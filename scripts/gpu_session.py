"""All that wants a GPU in one go, within a time: `python scripts/gpu_session.py --out DIR [--wheels .whl]`.

Runs the GPU tests, then the throughput of the trainer, then the asynchronous loop beside the synchronous one. Each is a
process of its own under a timeout, and what comes last is left out when the time is over. DIR gets at most eight files:
`session.log`, `tests.log`, and a table and a log of each benchmark. The tables are printed at the end.

`--wheels`: packages that this Python lacks, as wheel files; they are unpacked into a folder of their own and come
first on the path. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUDGET_S = 520.0
PYTHON = [sys.executable, "-u", "-m"]
SHOWN_LINES = 25


@dataclass(frozen=True, kw_only=True)
class Job:
    """`max_s` of its own; with less than `min_s` left it isn't started.

    `{left}` in a command is what it may use: its time without `reserve_s`, in which it comes to an end.
    """

    name: str
    command: str
    max_s: float
    min_s: float = 20.0
    reserve_s: float = 8.0


JOBS = (
    Job(
        name="tests",
        command="pytest -q -m gpu tests/gpu -p no:cacheprovider -W default --durations=8 --timeout=120",
        max_s=170,
    ),
    Job(
        name="throughput",
        command="benchmarks.train_throughput --device cuda --dtype bfloat16 --shape 0.5b --prompts 16 --samples 8 "
        "--prompt 64:512 --median 256 --longest 2048 --micro-batch-tokens 16384 --rounds 3 --budget-s {left} "
        "--out {out}",
        max_s=140,
        reserve_s=50,  # a case's set-up and its first round come whatever the time
    ),
    Job(
        name="async, ragged",
        command="benchmarks.async_vs_sync --tasks ragged --device cuda --dtype bfloat16 --shape 0.5b --prompts 32 "
        "--samples 8 --mean 96 --longest 640 --steps 13 --warmup 3 --modes sync,1,4,0 --budget-s {left} "
        "--runs {runs} --out {out}",
        max_s=230,
    ),
    Job(
        name="async, arithmetic",
        command="benchmarks.async_vs_sync --tasks arithmetic --device cuda --arithmetic-steps 40 --modes sync,1,4 "
        "--budget-s {left} --runs {runs} --out {out}",
        max_s=150,
        min_s=40,
    ),
)
RESERVE_S = 5.0
"""Left to this script after the last job, to copy and print."""


class Session:
    """Prints, and keeps what it printed."""

    def __init__(self, out: Path, end: float) -> None:
        self._log = (out / "session.log").open("w")
        self._start = time.monotonic()
        self._end = end

    @property
    def left_s(self) -> float:
        return self._end - time.monotonic()

    def say(self, text: str) -> None:
        line = f"[{time.monotonic() - self._start:6.1f} s] {text}"
        print(line, flush=True)
        self._log.write(line + "\n")
        self._log.flush()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python scripts/gpu_session.py", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--wheels", type=Path, default=None, help="a folder of wheel files to install first")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S)
    parser.add_argument("--jobs", type=lambda text: text.split(","), default=None, help="numbers, from 0; default: all")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    session = Session(args.out, time.monotonic() + args.budget_s)
    jobs = JOBS if args.jobs is None else [JOBS[int(number)] for number in args.jobs]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        environment.setdefault("SKYRL_TRAIN_CACHE", str(work / "cache"))
        if args.wheels is not None:
            site = install(args.wheels, work / "site", session)
            environment["PYTHONPATH"] = f"{site}{os.pathsep}{ROOT}"
        session.say(versions(environment))
        failed = [job.name for job in jobs if not run_job(job, work, args.out, environment, session)]
        for file in sorted((work / "results").glob("*")):
            shutil.copy(file, args.out / file.name)
        for page in sorted(args.out.glob("*.md")):
            print(f"\n{page.read_text()}", flush=True)
    session.say(f"not done: {', '.join(failed)}" if failed else "all done")
    return 1 if failed else 0


def install(wheels: Path, site: Path, session: Session) -> Path:
    options = [
        "--quiet",
        "--no-index",
        "--no-deps",
        "--no-compile",
        "--no-cache-dir",
        "--upgrade",
        "--target",
        str(site),
    ]
    files = sorted(map(str, wheels.glob("*.whl")))
    subprocess.run([sys.executable, "-m", "pip", "install", *options, *files], check=True)
    session.say(f"{len(files)} wheels installed")
    return site


def versions(environment: dict[str, str]) -> str:
    """One line: what runs here. A package that can't be imported shows at once, not in the third job."""
    code = (
        "import torch, transformers, hydra, pydantic, datasets, torchdata, skyrl_gym, skyrl_train.entrypoints.run\n"
        "name = torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'\n"
        "print(name, 'torch', torch.__version__, 'transformers', transformers.__version__)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or done.stderr[-1500:]


def run_job(job: Job, work: Path, out: Path, environment: dict[str, str], session: Session) -> bool:
    """True when it ended by itself with exit code 0."""
    limit = min(job.max_s, session.left_s - RESERVE_S)
    if limit < job.min_s:
        session.say(f"{job.name}: not run, {session.left_s:.0f} s are left")
        return False
    text = job.command.format(left=round(limit - job.reserve_s), out=work / "results", runs=work / "runs")
    session.say(f"{job.name}: python -m {text}")
    log = out / "tests.log" if job.name == "tests" else work / f"{job.name.replace(', ', '-')}.out"
    start = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            [*PYTHON, *text.split()],
            env=environment,
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(process.pid, signal.SIGKILL)  # with the runs that it started
            process.wait()
    seconds = time.monotonic() - start
    how = f"exit code {code}" if code is not None else f"stopped after {limit:.0f} s"
    lines = log.read_text(errors="replace").splitlines()
    if code != 0 or job.name == "tests":
        for line in lines[-SHOWN_LINES:]:
            session.say(f"    {line[:300]}")
    session.say(f"{job.name}: {how}, {seconds:.0f} s")
    if code != 0 and log.parent != out:
        shutil.copy(log, out / log.name)  # in place of a table
    return code == 0


if __name__ == "__main__":
    sys.exit(main())
