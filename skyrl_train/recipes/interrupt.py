"""Ctrl-C in a recipe: the step in flight is finished and saved."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from skyrl_train.observability.progress import Progress


class Stop:
    """False until Ctrl-C."""

    def __init__(self) -> None:
        self.asked = False

    def __bool__(self) -> bool:
        return self.asked


@contextmanager
def stop_on_interrupt(progress: Progress) -> Iterator[Stop]:
    """The first Ctrl-C ends the run after the step in flight, the second at once."""
    stop = Stop()

    def interrupt(*_: object) -> None:
        if stop:
            raise KeyboardInterrupt
        stop.asked = True
        progress.message("stopping after this step, with a checkpoint; Ctrl-C again stops at once")

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
