"""Several servers' pages in one: families stand together, each sample names its engine, no value is touched."""

from __future__ import annotations

import re

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from skyrl_train.engines.joined import joined_metrics


def page(scale: float) -> str:
    registry = CollectorRegistry()
    Gauge("sglang:num_running_reqs", "Running.", ("model_name",), registry=registry).labels('a "b" {c}\\').set(scale)
    Gauge("plain", "No label.", registry=registry).set(2 * scale)
    histogram = Histogram("sglang:e2e_seconds", "Whole.", ("engine", "x"), buckets=(0.1, 1), registry=registry)
    histogram.labels("0", ',engine="y"').observe(scale)
    Counter("sglang:tokens", "Tokens.", registry=registry).inc(scale)
    return generate_latest(registry).decode()


def samples(text: str) -> dict[str, list[Sample]]:
    return {family.name: family.samples for family in text_string_to_metric_families(text)}


def test_every_sample_of_every_engine_is_there_once_with_its_name() -> None:
    pages = {"sglang-0": page(0.5), "sglang-1": page(3.25)}
    joined = joined_metrics(pages)
    found = samples(joined)
    assert found.keys() == samples(pages["sglang-0"]).keys()
    for name, both in found.items():
        for engine, text in pages.items():
            mine = [s for s in both if s.labels["engine"] == engine]
            wanted = samples(text)[name]
            assert [(s.name, s.value) for s in mine] == [(s.name, s.value) for s in wanted]
            for got, was in zip(mine, wanted, strict=True):
                labels = {("exported_engine" if key == "engine" else key): value for key, value in was.labels.items()}
                assert got.labels == {**labels, "engine": engine}
    assert joined.count("# TYPE sglang:e2e_seconds histogram") == 1


def test_families_stand_together() -> None:
    lines = joined_metrics({"a": page(1), "b": page(2)}).splitlines()
    names = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert len(names) == len(set(names))
    for name in names:
        of_it = re.compile(re.escape(name) + r"(_bucket|_sum|_count)?\{")
        places = [i for i, line in enumerate(lines) if of_it.match(line)]
        assert places == list(range(places[0], places[-1] + 1)), name


def test_a_page_that_is_empty_adds_nothing() -> None:
    assert joined_metrics({"a": "", "b": "x 1\n"}) == 'x{engine="b"} 1\n'
