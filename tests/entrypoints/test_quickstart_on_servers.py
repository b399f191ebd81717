"""The quickstart with a real server for an engine learns what it learns on the embedded one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from skyrl_train.observability.metrics import read_metrics
from tests.interpreters import engine_python

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.engines
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("backend", ["sglang", "vllm"])
def test_the_quickstart_reaches_the_same_accuracy_on_a_real_server(backend: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [
        *(sys.executable, "-m", "skyrl_train.entrypoints.main_base", f"trainer.run_path={run}"),
        *(f"generator.backend={backend}", f"generator.engine_python={engine_python(backend)}"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = read_metrics(run / "metrics.jsonl")
    accuracy = {row["step"]: row["eval/accuracy"] for row in rows if "eval/accuracy" in row}
    assert accuracy[0] < 0.4 and accuracy[max(accuracy)] > 0.9, accuracy
    # What the server says of its tokens is what the trainer computes of them, in every step.
    assert max(row.get("policy/rollout_logprob_abs_diff_max", 0.0) for row in rows) < 1e-2
    assert (run / "engines").is_dir()
    assert (run / "export" / "model.safetensors").is_file()
    print(f"{backend}: accuracy {accuracy[0]:.3f} -> {accuracy[max(accuracy)]:.3f}")
