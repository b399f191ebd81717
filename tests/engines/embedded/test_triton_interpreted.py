"""Runs triton_cases under Triton's interpreter, in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
CASES = "tests/engines/embedded/triton_cases.py"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton, whose interpreter runs the GPU's kernels on the CPU, is not installed",
)


def run_cases(marker: str) -> str:
    command = [sys.executable, "-m", "pytest", "-q", "-m", marker, "-p", "no:cacheprovider", "-n", "0", CASES]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


def test_the_kernels_of_a_gpu_and_an_engine_on_them_give_what_the_slow_references_give() -> None:
    assert " passed" in run_cases("not slow")


@pytest.mark.slow
def test_they_do_in_every_case() -> None:
    assert " passed" in run_cases("slow")


@pytest.mark.slow
def test_every_kernel_compiles_for_a_card_that_is_not_here() -> None:
    command = [sys.executable, "-m", "tests.engines.embedded.compiled_cases"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "all compiled" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
