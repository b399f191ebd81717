"""The pages of the documentation, taken apart: commands, links, headings, keys, names, examples."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = (
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").glob("*/README.md")),
    ROOT / "benchmarks" / "README.md",
)
REFERENCE = ROOT / "docs" / "API_REFERENCE.md"

_FENCE = re.compile(r"^```.*?^```\n", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_CODE = re.compile(r"`([^`\n]+)`")
_EXAMPLE = re.compile(r"((?:^<!-- (?:run|prelude): \w+ -->\n)+)```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_MARK = re.compile(r"<!-- (run|prelude): (\w+) -->")


@dataclass(frozen=True, kw_only=True)
class Example:
    """A Python block and its marks: ("run", "embedded"), ("prelude", "server"), …; `line` is where it starts."""

    marks: tuple[tuple[str, str], ...]
    code: str
    line: int


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def main_commands(page: Path) -> list[list[str]]:
    """Of every command on a line of its own: the words behind `python -m skyrl_train.entrypoints.main_base`."""
    text = page.read_text().replace("\\\n", " ")
    commands = []
    for line in text.splitlines():
        words = line.strip().removeprefix("#").strip()
        if words.startswith("python -m skyrl_train.entrypoints.main_base"):
            commands.append(shlex.split(words, comments=True)[3:])
    return commands


def modules_run(page: Path) -> set[str]:
    """What `python -m …` names anywhere on the page."""
    return set(re.findall(r"python -m ([a-z_0-9.]+[a-z_0-9])", page.read_text()))


def links(page: Path) -> list[str]:
    return _LINK.findall(_FENCE.sub("", page.read_text()))


def anchors(page: Path) -> set[str]:
    """What a heading is called in a link, as GitHub makes it."""
    headings = _HEADING.findall(_FENCE.sub("", page.read_text()))
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def code_words(page: Path) -> Iterator[str]:
    """What stands in backticks, outside of blocks."""
    yield from _CODE.findall(_FENCE.sub("", page.read_text()))


def make_targets(page: Path) -> set[str]:
    return set(re.findall(r"(?:`|^    |&& )make ([a-z-]+)", page.read_text(), re.MULTILINE))


def examples(page: Path) -> list[Example]:
    text = page.read_text()
    return [
        Example(marks=tuple(_MARK.findall(found[1])), code=found[2], line=text.count("\n", 0, found.start(2)) + 1)
        for found in _EXAMPLE.finditer(text)
    ]


def preludes(kind: str) -> str:
    """What every example of this kind begins with: a server's begins as the embedded engine's does."""
    kinds = ("embedded", "server") if kind == "server" else ("embedded",)
    return "\n".join(
        example.code for name in kinds for example in examples(REFERENCE) if ("prelude", name) in example.marks
    )


def to_run(kind: str) -> list[Example]:
    return [example for example in examples(REFERENCE) if ("run", kind) in example.marks]
