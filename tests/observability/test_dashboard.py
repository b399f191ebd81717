"""Every expression of the Grafana dashboard names series that real pages have, by labels that they have there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.observability.series import SCRAPES, series_of

DASHBOARD = Path(__file__).parents[2] / "examples" / "grafana" / "skyrl_train.json"
_SERIES = re.compile(r"\b((?:sglang:|vllm:|skyrl_|process_)[a-zA-Z0-9_:]+)(?:\{([^}]*)\})?")
_BY = re.compile(r"\bby \(([^)]*)\)")
ADDED_BY_PROMETHEUS = {"job", "instance", "le"}


def expressions() -> Iterator[tuple[str, str]]:
    for panel in panels():
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return found


@pytest.fixture(scope="module")
def real() -> dict[str, frozenset[str]]:
    """Of a run on two SGLang servers, of SGLang and of vLLM: series -> labels."""
    found: dict[str, frozenset[str]] = {}
    for path in sorted(SCRAPES.glob("*.txt")):
        for name, labels in series_of(path.read_text()).items():
            found[name] = found.get(name, frozenset()) | labels
    return found


@pytest.mark.parametrize(("title", "expression"), [*expressions()])
def test_an_expression_names_series_that_exist(title: str, expression: str, real: dict[str, frozenset[str]]) -> None:
    used = _SERIES.findall(expression)
    assert used, title
    for name, matchers in used:
        assert name in real, f"{title}: no page has {name}"
        for matcher in filter(None, matchers.split(",")):
            label = re.split(r"[=!~]", matcher, maxsplit=1)[0].strip()
            assert label in real[name] | ADDED_BY_PROMETHEUS, f"{title}: {name} has no label {label}"
        for group in _BY.findall(expression):
            for label in map(str.strip, group.split(",")):
                # vLLM's page is kept as the server gives it; the run's page puts `engine` on it.
                assert label in real[name] | ADDED_BY_PROMETHEUS | {"engine"}, f"{title}: {name} has no label {label}"


def test_the_dashboard_shows_the_run_its_engines_and_both_servers() -> None:
    named = [name for _, expression in expressions() for name, _ in _SERIES.findall(expression)]
    for prefix in ("skyrl_train_", "skyrl_engine_", "sglang:", "vllm:"):
        assert any(name.startswith(prefix) for name in named), prefix


def test_panels_do_not_overlap_and_have_names_of_their_own() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in panels():
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert taken.setdefault((x, y), panel["title"]) == panel["title"]
    ids = [panel["id"] for panel in panels()]
    assert len(ids) == len(set(ids))
