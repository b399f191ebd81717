"""The table of capabilities in docs/BACKEND_SELECTION.md: `python scripts/capability_table.py [--check]`.

Rewrites what stands between `<!-- table: capabilities -->` and `<!-- end -->` from tests/contract/results.json, which
`make capabilities` writes when every case of the suite ran and passed. `--check` only compares.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "BACKEND_SELECTION.md"
RESULTS = ROOT / "tests" / "contract" / "results.json"
NAMES = {"embedded": "embedded", "sglang": "SGLang", "vllm": "vLLM"}
CELLS = {"passed": "yes", "says it can't": "no", "passed in part": "in part", "has no server": "—"}
NOT_RUN = "not run"

_BLOCK = re.compile(r"(<!-- table: capabilities -->\n).*?(<!-- end -->)", re.DOTALL)


def table(results: dict[str, Any]) -> str:
    """One line a capability, one column a backend with the release that was tested."""
    releases = results["releases"]
    heads = [f"{NAMES[backend]} {releases.get(backend, '')}".strip() for backend in NAMES]
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    for capability, cells in results["rows"].items():
        values = [CELLS[cells[backend]] if backend in cells else NOT_RUN for backend in NAMES]
        lines.append(f"| {capability} | " + " | ".join(values) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str]) -> int:
    text = PAGE.read_text()
    wanted, count = _BLOCK.subn(lambda m: m[1] + table(json.loads(RESULTS.read_text())) + m[2], text)
    assert count == 1, f"{PAGE} has {count} places for the table"
    if "--check" in arguments:
        return int(wanted != text)
    PAGE.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
