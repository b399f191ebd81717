"""The interpreters that have the real engines, for tests marked `engines`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.interpreters import engine_python


@pytest.fixture(scope="session")
def sglang_python() -> Path:
    return engine_python("sglang")


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    return engine_python("vllm")
