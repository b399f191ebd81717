"""One self-contained HTML file: style, script and data inside, nothing fetched."""

from __future__ import annotations

import html
import json
import re
from importlib.resources import files
from pathlib import Path

from skyrl_train.observability.files import replace_file
from skyrl_train.observability.report.collect import PageData, collect

REPORT_NAME = "report.html"


def write_report(run_dir: Path | str) -> Path:
    """Write run_dir/report.html from config.yaml, metrics.jsonl and rollouts/, as far as they are there.

    Raises DataError when `run_dir` is not the folder of a run, or its metrics are damaged.
    """
    run_dir = Path(run_dir)
    path = run_dir / REPORT_NAME
    replace_file(path, render_page(collect(run_dir)).encode("utf-8"))
    return path


def render_page(data: PageData) -> str:
    """The page's HTML. Everything from the run travels as JSON and becomes text nodes, never markup."""
    parts = {
        "TITLE": html.escape(f"{data['run']} · skyrl_train"),
        "STYLE": _part("page.css"),
        "SCRIPT": "\n".join(_part(name) for name in ("charts.js", "rollouts.js", "page.js")),
        "DATA": _json_in_html(data),
    }
    # In one pass: what comes from the run may look like a placeholder.
    return re.sub(r"%%([A-Z]+)%%", lambda match: parts[match[1]], _part("page.html"))


def _json_in_html(data: PageData) -> str:
    # Within <script>, "</script" and "<!--" are all that HTML looks at: no "<" is left. Lone halves of surrogate
    # pairs have no UTF-8; ensure_ascii keeps them, and the line separators of JavaScript, as escapes.
    return json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _part(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")
