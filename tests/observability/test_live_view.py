from __future__ import annotations

import io
import random

import pytest
from rich.cells import cell_len
from rich.console import Console

from skyrl_train.observability.curves import plot, resample, sparkline
from skyrl_train.observability.live_view import RunView, Sample, WarmStart, one_line, phase_seconds, render
from skyrl_train.observability.text import duration, number

from .synthetic_run import step_metrics


def screen(view: RunView, width: int, height: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True, color_system=None)
    with console.capture() as capture:
        console.print(render(view, width, height))
    return capture.get().splitlines()


def learned(steps: int = 34, total: int = 120) -> RunView:
    rng = random.Random(0)
    view = RunView(run_name="quickstart", total_steps=total, model="tiny-qwen2 0.9M", engine="embedded", eta_s=112.0)
    view.warm_start = WarmStart(step=300, total=300, metrics={"loss": 0.532, "accuracy": 0.361})
    view.record(0, {"eval/accuracy": 0.344}, ())
    for step in range(1, steps + 1):
        samples = [Sample(prompt=f"What is {step} + {i}?", response=str(step + i), reward=1.0) for i in range(3)]
        view.record(step, step_metrics(rng, step, total), samples)
    view.phase = "rollout"
    return view


@pytest.mark.parametrize("width", [24, 40, 60, 80, 100, 120, 200])
@pytest.mark.parametrize("height", [8, 12, 16, 23, 30, 50])
def test_the_view_fits_the_terminal(width: int, height: int) -> None:
    lines = screen(learned(), width, height)
    assert len(lines) <= height
    assert {cell_len(line) for line in lines} == {min(width, 120)}
    assert lines[0].startswith("╭") and lines[-1].startswith("╰")


def test_a_terminal_of_80_by_24_shows_header_curves_phases_and_rollouts() -> None:
    text = "\n".join(screen(learned(), 80, 23))
    for wanted in (
        "skyrl_train · quickstart",
        "model tiny-qwen2 0.9M  engine embedded",
        "left 1:52",
        "step 34/120",
        "warm start",
        "accuracy 36.1%",
        "held-out accuracy",
        "from 34.4%",
        "rollout tokens/s",
        "last step",
        "weight_sync",
        "What is 34 + 2? → 36",
    ):
        assert wanted in text, wanted
    assert "…" not in text


def test_a_large_terminal_draws_plots_and_a_small_one_lines() -> None:
    def has_plot(lines: list[str]) -> bool:
        return any("\u2801" <= c <= "\u28ff" for line in lines for c in line)

    assert has_plot(screen(learned(), 120, 40))
    assert not has_plot(screen(learned(), 80, 23))
    assert any("▁" in line and "█" in line for line in screen(learned(), 80, 23))


def test_the_view_of_a_run_that_has_not_begun_is_its_header() -> None:
    view = RunView(run_name="quickstart", total_steps=120)
    lines = screen(view, 80, 23)
    assert "step 0/120" in lines[2] and "starting" in lines[2]
    assert len(lines) == 5


def test_the_warm_start_is_shown_while_it_runs() -> None:
    view = RunView(run_name="quickstart", total_steps=120, phase="warm start")
    view.warm_start = WarmStart(step=120, total=300, metrics={"loss": 0.532, "accuracy": 0.21})
    text = "\n".join(screen(view, 80, 23))
    assert "120/300  loss 0.532  accuracy 21.0%" in text
    assert view.warming
    view.record(1, {}, ())
    assert not view.warming


def test_values_that_are_not_finite_do_not_break_the_view() -> None:
    view = learned(3)
    view.record(4, {"reward/mean": float("nan"), "eval/accuracy": float("inf"), "policy/loss": float("nan")}, ())
    for width, height in ((80, 23), (120, 40)):
        assert "nan" in "\n".join(screen(view, width, height))


def test_model_text_can_not_move_the_cursor_or_open_markup() -> None:
    view = learned(1)
    view.samples = (Sample(prompt="[bold]a\nb\x1b[2J", response="\x07ok\r\u202e[/]", reward=0.0),)
    text = "\n".join(screen(view, 100, 30))
    assert "[bold]a⏎b\N{REPLACEMENT CHARACTER}[2J" in text
    assert not any(c in text for c in "\x1b\x07\r\u202e")
    assert one_line(" a\tb \n") == "a b"


def test_phases_are_the_top_level_timings() -> None:
    metrics = {
        "timing/rollout_s": 1.0,
        "timing/train_s": 2.0,
        "timing/train/forward_s": 0.5,
        "timing/step_s": 3.5,
        "x": 1,
    }
    assert phase_seconds(metrics) == {"rollout": 1.0, "train": 2.0}


def test_a_sparkline_has_a_block_a_value_and_a_gap_where_there_is_none() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([0, float("nan"), 1], 8) == "▁ █"
    assert sparkline([5, 5], 8) == "▅▅"
    assert sparkline([0.5], 8, low=0, high=1) == "▅"
    assert sparkline([], 8) == ""


def test_resampling_keeps_the_mean_of_each_stretch() -> None:
    assert resample([1, 3, 5, 7], 2) == [2, 6]
    assert resample([1, 2, 3, 4, 5], 2) == [1.5, 4]
    assert resample([1, 2], 5) == [1, 2]


def test_a_plot_rises_from_the_lower_left_to_the_upper_right() -> None:
    assert plot([0, 1], 2, 1) == ["⡠⠊"]
    top, bottom = plot([0, 1], 4, 2)
    assert top[:2] == "\u2800\u2800" and bottom[2:] == "\u2800\u2800"
    assert "\u2800" not in top[2:] + bottom[:2]
    assert plot([float("nan")], 3, 2) == ["   ", "   "]


@pytest.mark.parametrize("values", [[0.0, 1.0] * 40, [1.0], [3.0, 3.0, 3.0], list(range(1000))])
def test_a_plot_has_no_holes(values: list[float]) -> None:
    columns = zip(*plot(values, 20, 4), strict=True)
    assert all(any(cell != "\u2800" for cell in column) for column in columns)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("eval/accuracy", 0.78125, "78.1%"),
        ("engine/kv_used_frac", 0.5, "50.0%"),
        ("reward/mean", 0.7341, "0.734"),
        ("policy/loss", -0.01234, "-0.0123"),
        ("throughput/rollout_tokens_per_s", 4321.4, "4,321"),
        ("timing/step_s", 1.42, "1.42s"),
        ("memory/peak_rss_bytes", 900 * 2**20, "900 MiB"),
        ("memory/peak_gpu_bytes", 100 * 2**30, "100.0 GiB"),
        ("rollout/num_tokens", 123456, "123,456"),
        ("policy/grad_norm", 2.0, "2"),
        ("policy/loss", float("nan"), "nan"),
    ],
)
def test_numbers_are_shown_as_their_name_asks(key: str, value: float, text: str) -> None:
    assert number(key, value) == text


def test_durations_grow_their_unit() -> None:
    shown = [duration(s) for s in (0.004, 1.42, 9.99, 48, 125, 3725, float("nan"), -1)]
    assert shown == ["0.00s", "1.42s", "9.99s", "48s", "2:05", "1:02:05", "-", "-"]
