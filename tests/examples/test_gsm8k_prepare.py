import json
import subprocess
import sys
from pathlib import Path

import pytest

from skyrl_train.data.rows import read_rows
from skyrl_train.environments.base import find_environment

ROOT = Path(__file__).parents[2]


def prepare(source: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "examples/gsm8k/prepare.py", "--source", str(source), "--out", str(out)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "raw"
    folder.mkdir()
    rows = {
        "train": [("Ann has 3 apples and buys 4. How many?", "3+4=<<3+4=7>>7\n#### 7")],
        "test": [("A car costs 500 twice over. Total?", "500*2=<<500*2=1000>>1,000\n#### 1,000")],
    }
    for split, pairs in rows.items():
        lines = [json.dumps({"question": q, "answer": a}) for q, a in pairs]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_prepared_rows_are_read_back_and_scored_by_the_environment(source: Path, tmp_path: Path) -> None:
    done = prepare(source, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    (row,) = read_rows([str(tmp_path / "out" / "test.parquet")], environment="arithmetic")
    assert row.environment == "gsm8k" and row.target == "1000"
    assert row.messages[0]["content"].startswith("A car costs 500 twice over. Total? Let's think")
    environment = find_environment(row.environment)(env_config=None, extras=dict(row.extras))
    assert environment.step("500 and 500 make\n#### $1,000.00")["reward"] == 1.0


def test_a_row_without_an_answer_is_named(source: Path, tmp_path: Path) -> None:
    (source / "train.jsonl").write_text('{"question": "What?", "answer": "no result"}\n')
    done = prepare(source, tmp_path / "out")
    assert done.returncode != 0 and "train row 0: the answer has no '####'" in done.stderr


def test_a_folder_without_the_files_says_what_to_give(tmp_path: Path) -> None:
    done = prepare(tmp_path, tmp_path / "out")
    assert done.returncode == 2 and "--source" in done.stderr
