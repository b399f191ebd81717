"""Compiles the C files beside this one into one shared library and loads it.

The library is kept in the user's cache folder, named by a hash of the sources, the compiler, its flags and the CPU,
so it is built once and never used where it does not belong.

OpenMP: the library is linked without a runtime of its own. PyTorch's, which is in the process already, is made
visible instead, so there is one pool of threads; two pools would fight for the cores.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

SOURCES = ("attention.c", "sampling.c", "elementwise.c", "invariant.c", "packed_linear.c", "decoder.c", "ngram.c")
HEADERS = ("vector.h", "bfloat16.h", "kernels.h")
FLAGS = (
    *("-O3", "-march=native", "-fopenmp", "-fPIC", "-std=gnu11", "-Wno-psabi"),
    *("-fno-math-errno", "-fno-trapping-math"),
)
FLAGS_OF = {"invariant.c": ("-ffp-contract=off",)}
"""More for single files."""


class NativeUnavailable(Exception):
    """No native kernels on this machine; the message says why."""


@functools.cache
def load_native() -> ctypes.CDLL:
    """The library, built where necessary. Raises NativeUnavailable."""
    if not torch.backends.openmp.is_available():  # type: ignore[no-untyped-call]
        raise NativeUnavailable("this PyTorch was built without OpenMP")
    library = _built_library()
    _expose_openmp()
    try:
        return ctypes.CDLL(str(library))
    except OSError as exc:
        raise NativeUnavailable(f"{library} can't be loaded: {exc}") from exc


def _built_library() -> Path:
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise NativeUnavailable("there is no C compiler (cc, gcc or clang)")
    folder = Path(__file__).parent
    digest = hashlib.sha256("\0".join((*FLAGS, str(FLAGS_OF), _run([compiler, "--version"]), _cpu())).encode())
    for name in (*SOURCES, *HEADERS):
        digest.update((folder / name).read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "skyrl_train" / "native"
    target = cache / f"kernels-{digest.hexdigest()[:24]}.so"
    if not target.is_file():
        try:
            cache.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryDirectory(dir=cache) as scratch:
                _compile(compiler, folder, Path(scratch))
                os.replace(Path(scratch) / "kernels.so", target)  # atomic: two processes may build at once
        except OSError as exc:
            raise NativeUnavailable(f"{cache} can't be written: {exc}") from exc
    return target


def _compile(compiler: str, folder: Path, scratch: Path) -> None:
    objects = {name: str(scratch / f"{name}.o") for name in SOURCES}

    def compile_one(name: str) -> None:
        _run([compiler, *FLAGS, *FLAGS_OF.get(name, ()), "-c", str(folder / name), "-o", objects[name]])

    with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        list(threads.map(compile_one, SOURCES))
    # No -fopenmp here: it would link the compiler's own OpenMP runtime.
    _run([compiler, "-shared", "-o", str(scratch / "kernels.so"), *objects.values(), "-lm"])


def _run(command: list[str]) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except OSError as exc:
        raise NativeUnavailable(f"{command[0]} can't be run: {exc}") from exc
    except subprocess.CalledProcessError as exc:
        raise NativeUnavailable(f"{' '.join(command)} failed: {exc.stderr.strip()[-500:]}") from exc


def _cpu() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU part")
    return platform.machine() + "".join(sorted({line for line in lines if line.startswith(wanted)}))


def _expose_openmp() -> None:
    """Let later libraries find the symbols of the OpenMP runtime that PyTorch loaded."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError as exc:
        raise NativeUnavailable(f"the loaded OpenMP runtime can't be found: {exc}") from exc
    loaded = sorted({line.split()[-1] for line in maps.splitlines() if "omp" in line.rpartition("/")[2]})
    runtimes = [path for path in loaded if Path(path).name.startswith(("libgomp", "libiomp5", "libomp"))]
    if not runtimes:
        raise NativeUnavailable("PyTorch has loaded no OpenMP runtime")
    ctypes.CDLL(runtimes[0], mode=ctypes.RTLD_GLOBAL)
