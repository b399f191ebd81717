"""What a page in Prometheus' format has, without its numbers, as it is kept in `scrapes/`.

    # TYPE sglang:num_running_reqs gauge
    sglang:num_running_reqs engine_type model_name …          the series, and the labels that it has

A run's page changes with every look; which series it has does not. The pages are written by
tests/engines/test_observability.py when SKYRL_KEEP_SCRAPES=1 is set, from running servers.
"""

from __future__ import annotations

from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

SCRAPES = Path(__file__).parent / "scrapes"


def outline(page: str) -> str:
    """The page's families and series, sorted, with the names of their labels."""
    lines = []
    for family in sorted(text_string_to_metric_families(page), key=lambda family: family.name):
        lines.append(f"# TYPE {family.name} {family.type}")
        labels: dict[str, set[str]] = {}
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
        lines += [" ".join((name, *sorted(names))) for name, names in sorted(labels.items())]
    return "\n".join(lines) + "\n"


def series_of(kept: str) -> dict[str, frozenset[str]]:
    """The series of an outline -> their labels."""
    rows = [line.split() for line in kept.splitlines() if not line.startswith("#")]
    found: dict[str, frozenset[str]] = {}
    for name, *labels in rows:
        found[name] = found.get(name, frozenset()) | frozenset(labels)
    return found
