"""The files of examples/sglang, and the commands of the documentation, as a user types them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from skyrl_train.config import load_config
from skyrl_train.config.compose import flatten
from skyrl_train.config.keys import schema_groups, schema_keys
from skyrl_train.engines.sglang.args import ARGUMENTS

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "sglang"
FULL, SPECULATIVE = "sglang_full_config_example", "sglang_speculative_decoding_example"


def run(*argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "skyrl_train.entrypoints.main_base", *argv]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False)


def paths_of(name: str) -> dict[str, object]:
    return dict(flatten(yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text())))


@pytest.mark.parametrize("name", [FULL, SPECULATIVE])
def test_every_key_of_an_example_exists(name: str) -> None:
    assert [path for path in paths_of(name) if path not in schema_keys()] == []


@pytest.mark.parametrize("name", [FULL, SPECULATIVE])
def test_an_example_loads_without_warnings(name: str) -> None:
    assert load_config(["--config-path", str(EXAMPLES), "--config-name", name]).warnings == ()


def test_the_full_example_has_every_sglang_key() -> None:
    written = set(paths_of(FULL))
    assert {row.key for row in ARGUMENTS} - written == set()
    assert {path for path in schema_keys() if path.startswith("generator.")} - written == set()


def test_each_key_of_the_full_example_is_documented_in_place() -> None:
    lines = (EXAMPLES / f"{FULL}.yaml").read_text().splitlines()
    keys = [index for index, line in enumerate(lines) if line.strip() and not line.strip().startswith("#")]
    undocumented = [lines[index] for index in keys if not lines[index - 1].strip().startswith("#")]
    assert undocumented == []


def test_the_full_example_is_grouped_as_the_schema() -> None:
    tree = yaml.safe_load((EXAMPLES / f"{FULL}.yaml").read_text())
    groups = [name for name, value in tree["generator"].items() if isinstance(value, dict) and value]
    schema = [
        path.removeprefix("generator.") for path in schema_groups() if path.count(".") == 1 and "generator." in path
    ]
    assert groups == schema


def test_the_speculative_example_has_ngram_on_and_three_more_ready() -> None:
    text = (EXAMPLES / f"{SPECULATIVE}.yaml").read_text()
    config = load_config(["--config-path", str(EXAMPLES), "--config-name", SPECULATIVE]).config
    assert config.generator.speculative_decoding.enabled
    assert config.generator.speculative_decoding.algorithm == "ngram"
    tree = yaml.safe_load(text)
    for block in _commented_blocks(text):
        tree["generator"]["speculative_decoding"] = block["speculative_decoding"]
        overrides = [f"++{path}={json.dumps(value)}" for path, value in flatten(tree)]
        assert (
            load_config(overrides).config.generator.speculative_decoding.algorithm
            == block["speculative_decoding"]["algorithm"]
        )


def _commented_blocks(text: str) -> list[dict[str, dict[str, object]]]:
    """What a user gets by taking the comment marks of one block away."""
    blocks: list[list[str]] = []
    for line in text.splitlines():
        bare = line.removeprefix("  # ")
        if bare == "speculative_decoding:":
            blocks.append([bare])
        elif blocks and line.startswith("  #   ") and blocks[-1][-1] is not None:
            blocks[-1].append(bare)
    found = [yaml.safe_load("\n".join(block)) for block in blocks]
    assert [block["speculative_decoding"]["algorithm"] for block in found] == ["eagle3", "eagle", "standalone"]
    return found


@pytest.mark.parametrize("name", [FULL, SPECULATIVE])
def test_running_an_example_without_gpu_and_sglang_ends_in_the_report(name: str) -> None:
    done = run("--config-path", "examples/sglang", "--config-name", name, cwd=ROOT)
    assert done.returncode == 2, done.stderr
    assert "This machine can't run this configuration; nothing was started." in done.stderr
    assert "needs 1 GPU" in done.stderr
    assert "needs sglang" in done.stderr
    assert len(done.stderr.splitlines()) <= 24


def test_a_copy_runs_from_the_current_directory_with_overrides(tmp_path: Path) -> None:
    shutil.copy(EXAMPLES / f"{FULL}.yaml", tmp_path / "my_config.yaml")
    mine = ("--config-path", ".", "--config-name", "my_config")
    assert run(*mine, cwd=tmp_path).returncode == 2
    done = run(*mine, "--explain=json", "trainer.seed=7", "generator.metrics.enabled=false", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    tree = json.loads(done.stdout)
    assert tree["keys"]["trainer.seed"]["value"] == 7
    assert tree["keys"]["generator.backend"]["source"] == "my_config.yaml"
    assert [path.name for path in tmp_path.iterdir()] == ["my_config.yaml"]  # nothing was started or written


def test_the_main_job_explains_itself(tmp_path: Path) -> None:
    done = run("--explain", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "builtin:arithmetic" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_another_backend_by_override_ends_in_the_report(tmp_path: Path) -> None:
    done = run("generator.backend=vllm", "trainer.seed=7", cwd=tmp_path)
    assert done.returncode == 2
    assert "needs vllm" in done.stderr


def test_a_typing_mistake_ends_with_one_line_and_code_2(tmp_path: Path) -> None:
    done = run("trainer.sed=7", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: unknown key trainer.sed: did you mean trainer.seed? (override trainer.sed=7)\n"


def test_importing_the_configuration_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; import skyrl_train.config, skyrl_train.config.explain; "
        "print(sorted({'torch', 'transformers', 'sglang', 'vllm', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
