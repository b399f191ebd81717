"""The documentation's tables of keys are the schema's, and the example is its printout."""

from __future__ import annotations

import re

from skyrl_train.config.example import VALUES
from skyrl_train.config.keys import schema_keys
from skyrl_train.config.tables import DOCS, main, type_text, value_text
from skyrl_train.engines.sglang.args import ARGUMENTS


def test_documents_and_example_are_up_to_date() -> None:
    assert main(["--check"]) == 0, "run: python -m skyrl_train.config.tables"


def test_the_configuration_page_has_every_key_once() -> None:
    text = (DOCS / "CONFIGURATION.md").read_text()
    rows: list[str] = []
    for prefix, table in re.findall(r"<!-- keys: (\S+) -->\n(.*?)<!-- end -->", text, re.DOTALL):
        rows += [f"{prefix}.{name}" for name in re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)]
    assert sorted(rows) == sorted(schema_keys())


def test_the_guide_has_every_argument() -> None:
    text = (DOCS / "SGLANG_INTEGRATION_GUIDE.md").read_text()
    generator = [row.field for row in ARGUMENTS if row.key.startswith("generator.")]
    assert [field for field in generator if f"| `{field}` |" not in text] == []


def test_types_and_ranges_are_spelled_out() -> None:
    assert type_text("trainer.seed") == "whole number ≥ 0"
    assert type_text("trainer.max_steps") == "whole number ≥ 1"
    assert type_text("generator.sampling_params.top_p") == "number > 0, ≤ 1"
    assert type_text("generator.backend") == "embedded, sglang, vllm"
    assert type_text("trainer.logger") == "list of text"


def test_values_are_written_as_yaml_writes_them() -> None:
    assert value_text(None) == "null"
    assert value_text(True) == "true"
    assert value_text((1, "a")) == "[1, a]"
    assert value_text(1e-6) == "1e-06"


def test_the_examples_values_are_for_keys_that_exist() -> None:
    assert set(VALUES) <= set(schema_keys())
