"""All that a real engine has to show on a GPU, in one go, within a time.

    python scripts/gpu_engines.py --engine sglang --archive .carry/sglang --wheels .whl --out DIR
    python scripts/gpu_engines.py --engine vllm   --archive .carry/vllm   --wheels .whl --out DIR
    python scripts/gpu_engines.py --engine nccl   --archive .carry/sglang --wheels .whl --out DIR   # two GPUs
    python scripts/gpu_engines.py --engine sglang --rehearse --out DIR       # here, on the CPU, with a tiny model

For a machine without a network and without an environment of its own for the engine: `--archive` has the engine's
packages (`*.tar.xz.part*` with SHA256SUMS), which are unpacked into `--engine-site` unless they are there, and go on
the server's PYTHONPATH alone. `--wheels` are packages that this Python lacks for the trainer. Nothing is downloaded.

Each part is a process of its own under a timeout, in the order of PARTS, while time is left; what it wrote is in DIR
when it ends. DIR gets at most four files: session.log, tables.md, results.tar.gz and servers.tar.gz.
"""

from __future__ import annotations

import argparse
import compileall
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESERVE_S = 8.0
"""Left to this script after the last part."""
SETTLE_S = 20.0
"""For a part's engines to leave the GPU before the next one sizes itself by what is free."""
SETTLED_MIB = 3000
REHEARSAL_SLOWER = 4
"""A CPU takes longer to start servers, one at a time."""
SHOWN_LINES = 30

ENVIRONMENT = {
    "sglang": {
        "CUDA_MODULE_LOADING": "LAZY",
        "SGLANG_ENABLE_JIT_DEEPGEMM": "0",
        "TOKENIZERS_PARALLELISM": "false",
    },
    "vllm": {
        "CUDA_MODULE_LOADING": "LAZY",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "TOKENIZERS_PARALLELISM": "false",
    },
}
"""Of the servers, with kernels that were cut down to one kind of GPU."""

KEYS = {
    "sglang": {
        "generator.attention.backend": "fa3",
        "generator.attention.sampling_backend": "pytorch",
        "generator.cuda_graph.backend_prefill": "disabled",
        "generator.cuda_graph.max_bs_decode": "256",
    },
    "vllm": {},
}
"""Of every engine that is started: kernels that the archive has, and a start that records decode graphs alone."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """`python -m command`, for at most `max_s`; with less than `min_s` left it isn't started.

    Words in braces are filled in; `{left}` is its time without `reserve_s`, in which it comes to its end. `small` is
    put behind it when this is a rehearsal.
    """

    name: str
    command: str
    max_s: float
    small: tuple[str, ...] = ()
    min_s: float = 40.0
    reserve_s: float = 15.0
    rehearsed: bool = True


COMMON = "--device {device} --shape {shape} --work {work} --out {out} --budget-s {left}"
TINY = ("--max-num-seqs", "64")
TINY_PROOF = (*TINY, "--paths", "plain")
TINY_JOB = ("--prompts", "4", "--samples", "2", "--new", "16")
TINY_SPEED = (
    "--max-num-seqs=64",
    "--rollouts=--requests 16 --prompt 16 --new 16 --repetitions 1",
    "--side_by_side=--sizes 1,8 --prompt 16 --new 16 --repetitions 1",
    "--sessions=--conversations 4 --turns 3 --first 64 --answer 8 --observation 8 --repetitions 1",
    "--speculation=--batches 1,4 --prompt 64 --new 16 --repetitions 1",
)
"""For a rehearsal."""


def speed(engine: str, benchmarks: str) -> str:
    return f"benchmarks.engines.speed {COMMON} --engine {engine} --benchmarks {benchmarks}"


def job(config: str, more: str = "") -> str:
    return f"benchmarks.engines.example_job {COMMON} --config {config} {more}"


def sync(engine: str, more: str = "") -> str:
    """It keeps a minute of its time to end its server in."""
    return f"benchmarks.weight_sync {COMMON} --engine {engine} {more}"


ONE_GPU = "--paths cuda_ipc,disk,gloo"
LARGE = f"{ONE_GPU} --shape 7b --repetitions 2"
"""15 GB an update."""
TINY_SYNC = ("--paths", "disk,tensor,gloo")
SPEED = "rollouts,side_by_side,sessions,colocated,speculation"
PARTS: dict[str, tuple[Part, ...]] = {
    "sglang": (
        Part(
            name="proof",
            command=f"benchmarks.engines.proof {COMMON} --engine sglang --paths plain,disk",
            max_s=330,
            small=TINY_PROOF,
        ),
        Part(
            name="job-full",
            command=job("examples/sglang/sglang_full_config_example"),
            max_s=240,
            small=TINY_JOB,
        ),
        Part(
            name="job-speculative",
            command=job("examples/sglang/sglang_speculative_decoding_example"),
            max_s=200,
            # On a CPU SGLang's drafts go with greedy sampling alone.
            small=(*TINY_JOB, "--refused", "takes the likeliest token when it speculates"),
        ),
        Part(name="sync", command=sync("sglang", ONE_GPU), max_s=200, reserve_s=0, small=TINY_SYNC),
        Part(name="sync-7b", command=sync("sglang", LARGE), max_s=240, min_s=120, reserve_s=0, rehearsed=False),
        Part(name="speed", command=speed("sglang", SPEED), max_s=330, min_s=90, small=TINY_SPEED),
    ),
    "vllm": (
        Part(
            name="proof",
            command=f"benchmarks.engines.proof {COMMON} --engine vllm --paths plain",
            max_s=330,
            small=TINY_PROOF,
        ),
        Part(
            name="job",
            command=job("examples/gsm8k/gsm8k_qwen2.5", "--backend vllm --name gsm8k-vllm"),
            max_s=240,
            small=TINY_JOB,
        ),
        Part(name="sync", command=sync("vllm", ONE_GPU), max_s=200, reserve_s=0, small=TINY_SYNC),
        Part(name="sync-7b", command=sync("vllm", LARGE), max_s=240, min_s=120, reserve_s=0, rehearsed=False),
        Part(
            name="speed",
            command=speed("vllm", "side_by_side,sessions,colocated,speculation"),
            max_s=330,
            min_s=90,
            small=TINY_SPEED,
        ),
    ),
    "nccl": (
        Part(
            name="proof",
            command=f"benchmarks.engines.proof {COMMON} --engine sglang --paths group --only-updates",
            max_s=150,
            small=TINY,
        ),
        Part(
            name="job-nccl",
            command=job(
                "examples/sglang/sglang_full_config_example",
                "--name nccl --set trainer.placement.colocate_all=false --set generator.weight_sync_backend={group}",
            ),
            max_s=220,
            small=TINY_JOB,
        ),
        Part(name="sync", command=sync("sglang", "--paths {group}"), max_s=200, reserve_s=0),
        Part(
            name="sync-7b",
            command=sync("sglang", "--paths {group} --shape 7b --repetitions 3"),
            max_s=240,
            min_s=120,
            reserve_s=0,
            rehearsed=False,
        ),
    ),
}


@dataclass(kw_only=True)
class Session:
    """Prints, and keeps what it printed."""

    out: Path
    end: float
    start: float = field(default_factory=time.monotonic)

    @property
    def left_s(self) -> float:
        return self.end - time.monotonic()

    def say(self, text: str) -> None:
        line = f"[{time.monotonic() - self.start:6.1f} s] {text}"
        print(line, flush=True)
        with (self.out / "session.log").open("a") as file:
            file.write(line + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python scripts/gpu_engines.py", description=__doc__.splitlines()[0])
    parser.add_argument("--engine", choices=PARTS, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--engine-site", type=Path, default=None, help="the engine's packages, or where to unpack them")
    parser.add_argument("--archive", type=Path, default=None, help="a folder with *.tar.xz.part* and SHA256SUMS")
    parser.add_argument("--wheels", type=Path, default=None, help="a folder of wheel files to install first")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--parts", type=lambda text: text.split(","), default=None, help="names; default: all")
    parser.add_argument("--shape", default=None, help="default: 0.5b, tiny in a rehearsal")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with the interpreters that tests use")
    args = parser.parse_args(argv)
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    session = Session(out=args.out, end=time.monotonic() + 60 * args.minutes)
    parts = [part for part in PARTS[args.engine] if args.parts is None or part.name in args.parts]
    if args.rehearse:
        parts = [part for part in parts if part.rehearsed]
    with tempfile.TemporaryDirectory(prefix="skyrl-gpu-engines-") as folder:
        work = Path(folder)
        environment, keys = prepare(args, work, session)
        (work / "results").mkdir()
        for rows in (ROOT / "benchmarks" / "results").glob("engines-side-by-side-*.json"):
            shutil.copy(rows, work / "results")  # of other engines, from an earlier run
        session.say(versions(environment))
        failed = []
        for part in parts:
            if not run_part(part, args, work, keys, environment, session):
                failed.append(part.name)
            collect(work, args.out)
            if not args.rehearse:
                settle(session)
        if (args.out / "tables.md").exists():
            print(f"\n{(args.out / 'tables.md').read_text()}", flush=True)
    session.say(f"not done: {', '.join(failed)}" if failed else "all done")
    return 1 if failed else 0


def prepare(args: argparse.Namespace, work: Path, session: Session) -> tuple[dict[str, str], dict[str, str]]:
    """The environment of the parts, and the keys of every engine that they start."""
    backend = "vllm" if args.engine == "vllm" else "sglang"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment.setdefault("SKYRL_TRAIN_CACHE", str(work / "cache"))
    if args.wheels is not None:
        site = install(args.wheels, work / "wheels", session)
        environment["PYTHONPATH"] = f"{site}{os.pathsep}{ROOT}"
    if args.rehearse:
        return environment, {}
    # nvcc and ninja, which engines compile with at their first start.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/local/cuda/bin"])
    site = (args.engine_site or work / "engine-site").resolve()
    unpack(args.archive, site, session)
    path = [str(site)]
    stubs = None if args.archive is None else args.archive.resolve() / "stubs"
    if stubs is not None and stubs.is_dir():
        path.insert(0, str(stubs))
    variables = {"PYTHONPATH": os.pathsep.join(path), **ENVIRONMENT[backend]}
    quoted = ",".join(f'{name}:"{value}"' for name, value in variables.items())
    keys = {
        "generator.engine_python": sys.executable,
        "generator.engine_environment": f"{{{quoted}}}",
        **KEYS[backend],
    }
    return environment, keys


def install(wheels: Path, site: Path, session: Session) -> Path:
    options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--upgrade"]
    options += ["--target", str(site)]
    files = sorted(map(str, wheels.glob("*.whl")))
    subprocess.run([sys.executable, "-m", "pip", "install", *options, *files], check=True)
    session.say(f"{len(files)} wheels installed")
    return site


def unpack(archive: Path | None, site: Path, session: Session) -> None:
    """The archive's parts, checked, joined and unpacked into `site`; nothing where it was unpacked before."""
    stamp = site / ".unpacked"
    if stamp.exists() or (archive is None and site.is_dir()):
        session.say("the engine's packages are unpacked already")
        return
    if archive is None:
        sys.exit(f"{site} has no packages of the engine; give --archive")
    start = time.monotonic()
    for line in (archive / "SHA256SUMS").read_text().splitlines():
        wanted, name = line.split(maxsplit=1)
        with (archive / name.lstrip("*")).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != wanted:
            sys.exit(f"{name} is damaged: its SHA-256 is {found}, SHA256SUMS says {wanted}")
    site.mkdir(parents=True, exist_ok=True)
    with Joined(sorted(archive.glob("*.tar.xz.part*"))) as stream, tarfile.open(fileobj=stream, mode="r|xz") as tar:
        tar.extractall(site, filter="fully_trusted")
    for path in [site, *site.rglob("*")]:
        path.chmod(path.stat().st_mode | 0o200)
    unpacked = time.monotonic() - start
    # Every server imports the same thousands of files.
    compileall.compile_dir(site, quiet=2, workers=0)
    stamp.touch()
    session.say(f"unpacked in {unpacked:.1f} s, compiled to bytecode in {time.monotonic() - start - unpacked:.1f} s")


class Joined:
    """Files read one after the other."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._files = [path.open("rb") for path in paths]
        self._waiting = list(self._files)

    def read(self, size: int) -> bytes:
        parts, left = [], size
        while left and self._waiting:
            part = self._waiting[0].read(left)
            if part:
                parts.append(part)
                left -= len(part)
            else:
                del self._waiting[0]
        return b"".join(parts)

    def __enter__(self) -> Joined:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.close()


def versions(environment: dict[str, str]) -> str:
    """One line: what runs here. A package that can't be imported shows at once, not in the third part."""
    code = (
        "import torch, transformers, skyrl_train.entrypoints.run\n"
        "count = torch.cuda.device_count()\n"
        "name = f'{count} x {torch.cuda.get_device_name()}' if count else 'no GPU'\n"
        "print(name, 'torch', torch.__version__, 'transformers', transformers.__version__)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or done.stderr[-1500:]


def words_of(part: Part, args: argparse.Namespace, work: Path, keys: dict[str, str], left_s: float) -> list[str]:
    """The part's command line. Keys are words of their own: their values may have spaces and quotes."""
    filled = {
        "device": "cpu" if args.rehearse else "cuda",
        "shape": args.shape or ("tiny" if args.rehearse else "0.5b"),
        "work": str(work / "work"),
        "out": str(work / "results"),
        "left": f"{left_s:.0f}",
        "group": "gloo" if args.rehearse else "nccl",
    }
    words = part.command.format(**filled).split()
    for key, value in keys.items():
        words += ["--set", f"{key}={value}"]
    if args.rehearse:
        words += part.small
    return words


def run_part(
    part: Part,
    args: argparse.Namespace,
    work: Path,
    keys: dict[str, str],
    environment: dict[str, str],
    session: Session,
) -> bool:
    """True when it ended by itself with exit code 0."""
    limit = min(part.max_s * (REHEARSAL_SLOWER if args.rehearse else 1), session.left_s - RESERVE_S)
    if limit < part.min_s:
        session.say(f"{part.name}: not run, {session.left_s:.0f} s are left")
        return False
    words = words_of(part, args, work, keys, limit - part.reserve_s)
    session.say(f"{part.name}: python -m {' '.join(words)}")
    log = work / "results" / f"part-{part.name}.out"
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", *words],
            env=environment,
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        code = wait(process, limit, session, log)
    seconds = time.monotonic() - start
    how = f"exit code {code}" if code is not None else f"stopped after {limit:.0f} s"
    if code != 0:
        for line in log.read_text(errors="replace").splitlines()[-SHOWN_LINES:]:
            session.say(f"    {line[:300]}")
    session.say(f"{part.name}: {how}, {seconds:.0f} s")
    return code == 0


def wait(process: subprocess.Popen[bytes], limit: float, session: Session, log: Path) -> int | None:
    """Its exit code; None when it was stopped: first asked to, so that it can end its engines and write its table."""
    try:
        return process.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        session.say(f"over its time; {log.name} goes on where it was")
    for number, grace in ((signal.SIGINT, 8.0), (signal.SIGKILL, 10.0)):
        try:
            os.killpg(process.pid, number)  # servers are guarded: without this process they end
        except ProcessLookupError:
            break
        try:
            process.wait(timeout=grace)
            break
        except subprocess.TimeoutExpired:
            continue
    return None


def settle(session: Session) -> None:
    """Until the GPUs are nearly empty, or for a while."""
    end = time.monotonic() + SETTLE_S
    while True:
        used = gpu_memory_mib()
        if used is None or max(used, default=0) < SETTLED_MIB or time.monotonic() > end:
            break
        time.sleep(0.5)
    session.say(f"GPU memory in use: {used} MiB")


def gpu_memory_mib() -> list[int] | None:
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return [int(line) for line in done.stdout.split() if line.isdigit()]


def collect(work: Path, out: Path) -> None:
    """All tables in one page, all files in two archives: few files come back from such a machine."""
    results = work / "results"
    pages = sorted(results.glob("*.md"), key=lambda page: page.stat().st_mtime)
    (out / "tables.md").write_text("\n".join(page.read_text() for page in pages))
    with tarfile.open(out / "results.tar.gz", "w:gz") as tar:
        for file in sorted(results.iterdir()):
            if file.is_file():
                tar.add(file, arcname=file.name)
    # Of jobs that were stopped too: what they printed, their rows, their servers' logs.
    runs = [file for name in ("job.out", "metrics.jsonl", "*.log") for file in (work / "work" / "runs").rglob(name)]
    if (results / "servers").is_dir() or runs:
        with tarfile.open(out / "servers.tar.gz", "w:gz") as tar:
            if (results / "servers").is_dir():
                tar.add(results / "servers", arcname="servers")
            for file in runs:
                tar.add(file, arcname=f"runs/{'-'.join(file.relative_to(work / 'work' / 'runs').parts)}")


if __name__ == "__main__":
    sys.exit(main())
