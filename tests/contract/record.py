"""What passed, by capability and backend: the data of the table in docs/BACKEND_SELECTION.md.

A run in which every case of this folder ran and passed is compared with `results.json`, or written there when
SKYRL_WRITE_CAPABILITIES=1 (`make capabilities`). A capability that went or came without the file saying so fails the
run: the table is what passed, and nothing else.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
PASSED, IN_PART = "passed", "passed in part"


class Record:
    """Collects the outcome of each case while a session runs."""

    def __init__(self) -> None:
        self._planned: set[str] = set()
        self._all_planned = True
        self._outcomes: dict[str, dict[str, str]] = {}
        self._failed: set[str] = set()
        self._message: str | None = None

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        if any(_is_case(item) for item in items):
            self._all_planned = False

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        cases = [item for item in session.items if _is_case(item)]
        self._planned = {item.nodeid for item in cases}
        files = {path for path in HERE.glob("test_*.py") if "case: Case" in path.read_text()}
        named = any("::" in argument for argument in session.config.args)
        if named or files - {item.path for item in cases}:
            self._all_planned = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.nodeid not in self._planned:
            return
        if report.outcome != "passed":
            self._failed.add(report.nodeid)
        self._outcomes.setdefault(report.nodeid, {}).update(
            {name: value for name, value in report.user_properties if name.startswith("contract")}
        )

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if not self._all_planned or not self._planned or self._failed or set(self._outcomes) != self._planned:
            return
        found = summary(self._outcomes.values())
        if os.environ.get("SKYRL_WRITE_CAPABILITIES") == "1":
            RESULTS.write_text(json.dumps(found, indent=2) + "\n")
            self._message = f"{RESULTS.name} was written; scripts/capability_table.py puts it into the page"
        elif (known := json.loads(RESULTS.read_text())) != found:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
            self._message = "what passed is not what results.json says (`make capabilities` writes it):\n" + "\n".join(
                differences(known, found)
            )

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self._message is not None:
            terminalreporter.section("capabilities")
            terminalreporter.write_line(self._message)


def summary(outcomes: Any) -> dict[str, Any]:
    """{"releases": {backend: release}, "rows": {capability: {backend: value}}}, in the order of the tests."""
    releases: dict[str, str] = {}
    values: dict[str, dict[str, set[str]]] = {}
    for outcome in outcomes:
        backend = outcome["contract-backend"]
        releases[backend] = outcome["contract-release"]
        row = values.setdefault(outcome["contract-row"], {})
        row.setdefault(backend, set()).add(outcome.get("contract", PASSED))
    rows = {
        name: {backend: next(iter(found)) if len(found) == 1 else IN_PART for backend, found in sorted(row.items())}
        for name, row in sorted(values.items())
    }
    return {"releases": dict(sorted(releases.items())), "rows": rows}


def differences(known: dict[str, Any], found: dict[str, Any]) -> list[str]:
    lines = []
    if known["releases"] != found["releases"]:
        lines.append(f"releases: {known['releases']} before, {found['releases']} now")
    for name in sorted({*known["rows"], *found["rows"]}):
        before, now = known["rows"].get(name), found["rows"].get(name)
        if before != now:
            lines.append(f"{name}: {before} before, {now} now")
    return lines


def _is_case(item: pytest.Item) -> bool:
    return "case" in getattr(item, "fixturenames", ())
