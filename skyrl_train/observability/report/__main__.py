"""`python -m skyrl_train.observability.report RUN_FOLDER ...`: writes report.html into each and prints where."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from skyrl_train.errors import SkyRLError
from skyrl_train.observability.report import write_report


def main(argv: Sequence[str]) -> int:
    """Exit code 0, or 2 with a message when a folder is no run's."""
    if not argv or argv[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    for folder in argv:
        try:
            print(write_report(folder))
        except SkyRLError as exc:
            print(f"error: {exc}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
