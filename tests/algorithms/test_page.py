"""docs/ALGORITHMS.md says what the functions say, of all of them, and names keys that exist."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("algorithms_page", ROOT / "scripts" / "algorithms_page.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date(script: ModuleType) -> None:
    assert script.main(["--check"]) == 0, "run: python scripts/algorithms_page.py"


def test_every_function_has_its_row_and_every_estimator_and_loss_its_paper(script: ModuleType) -> None:
    text = (ROOT / "docs" / "ALGORITHMS.md").read_text()
    for name, (_, functions) in script.TABLES.items():
        table = re.search(rf"<!-- table: {name} -->\n(.*?)\n\n", text, re.DOTALL)
        assert table is not None, name
        rows = dict(re.findall(r"^\| `([^`]+)` (\|.*)$", table[1], re.MULTILINE))
        assert list(rows) == list(functions)
        if name in ("estimators", "losses"):
            assert all("https://arxiv.org/abs/" in row for row in rows.values())


def test_an_option_that_no_key_sets_is_an_error(script: ModuleType) -> None:
    assert script.option_key("clip_cov_ratio") == "clip_cov.clip_ratio"
    with pytest.raises(KeyError, match="no_such_option"):
        script.option_key("no_such_option")


def test_the_page_names_only_keys_and_files_that_exist(script: ModuleType) -> None:
    text = (ROOT / "docs" / "ALGORITHMS.md").read_text()
    keys = script.schema_keys()
    for found in re.findall(r"`((?:trainer|generator|data|environment)\.[a-z_.]+[a-z_])`", text):
        assert any(key == found or key.startswith(f"{found}.") for key in keys), found
    for name in re.findall(r"--config-name ([a-z_]+)", text):
        assert (ROOT / "examples" / "recipes" / f"{name}.yaml").exists()
