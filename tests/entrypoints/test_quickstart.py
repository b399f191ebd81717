"""The promise of the quickstart, with nothing made smaller."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from skyrl_train.observability.metrics import read_metrics

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_main_job_learns_to_add_within_two_gibibytes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "skyrl_train.entrypoints.main_base", f"trainer.run_path={tmp_path / 'run'}"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "SKYRL_TRAIN_CACHE": str(tmp_path)}
    )
    assert done.returncode == 0, done.stderr
    assert "warm start" in done.stdout, "the supervised phase must be seen"
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    accuracy = {row["step"]: row["eval/accuracy"] for row in rows if "eval/accuracy" in row}
    assert accuracy[0] < 0.4 and accuracy[max(accuracy)] > 0.9, accuracy
    # Linux counts in KiB; the children of this process are the run and nothing larger.
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 2 * 2**20
    seconds = sum(row["timing/step_s"] for row in rows)
    print(json.dumps({"accuracy": accuracy, "seconds_in_steps": round(seconds, 1)}))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_trained_model_answers_through_the_endpoint(tmp_path: Path) -> None:
    """One short run, exported, served, asked."""
    import httpx

    run_path = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "skyrl_train.entrypoints.main_base",
        f"trainer.run_path={run_path}",
        "trainer.max_steps=2",
        "trainer.eval_interval=-1",
    ]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    serve = [sys.executable, "-m", "skyrl_train.entrypoints.serve", str(run_path / "export"), "--port", "0"]
    with subprocess.Popen(serve, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        try:
            assert server.stdout is not None
            url = next(word for line in server.stdout for word in line.split() if word.startswith("http://"))
            body = {"messages": [{"role": "user", "content": "What is 23 + 48?"}], "max_tokens": 8, "temperature": 0}
            answer = httpx.post(f"{url}/chat/completions", json=body, timeout=60)
            assert answer.status_code == 200, answer.text
            assert answer.json()["choices"][0]["message"]["content"].strip().isdigit()
        finally:
            server.terminate()
