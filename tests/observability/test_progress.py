"""Live mode runs in a real pseudo-terminal: what matters is what the terminal is sent, and how it is left."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import struct
import sys
import termios
from pathlib import Path

import pytest
from rich.console import Console

from skyrl_train.observability.live_view import Sample
from skyrl_train.observability.progress import Progress

HIDE, SHOW = b"\x1b[?25l", b"\x1b[?25h"
SCRIPT = """
import logging, os, sys, signal
from skyrl_train.observability.live_view import Sample
from skyrl_train.observability.progress import Progress
logging.basicConfig(level=logging.INFO)
with Progress("quickstart", 6, model="tiny", engine="embedded") as progress:
    progress.warm_start(5, 10, {"loss": 2.0})
    for step in range(1, 7):
        progress.phase("rollout")
        metrics = {"reward/mean": step / 10, "timing/rollout_s": 0.5, "timing/step_s": 0.6}
        progress.step(step, metrics, [Sample(prompt="1+1=", response="2", reward=1.0)])
        if step == 2:
            logging.warning("a log line")
            print("a printed line")
            progress.message("a message")
        if step == 4 and sys.argv[1] == "interrupt":
            # A shell that runs the tests in the background has them ignore it.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.kill(os.getpid(), signal.SIGINT)
        if step == 4 and sys.argv[1] == "raise":
            raise ValueError("engine gone")
logging.warning("after the view")
"""


def in_terminal(tmp_path: Path, how: str, **environment: str) -> tuple[int, bytes]:
    """Exit status and everything that the script wrote to an 80 x 24 terminal."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    pid, fd = pty.fork()
    if pid == 0:
        clean = {key: value for key, value in os.environ.items() if key not in {"NO_COLOR", "CI", "COLUMNS", "LINES"}}
        clean |= {"TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"} | environment
        os.execve(sys.executable, [sys.executable, str(script), how], clean)
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    written = b""
    while True:
        try:
            chunk = os.read(fd, 65536)
        except OSError:
            break
        if not chunk:
            break
        written += chunk
    os.close(fd)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), written


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize(
    ("how", "status", "state", "reached"),
    [("finish", 0, "done", 6), ("interrupt", -2, "interrupted", 4), ("raise", 1, "failed", 4)],
)
def test_the_terminal_is_left_clean_however_the_run_ends(
    tmp_path: Path, how: str, status: int, state: str, reached: int
) -> None:
    code, written = in_terminal(tmp_path, how)
    assert code == status
    assert written.count(HIDE) == 1
    assert written.rfind(SHOW) > written.rfind(HIDE)
    after = written[written.rfind(SHOW) :].decode()
    # The last picture stays, and one line under it says how it ended.
    assert f"quickstart: {state} at step {reached}/6 after" in after
    assert f"step {reached}/6" in written[: written.rfind(SHOW)].decode()
    if how == "raise":
        assert "ValueError: engine gone" in after
    # Lines from elsewhere stand on their own, whole, and the log goes straight to the terminal again afterwards.
    text = written.decode()
    for line in ("WARNING:root:a log line", "a printed line", "a message"):
        assert f"{line}" in text
    assert ("after the view" in after) == (how == "finish")


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize(
    "environment", [{"NO_COLOR": "1"}, {"CI": "true"}, {"TERM": "dumb"}, {"PYTHONIOENCODING": "ascii"}]
)
def test_a_terminal_that_can_not_gets_plain_lines(tmp_path: Path, environment: dict[str, str]) -> None:
    code, written = in_terminal(tmp_path, "finish", **environment)
    assert code == 0
    assert b"\x1b" not in written
    assert b"step 6/6  reward 0.600  0.60s" in written


def plain(clock_times: list[float] | None = None) -> tuple[Progress, io.StringIO]:
    out = io.StringIO()
    times = iter(clock_times or [])
    clock = (lambda: next(times)) if clock_times else (lambda: 0.0)
    progress = Progress("quickstart", 120, model="tiny", engine="embedded", console=Console(file=out), clock=clock)
    return progress, out


def test_where_there_is_no_terminal_each_step_is_a_line() -> None:
    progress, out = plain()
    with progress:
        progress.step(0, {"eval/accuracy": 0.344})
        progress.phase("rollout")
        progress.step(1, {"reward/mean": 0.5}, [Sample(prompt="1+1=", response="2", reward=1.0)])
        progress.message("checkpoint saved\nand exported")
        progress.step(2, {"reward/mean": 0.625, "eval/accuracy": 0.5})
    assert out.getvalue().splitlines() == [
        "run quickstart  model tiny  engine embedded  steps 120",
        "step   0/120  accuracy 34.4%",
        "step   1/120  reward 0.500",
        "checkpoint saved",
        "and exported",
        "step   2/120  reward 0.625  accuracy 50.0%",
        "quickstart: done at step 2/120 after 0.00s, held-out accuracy 34.4% → 50.0%",
    ]


def test_the_warm_start_prints_each_tenth() -> None:
    progress, out = plain()
    with progress:
        for step in range(1, 301):
            progress.warm_start(step, 300, {"loss": 3 / step, "accuracy": step / 600})
    shown = [line for line in out.getvalue().splitlines() if line.startswith("warm start")]
    assert len(shown) == 11
    assert shown[0] == "warm start 1/300  loss 3  accuracy 0.2%"
    assert shown[-1] == "warm start 300/300  loss 0.01  accuracy 50.0%"


def test_off_says_nothing() -> None:
    out = io.StringIO()
    with Progress("quickstart", 1, mode="off", console=Console(file=out)) as progress:
        progress.step(1, {})
        progress.message("hello")
    assert out.getvalue() == ""


def test_the_time_left_follows_the_pace_of_the_latest_steps() -> None:
    now = 0.0
    progress = Progress("r", 10, first_step=4, mode="plain", console=Console(file=io.StringIO()), clock=lambda: now)
    assert progress.seconds_left() is None
    progress.phase("rollout")
    now = 2.0
    progress.step(5, {})
    assert progress.seconds_left() == 2.0 * 5
    now = 3.0
    assert progress.seconds_left() == 2.0 * 5 - 1.0
    now = 6.0
    progress.step(6, {})
    assert progress.seconds_left() == 3.0 * 4


def test_a_resumed_run_shows_the_curves_of_the_steps_before() -> None:
    progress = Progress("r", 10, first_step=2, mode="plain", console=Console(file=io.StringIO()))
    progress.restore([{"step": 0, "eval/accuracy": 0.3}, {"step": 2, "reward/mean": None, "nonfinite": {"a": "nan"}}])
    with progress:
        progress.step(3, {"eval/accuracy": 0.6})
    assert progress.view.history["eval/accuracy"] == [(0, 0.3), (3, 0.6)]
    assert "held-out accuracy 30.0% → 60.0%" in progress.summary()


def test_the_number_of_steps_may_become_known_later() -> None:
    out = io.StringIO()
    with Progress("r", console=Console(file=out), clock=lambda: 0.0) as progress:
        progress.message("reading data")
        progress.set_total(8, first_step=5)
        progress.step(6, {})
    assert out.getvalue().splitlines() == [
        "run r",
        "reading data",
        "steps 8  done 5",
        "step 6/8",
        "r: done at step 6/8 after 0.00s",
    ]
