"""The scripts that make the README's pictures, on a synthetic run."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from .synthetic_run import write_run

SCRIPTS = Path(__file__).parents[2] / "scripts"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def run_script(name: str, *args: str) -> str:
    command = [sys.executable, str(SCRIPTS / name), *args]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_the_terminal_picture_shows_the_recorded_run_and_fetches_nothing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=30)
    out = tmp_path / "images" / "terminal.svg"
    run_script("capture_terminal.py", str(run), "--out", str(out))
    picture = out.read_text(encoding="utf-8")
    assert "@font-face" not in picture and "url(http" not in picture and "href" not in picture
    text = html.unescape("".join(re.findall(r"<text[^>]*>([^<]*)</text>", picture))).replace("\N{NO-BREAK SPACE}", " ")
    assert "step 20/30" in text
    assert "held-out accuracy" in text and "last rollouts" in text
    first = picture
    run_script("capture_terminal.py", str(run), "--out", str(out))
    assert out.read_text(encoding="utf-8") == first


@pytest.mark.skipif(not any(map(shutil.which, BROWSERS)), reason="no chromium on this machine (.ci/run installs it)")
def test_the_report_picture_is_small_enough_for_a_readme(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=30)
    out = tmp_path / "images" / "report.png"
    run_script("capture_report.py", str(run), "--out", str(out), "--height", "1000", "--scale", "1")
    assert out.stat().st_size < 300 * 1024
    with Image.open(out) as image:
        assert image.size == (1280, 1000)
        # A blank page has a handful of colours.
        assert len(image.convert("RGB").getcolors(maxcolors=1 << 20) or []) > 60
