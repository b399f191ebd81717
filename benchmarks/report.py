"""A run's table and its raw log, side by side in results/."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


class Report:
    """What a run prints goes to the log; what it concludes goes to the table's page. Both are written by `save`."""

    def __init__(self, title: str, file_stem: str, folder: Path = RESULTS) -> None:
        self._log = [f"$ {command_line()}"]
        self._page = [f"# {title}", ""]
        self._stem = folder / file_stem
        self._start = time.perf_counter()
        print(self._log[0], flush=True)

    def log(self, text: str) -> None:
        line = f"[{time.perf_counter() - self._start:7.1f} s] {text}"
        print(line, flush=True)
        self._log.append(line)

    def text(self, paragraph: str) -> None:
        self._page += [paragraph, ""]

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        for row in rows:
            if len(row) != len(head):
                raise ValueError(f"the table has {len(head)} columns, found a row of {len(row)}: {list(row)}")
        self._page += ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
        self._page += ["| " + " | ".join(row) + " |" for row in rows]
        self._page.append("")

    def facts(self, rows: Mapping[str, str]) -> None:
        self.table(("", ""), [(name, value) for name, value in rows.items()])

    @property
    def page(self) -> str:
        return "\n".join(self._page)

    def save(self) -> Path:
        """Print the page; write it as .md and the log beside it as .log. The page's path."""
        self._stem.parent.mkdir(parents=True, exist_ok=True)
        page, log = self._stem.with_name(self._stem.name + ".md"), self._stem.with_name(self._stem.name + ".log")
        self.text(f"Made by `{command_line()}`; the raw log is [{log.name}]({log.name}).")
        print(f"\n{self.page}", flush=True)
        page.write_text(self.page)
        log.write_text("\n".join(self._log) + "\n")
        return page


ABOUT_THIS_MACHINE = ("--out", "--runs", "--work", "--budget-s")
"""Options of where things go and how long it may take: no part of what was measured."""


def command_line() -> str:
    spec = sys.modules["__main__"].__spec__  # what `python -m` runs
    found = spec.name if spec is not None else ""
    module = found if found.startswith("benchmarks.") else f"benchmarks.{Path(sys.argv[0]).stem}"
    argv = sys.argv[1:]
    kept = [
        word
        for before, word in zip(["", *argv], argv, strict=False)
        if not word.startswith(ABOUT_THIS_MACHINE) and before not in ABOUT_THIS_MACHINE
    ]
    return " ".join(["python", "-m", module, *kept])


def rate(tokens: int, seconds: float) -> str:
    return f"{tokens / seconds:,.0f}"
