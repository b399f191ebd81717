"""What the live view shows, and how it is drawn to fit the terminal: plain data in, a rich renderable out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from skyrl_train.observability.curves import plot, sparkline
from skyrl_train.observability.metrics import STEP_SECONDS
from skyrl_train.observability.text import ACCURACY, REWARD, TOKENS_PER_S, duration, number

MAX_WIDTH = 120
_CURVES: tuple[tuple[str, str, str], ...] = (
    (REWARD, "reward", "cyan"),
    (ACCURACY, "held-out accuracy", "green"),
    (TOKENS_PER_S, "rollout tokens/s", "magenta"),
)
_SMALL: tuple[tuple[str, str], ...] = (
    ("policy/loss", "loss"),
    ("policy/ref_kl", "kl"),
    ("policy/entropy", "entropy"),
    ("policy/grad_norm", "grad norm"),
    ("memory/peak_rss_bytes", "memory"),
)
_PHASE_COLORS = ("cyan", "magenta", "yellow", "green", "blue", "red")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One rollout as a person reads it."""

    prompt: str
    response: str
    reward: float


@dataclass(frozen=True, kw_only=True)
class WarmStart:
    """Where the supervised phase before the run stands."""

    step: int
    total: int
    metrics: Mapping[str, float]


@dataclass(kw_only=True)
class RunView:
    """All that is known of the run; `total_steps` 0 is not known yet.

    `history` has (step, value) for the metrics that are drawn as curves.
    """

    run_name: str
    total_steps: int
    model: str = ""
    engine: str = ""
    step: int = 0
    phase: str = ""
    elapsed_s: float = 0.0
    eta_s: float | None = None
    stopped: str | None = None
    warm_start: WarmStart | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    history: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    samples: tuple[Sample, ...] = ()

    def record(self, step: int, metrics: Mapping[str, float], samples: Sequence[Sample]) -> None:
        """Take in a step. Samples stay until there are newer ones."""
        self.step = step
        self.metrics = dict(metrics)
        for key, _, _ in _CURVES:
            if key in metrics:
                self.history.setdefault(key, []).append((step, metrics[key]))
        if samples:
            self.samples = tuple(samples)

    @property
    def warming(self) -> bool:
        """Whether the warm start is what the run is doing now."""
        return self.warm_start is not None and self.step == 0 and self.warm_start.step < self.warm_start.total


def render(view: RunView, width: int, height: int) -> RenderableType:
    """The view in at most `height` lines and `width` columns. Least important parts give way first."""
    width = max(min(width, MAX_WIDTH), 20)
    inner = width - 4
    head = _header(view, inner)
    room = height - 2 - len(head)
    body: list[RenderableType] = []
    if view.warm_start is not None:
        lines = _warm_start(view, view.warm_start, inner)
        body += lines
        room -= len(lines)
    phases = _phases(view, inner)
    samples = _samples(view, inner)
    small = _small_metrics(view, inner)
    curves = [key for key, _, _ in _CURVES if key in view.history][: max(room, 0)]
    # Curves are worth most: they get a line each first, then phases and samples, then height.
    room -= len(curves)
    take: dict[str, list[RenderableType]] = {}
    for name, lines in (("small", small), ("samples", samples), ("phases", phases)):
        fits = lines[: max(room - 1, 0)] if len(lines) > 2 else (lines if len(lines) < room else [])
        # A heading alone says nothing.
        take[name] = fits if len(fits) > (0 if name == "small" else 1) else []
        room -= len(take[name]) + (1 if take[name] and name != "small" else 0)
    body += _curves(view, curves, inner, max(room - 1, 0))
    body += take["small"]
    for name in ("phases", "samples"):
        if take[name]:
            body += [Text(""), *take[name]]
    title = Text.assemble(" ", ("skyrl_train", "bold not dim"), " · ", (view.run_name, "bold cyan not dim"), " ")
    return Panel(
        Group(*head, *body),
        title=title,
        title_align="left",
        border_style="red" if view.stopped == "failed" else "dim",
        width=width,
        padding=(0, 1),
    )


def one_line(text: str) -> str:
    """Text from a model or a data row, safe for a terminal: no line breaks, no control or escape characters."""
    text = text.strip().replace("\r\n", "\n").replace("\n", "⏎").replace("\t", " ")
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _header(view: RunView, inner: int) -> list[RenderableType]:
    left = Text(no_wrap=True, overflow="ellipsis")
    for name, value in (("model", view.model), ("engine", view.engine)):
        if value:
            left.append(f"{name} ", "dim").append(one_line(value)).append("  ")
    right = Text(no_wrap=True).append("elapsed ", "dim").append(duration(view.elapsed_s))
    if view.eta_s is not None and view.stopped is None:
        right.append("  left ", "dim").append(duration(view.eta_s))
    line = _sides(left, right)
    state = view.stopped or (view.phase if view.phase else "starting")
    of = f"/{view.total_steps}" if view.total_steps else ""
    label = Text(no_wrap=True).append(f"step {view.step}{of}", "bold")
    tail = Text(state, "red" if view.stopped == "failed" else "yellow" if view.stopped is None else "green")
    room = inner - len(label) - max(len(tail), 12) - 3
    bar = _bar(view.step / max(view.total_steps, 1), max(room, 4), "cyan")
    return [line, Text.assemble(label, " ", bar, " ", tail, no_wrap=True, overflow="ellipsis"), Text("")]


def _warm_start(view: RunView, warm: WarmStart, inner: int) -> list[RenderableType]:
    name = Text("warm start ", "bold" if view.warming else "dim")
    facts = Text(f" {warm.step}/{warm.total}")
    for key, value in warm.metrics.items():
        facts.append(f"  {key.rpartition('/')[2]} ", "dim").append(number(key, value))
    bar = _bar(warm.step / max(warm.total, 1), max(min(30, inner - len(name) - len(facts)), 4), "yellow")
    return [Text.assemble(name, bar, facts, no_wrap=True, overflow="ellipsis")]


def _curves(view: RunView, keys: Sequence[str], inner: int, spare: int) -> list[RenderableType]:
    """A line a curve; where there is room, reward and accuracy become plots side by side."""
    described = [(key, name, color) for key, name, color in _CURVES if key in keys]
    plotted = [item for item in described if item[0] != TOKENS_PER_S and len(view.history[item[0]]) > 1]
    rows = min(spare + len(plotted) - 1, 8)
    if inner < 70 or rows < 4 or not plotted:
        return [_curve_line(view, *item, inner) for item in described]
    cell = (inner - 3 * (len(plotted) - 1)) // len(plotted)
    grid = Table.grid(padding=(0, 3, 0, 0))
    for _ in plotted:
        grid.add_column(width=cell, no_wrap=True)
    grid.add_row(*(_curve_head(view, *item, cell) for item in plotted))
    pictures = [_picture(view, key, color, cell, rows) for key, _, color in plotted]
    for lines in zip(*pictures, strict=True):
        grid.add_row(*lines)
    rest = [_curve_line(view, *item, inner) for item in described if item not in plotted]
    return [grid, *rest]


def _picture(view: RunView, key: str, color: str, width: int, height: int) -> list[Text]:
    values = [value for _, value in view.history[key]]
    low, high = _range(key, values)
    labels = [number(key, high), *[""] * (height - 2), number(key, low)]
    gutter = max(len(label) for label in labels) + 1
    lines = plot(values, width - gutter, height, low=low, high=high)
    return [
        Text.assemble((label.rjust(gutter - 1) + " ", "dim"), (line, color))
        for label, line in zip(labels, lines, strict=True)
    ]


def _curve_head(view: RunView, key: str, name: str, color: str, width: int) -> Text:
    first, last = view.history[key][0][1], view.history[key][-1][1]
    head = Text.assemble((f"{name} ", "dim"), (number(key, last), f"bold {color}"), no_wrap=True)
    return head.append(f"  from {number(key, first)}", "dim")


def _curve_line(view: RunView, key: str, name: str, color: str, inner: int) -> Text:
    values = [value for _, value in view.history[key]]
    label = Text.assemble((f"{name:<17}", "dim"), (f"{number(key, values[-1]):>8}", f"bold {color}"), "  ")
    tail = f"  from {number(key, values[0])}" if key != TOKENS_PER_S and inner >= 50 else ""
    low, high = _range(key, values)
    spark = sparkline(values, max(inner - len(label) - (13 if inner >= 50 else 0), 4), low=low, high=high)
    return Text.assemble(label, (spark, color), (tail, "dim"), no_wrap=True, overflow="ellipsis")


def _range(key: str, values: Sequence[float]) -> tuple[float, float]:
    if key == ACCURACY:
        return 0.0, 1.0
    known = [value for value in values if math.isfinite(value)] or [0.0]
    if key == TOKENS_PER_S:
        return 0.0, max(known)
    return min(known), max(known)


def _small_metrics(view: RunView, inner: int) -> list[RenderableType]:
    line = Text(no_wrap=True, overflow="ellipsis")
    for key, name in _SMALL:
        if key in view.metrics:
            shown = number(key, view.metrics[key])
            if len(line) + len(name) + len(shown) + 1 <= inner:
                line.append(f"{name} ", "dim").append(shown).append("   ")
    line.rstrip()
    return [line] if line else []


def _phases(view: RunView, inner: int) -> list[RenderableType]:
    seconds = phase_seconds(view.metrics)
    if not seconds:
        return []
    total = view.metrics.get(STEP_SECONDS, sum(seconds.values()))
    lines: list[RenderableType] = [Text.assemble(("last step ", "dim"), (duration(total), "bold"))]
    name_width = min(max(len(name) for name in seconds), 18)
    for (name, value), color in zip(seconds.items(), _PHASE_COLORS * len(seconds), strict=False):
        share = value / total if total > 0 else 0.0
        tail = f" {duration(value):>6} {100 * share:3.0f}%"
        bar = _bar(share, max(inner - name_width - len(tail) - 2, 4), color, track=" ")
        lines.append(Text.assemble((f"{name[:name_width]:<{name_width}} ", "dim"), bar, tail, no_wrap=True))
    return lines


def phase_seconds(metrics: Mapping[str, float]) -> dict[str, float]:
    """phase -> seconds from `timing/<phase>_s`, without the step's total and without parts of phases."""
    found = {}
    for key, value in metrics.items():
        name = key.removeprefix("timing/").removesuffix("_s")
        if key.startswith("timing/") and key.endswith("_s") and key != STEP_SECONDS and "/" not in name:
            found[name] = value
    return found


def _samples(view: RunView, inner: int) -> list[RenderableType]:
    if not view.samples:
        return []
    lines: list[RenderableType] = [Text("last rollouts", "dim")]
    prompt_width = min(max(len(one_line(s.prompt)) for s in view.samples), inner // 2)
    for sample in view.samples:
        style = "green" if sample.reward > 0 else "red"
        prompt = Text(one_line(sample.prompt), no_wrap=True)
        prompt.truncate(prompt_width, overflow="ellipsis", pad=True)
        answer = Text(one_line(sample.response), "bold", no_wrap=True)
        answer.truncate(max(inner - prompt_width - 12, 4), overflow="ellipsis")
        lines.append(Text.assemble((f"{sample.reward:>6.2f}  ", style), prompt, (" → ", "dim"), answer, no_wrap=True))
    return lines


def _sides(left: Text, right: Text) -> Table:
    grid = Table.grid(expand=True, padding=(0, 2, 0, 0), pad_edge=False)
    grid.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    grid.add_column(justify="right", no_wrap=True)
    grid.add_row(left, right)
    return grid


def _bar(fraction: float, width: int, color: str, *, track: str = "━") -> Text:
    done = round(min(max(fraction, 0.0), 1.0) * width) if math.isfinite(fraction) else 0
    return Text.assemble(("━" * done, color), (track * (width - done), "dim"))
