"""Numbers and metrics as short text for people."""

from __future__ import annotations

import math
from collections.abc import Mapping

from skyrl_train.observability.metrics import STEP_SECONDS

REWARD = "reward/mean"
ACCURACY = "eval/accuracy"
TOKENS_PER_S = "throughput/rollout_tokens_per_s"

_SHOWN: tuple[tuple[str, str], ...] = (
    (REWARD, "reward"),
    (ACCURACY, "accuracy"),
    ("policy/loss", "loss"),
    ("policy/ref_kl", "kl"),
    (TOKENS_PER_S, "tok/s"),
)


def step_line(step: int, metrics: Mapping[str, float], *, total_steps: int | None = None) -> str:
    """A step on one line: `step  34/120  reward 0.734  accuracy 78.1%  loss -0.0123  tok/s 4,321  1.42s`."""
    of = "" if total_steps is None else f"/{total_steps}"
    width = len(str(total_steps)) if total_steps is not None else 0
    parts = [f"step {step:>{width}}{of}"]
    for key, name in _SHOWN:
        if key in metrics:
            parts.append(f"{name} {number(key, metrics[key])}")
    if STEP_SECONDS in metrics:
        parts.append(duration(metrics[STEP_SECONDS]))
    return "  ".join(parts)


def number(key: str, value: float) -> str:
    """A metric's value as its name asks: fractions and accuracies in percent, rates and counts grouped."""
    if not math.isfinite(value):
        return str(value)
    if key.endswith(("accuracy", "_frac")):
        return f"{100 * value:.1f}%"
    if key.endswith("_bytes"):
        return f"{value / 2**20:,.0f} MiB" if value < 2**33 else f"{value / 2**30:,.1f} GiB"
    if key.endswith("_per_s") or abs(value) >= 10_000:
        return f"{value:,.0f}"
    if key.endswith("_s"):
        return duration(value)
    if key.startswith("reward/") or value == 0:
        return f"{value:.3f}"
    return f"{value:.3g}" if abs(value) < 1 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """`0.42s`, `1.42s`, `48s`, `2:05`, `1:02:05`; `-` when unknown."""
    if not math.isfinite(seconds) or seconds < 0:
        return "-"
    if seconds < 10:
        return f"{seconds:.2f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d}"
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
