"""The machine under the figures: what it is, how fast it can copy and multiply, and who else was using it."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch

from skyrl_train.engines.embedded.native.build import NativeUnavailable, load_native
from skyrl_train.engines.embedded.packed_linear import Packing

PACKAGES = ("torch", "transformers", "trl", "accelerate", "triton")


def cpu_model() -> str:
    """Never empty; the processor's own name where the system tells it."""
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return " ".join(line.partition(":")[2].split())
    except FileNotFoundError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe(device: str) -> dict[str, str]:
    """Rows of a report's head."""
    rows = {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "CPU": f"{cpu_model()}, {num_cores()} cores",
        "Python": platform.python_version(),
    }
    if device == "cuda":
        rows["GPU"] = torch.cuda.get_device_name()
    for package in PACKAGES:
        try:
            rows[package] = version(package)
        except PackageNotFoundError:
            rows[package] = "not installed"
    return rows


def slug(device: str) -> str:
    """A short name for files: nvidia-h200, or intel-xeon-2c."""
    if device == "cuda":
        return _slug(torch.cuda.get_device_name())
    name = re.sub(r"\(.*?\)|\b(CPU|Processor)\b|@.*", " ", cpu_model())
    return f"{_slug(name)}-{num_cores()}c"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def copy_bytes_per_s(device: str, num_bytes: int) -> float:
    """Bytes read plus bytes written per second when a buffer of `num_bytes` is copied."""
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / _best_seconds(lambda: target.copy_(source), device)


def matmul_flops_per_s(device: str, dtype: torch.dtype, size: int) -> float:
    """Of a product of two `size` x `size` matrices of random numbers (zeros would run faster on a GPU).

    On a CPU of torch's and our own, whichever is faster: torch's in float32 does not use all that some processors
    have.
    """
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    seconds = _best_seconds(lambda: torch.mm(a, b), device)
    if device == "cpu":
        linear = torch.nn.Linear(size, size, bias=False, dtype=dtype)
        with contextlib.suppress(NativeUnavailable), torch.inference_mode():
            packed = Packing(load_native()).matrix(linear)
            seconds = min(seconds, _best_seconds(lambda: packed(a), device))
    return 2 * size**3 / seconds


def _best_seconds(action: Callable[[], object], device: str) -> float:
    for _ in range(3):
        action()
    seconds = []
    for _ in range(10 if device == "cuda" else 50):  # a processor that others use too has few undisturbed moments
        synchronize(device)
        start = time.perf_counter()
        action()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


class LoadMeter:
    """How much of the machine's processors somebody else used since `start`.

    Over a few percent, a figure measured meanwhile is provisional.
    """

    def __init__(self) -> None:
        self._start = _machine_and_own_seconds()
        self._wall = time.perf_counter()

    def others_frac(self, children_s: float = 0.0) -> float | None:
        """In [0, 1]; None where the system doesn't tell. `children_s`: of running processes that work for this one."""
        now, wall = _machine_and_own_seconds(), time.perf_counter() - self._wall
        if now is None or self._start is None:
            return None
        others = (now[0] - self._start[0]) - (now[1] - self._start[1]) - children_s
        return min(max(others / (wall * (os.cpu_count() or 1)), 0.0), 1.0)


def _machine_and_own_seconds() -> tuple[float, float] | None:
    try:
        with open("/proc/stat") as lines:
            fields = [int(value) for value in lines.readline().split()[1:]]
    except FileNotFoundError:
        return None
    idle = fields[3] + fields[4]
    guest = sum(fields[8:10])  # counted in user and nice as well
    own = os.times()
    busy = (sum(fields) - idle - guest) / os.sysconf("SC_CLK_TCK")
    return busy, own.user + own.system + own.children_user + own.children_system
