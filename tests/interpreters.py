"""Where the tests find the interpreters that have the real engines.

`SKYRL_SGLANG_PYTHON` and `SKYRL_VLLM_PYTHON` name them; without these, what `make engines` put into `.engines`. Where
there is none, a test that needs it is skipped, and fails under `SKYRL_REQUIRE_ENGINES=1` (`make test-engines` sets it).
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def engine_python(engine: str) -> Path:
    """The interpreter that has `engine` ("sglang" or "vllm"). Skips the test or fails it where there is none."""
    variable = f"SKYRL_{engine.upper()}_PYTHON"
    named = os.environ.get(variable)
    path = Path(named) if named else ROOT / ".engines" / engine / "bin" / "python"
    if path.exists():
        return path.absolute()
    message = f"no interpreter with {engine}: {path} does not exist; run `make engines` or set {variable}"
    if named or os.environ.get("SKYRL_REQUIRE_ENGINES") == "1":
        pytest.fail(message)
    pytest.skip(message)
