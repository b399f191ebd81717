"""docs/ALGORITHMS.md from the docstrings: `python scripts/algorithms_page.py [--check]`.

Rewrites what stands between `<!-- table: NAME -->` (a registry's functions) or `<!-- doc: module:Name -->` (one
docstring) and `<!-- end -->`. `--check` only compares.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from skyrl_train.algorithms.advantages import ADVANTAGE_ESTIMATORS
from skyrl_train.algorithms.kl import KL_ESTIMATORS
from skyrl_train.algorithms.policy_losses import POLICY_LOSSES
from skyrl_train.algorithms.reductions import LOSS_REDUCTIONS
from skyrl_train.algorithms.registry import LOSS_GROUPS, RENAMED
from skyrl_train.algorithms.selections import SELECTIONS
from skyrl_train.config.keys import schema_keys
from skyrl_train.extension import load_object

PAGE = Path(__file__).parents[1] / "docs" / "ALGORITHMS.md"
TABLES: Mapping[str, tuple[str, Mapping[str, Callable[..., Any]]]] = {
    "estimators": ("trainer.algorithm.advantage_estimator", ADVANTAGE_ESTIMATORS),
    "losses": ("trainer.algorithm.policy_loss_type", POLICY_LOSSES),
    "selections": ("trainer.algorithm.policy_loss_type", SELECTIONS),
    "reductions": ("trainer.algorithm.loss_reduction", LOSS_REDUCTIONS),
    "kl": ("trainer.algorithm.kl_estimator_type", KL_ESTIMATORS),
}
ELSEWHERE = {"max_seq_len": "generator.sampling_params.max_generate_length"}
"""Options whose key is not under trainer.algorithm."""

NO_KEY = ("seed",)
"""What a function is given that nobody sets."""

_BLOCK = re.compile(r"(<!-- (table|doc): (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
_PAPER = re.compile(r"arXiv:(\d{4}\.\d{4,5})")


def registry_table(name: str) -> str:
    """A table of the registry's functions, then each docstring whole."""
    key, functions = TABLES[name]
    lines = ["| name | what it is | options | paper |", "|---|---|---|---|"]
    details = []
    for entry, function in functions.items():
        text = docstring(function)
        what = re.sub(r"\s*:?\s*\[[TN]\] float\d+\.?$", ".", " ".join(text.split("\n\n")[0].split()))
        papers = ", ".join(dict.fromkeys(_link(number) for number in _PAPER.findall(text))) or "—"
        lines.append(f"| `{entry}` | {_cell(what)} | {options(function)} | {papers} |")
        details.append(f"`{key}={entry}`\n\n```text\n{text}\n```")
    return "\n".join(lines) + "\n\n" + "\n\n".join(details) + "\n"


def options(function: Callable[..., Any]) -> str:
    """The keys that the function reads, with its own defaults."""
    found = []
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY and name not in NO_KEY:
            default = "" if parameter.default is parameter.empty else f" = {parameter.default}"
            found.append(f"`{option_key(name)}`{default}")
    return "<br>".join(found) or "—"


def option_key(name: str) -> str:
    """Where an option stands in the configuration, without `trainer.algorithm.`; raises KeyError if nowhere."""
    if name in ELSEWHERE:
        return ELSEWHERE[name]
    renamed = {option: key for key, option in RENAMED.items()}
    for path in (renamed.get(name, name), *(f"{group}.{name}" for group in LOSS_GROUPS)):
        if f"trainer.algorithm.{path}" in schema_keys():
            return path
    raise KeyError(f"option {name!r} is not a key of trainer.algorithm")


def docstring(found: Any) -> str:
    """Raises ValueError where there is none: the page has nothing to say then."""
    text = inspect.getdoc(found)
    if not text:
        raise ValueError(f"{found!r} has no docstring")
    return text


def page(text: str) -> str:
    """The page with its blocks made anew."""

    def block(match: re.Match[str]) -> str:
        start, kind, name, end = match.groups()
        if kind == "table":
            return f"{start}{registry_table(name)}{end}"
        return f"{start}```text\n{docstring(load_object(name, wanted='docs'))}\n```\n{end}"

    return _BLOCK.sub(block, text)


def main(argv: Sequence[str]) -> int:
    before = PAGE.read_text(encoding="utf-8")
    after = page(before)
    if "--check" in argv:
        if before != after:
            print(f"{PAGE.name} is not what the docstrings say; run: python scripts/algorithms_page.py")
        return int(before != after)
    PAGE.write_text(after, encoding="utf-8")
    return 0


def _link(number: str) -> str:
    return f"[{number}](https://arxiv.org/abs/{number})"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
