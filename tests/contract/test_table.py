"""The page about backends says what the suite's record says, and the record is of this suite."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

from tests.contract.backends import BACKENDS, LABELS, SETTINGS
from tests.contract.record import IN_PART, PASSED, RESULTS, summary
from tests.contract.under_test import SAYS_NO

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("capability_table", ROOT / "scripts" / "capability_table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_shows_the_record(script: ModuleType) -> None:
    assert script.main(["--check"]) == 0, "run: python scripts/capability_table.py"


def test_the_record_has_every_capability_that_the_suite_names_and_no_other() -> None:
    named = set[str]()
    for path in Path(__file__).parent.glob("test_*.py"):
        for name in re.findall(r'mark\.capability\(\s*"([^"]+)"', path.read_text()):
            named.add(name)
    rows = json.loads(RESULTS.read_text())["rows"]
    labels = [LABELS.get(setting, setting) for setting in SETTINGS]
    for name in named:
        pattern = re.escape(name).replace(re.escape("{setting}"), f"({'|'.join(labels)})")
        assert any(re.fullmatch(pattern, row) for row in rows), f"no line for {name!r}: `make capabilities`"
    templates = [re.escape(name).replace(re.escape("{setting}"), r"\w+") for name in named]
    for row, cells in rows.items():
        assert any(re.fullmatch(template, row) for template in templates), f"no test is a part of {row!r}"
        assert set(cells) == set(BACKENDS)


def test_a_line_is_in_part_where_some_cases_pass_and_some_are_refused() -> None:
    def outcome(backend: str, **more: str) -> dict[str, str]:
        return {"contract-row": "X", "contract-backend": backend, "contract-release": "1", **more}

    found = summary(
        [outcome("a"), outcome("a"), outcome("b"), outcome("b", contract=SAYS_NO), outcome("c", contract=SAYS_NO)]
    )
    assert found == {
        "releases": {"a": "1", "b": "1", "c": "1"},
        "rows": {"X": {"a": PASSED, "b": IN_PART, "c": SAYS_NO}},
    }
