"""A picture of a run's report: `python scripts/capture_report.py runs/quickstart` writes docs/images/report.png.

The report is written anew, opened in headless chromium, and the picture reduced to a palette so that it stays
under --max-kib.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from skyrl_train.observability.report import write_report

OUT = Path(__file__).parents[1] / "docs" / "images" / "report.png"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--virtual-time-budget=3000",
)


def screenshot(page: Path, out: Path, *, width: int, height: int, scale: float, theme: str) -> None:
    """Raises SystemExit, saying why, when there is no browser or it made no picture."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise SystemExit(f"no browser found, looked for {', '.join(BROWSERS)}; on Debian: apt-get install chromium")
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, *FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"]
        command += [f"--force-device-scale-factor={scale}", f"--screenshot={out}"]
        command.append(f"{page.resolve().as_uri()}#theme={theme}")
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode != 0 or not out.is_file():
        raise SystemExit(f"{browser} made no picture (exit {done.returncode}): {done.stderr[-1000:]}")


def reduce(path: Path, max_bytes: int) -> None:
    """Fewer colours until the file is small enough: a page of flat colours hardly changes."""
    with Image.open(path) as image:
        picture = image.convert("RGB")
    for colors in (256, 128, 64, 32):
        picture.quantize(colors, dither=Image.Dither.NONE).save(path, optimize=True)
        if path.stat().st_size <= max_bytes:
            return
    sys.exit(f"{path} is {path.stat().st_size} bytes with 32 colours, over {max_bytes}: lower --scale or --height")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=1600)
    parser.add_argument("--scale", type=float, default=1.5, help="pixels of the picture per pixel of the page")
    parser.add_argument("--theme", choices=("light", "dark"), default="light")
    parser.add_argument("--max-kib", type=int, default=300)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    page = write_report(args.run_dir)
    screenshot(page, args.out, width=args.width, height=args.height, scale=args.scale, theme=args.theme)
    reduce(args.out, args.max_kib * 1024)
    print(f"{args.out} ({args.out.stat().st_size / 1024:.0f} KiB)")


if __name__ == "__main__":
    main()
