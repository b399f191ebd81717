"""SGLang's releases as numbers that compare."""

from __future__ import annotations

CHECKED_RELEASES = ("0.5.5", "0.5.10", "0.5.17", "0.5.23")
"""The releases whose server arguments the table was compared with."""

ASSUMED_RELEASE = CHECKED_RELEASES[-1]
"""What keys are checked against while no SGLang is installed."""


def release_number(release: str) -> tuple[int, ...]:
    """ "0.5.17.post1" -> (0, 5, 17): a post-release has the arguments of its release."""
    parts = []
    for part in release.split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        parts.append(int(digits))
    return tuple(parts)
