"""Small multiples of learning curves as one SVG: the same axes in every panel, so that panels compare by eye."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Points = Sequence[tuple[float, float]]
WIDTH, HEIGHT = 210, 130
LEFT, TOP, RIGHT, BOTTOM = 30, 24, 10, 20
COLUMNS = 4
TICKS = (0.0, 0.5, 1.0)
STYLE = (
    "text{font:10px system-ui,sans-serif;fill:#57606a}.t{font-weight:600;font-size:11px;fill:#1f2328}"
    ".g{stroke:#d8dee4;stroke-width:1}.r{fill:none;stroke:#0969da;stroke-width:1.3}"
    ".a{fill:none;stroke:#bc4c00;stroke-width:1.3}.d{fill:#bc4c00}.m{fill:none;stroke:#8c959f;stroke-dasharray:3 3}"
)


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Points (step, value in [0, 1])."""

    title: str
    reward: Points
    accuracy: Points


def small_multiples(panels: Sequence[Panel], *, num_steps: int, reference: Points = ()) -> str:
    """The SVG's text. `reference` is drawn dashed in every panel: the curve that the others are compared with."""
    rows = -(-len(panels) // COLUMNS)
    width, height = COLUMNS * WIDTH, rows * HEIGHT + 22
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
        f"<style>{STYLE}</style>",
        f'<rect width="{width}" height="{height}" rx="6" fill="#ffffff"/>',
    ]
    for i, panel in enumerate(panels):
        x, y = i % COLUMNS * WIDTH, i // COLUMNS * HEIGHT
        parts += [f'<g transform="translate({x} {y})">', *_panel(panel, num_steps, reference), "</g>"]
    legend = height - 8
    parts += [
        f'<path class="r" d="M12 {legend - 4}h18"/><text x="34" y="{legend}">mean reward of a step</text>',
        f'<path class="a" d="M172 {legend - 4}h18"/><text x="194" y="{legend}">held-out accuracy</text>',
        f'<path class="m" d="M312 {legend - 4}h18"/><text x="334" y="{legend}">held-out accuracy of the first</text>',
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _panel(panel: Panel, num_steps: int, reference: Points) -> list[str]:
    def place(step: float, value: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * step / max(num_steps, 1)
        y = TOP + (HEIGHT - TOP - BOTTOM) * (1 - min(max(value, 0.0), 1.0))
        return x, y

    def line(points: Points, kind: str) -> list[str]:
        if not points:
            return []
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
        return [f'<polyline class="{kind}" points="{joined}"/>']

    parts = [f'<text class="t" x="{LEFT}" y="15">{escape(panel.title)}</text>']
    for tick in TICKS:
        _, y = place(0, tick)
        parts.append(f'<path class="g" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 4}" y="{y + 3:.1f}" text-anchor="end">{tick:g}</text>')
    for step in (0, num_steps):
        x, _ = place(step, 0)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 7}" text-anchor="{"end" if step else "start"}">{step}</text>')
    parts += [*line(reference, "m"), *line(panel.reward, "r"), *line(panel.accuracy, "a")]
    for point in panel.accuracy:
        x, y = place(*point)
        parts.append(f'<circle class="d" cx="{x:.1f}" cy="{y:.1f}" r="2"/>')
    return parts
