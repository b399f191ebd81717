"""What a benchmark asks of an engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from benchmarks.workload import Output, Request


class Sampler(Protocol):
    """One engine in one setting, ready to run. `name` says which setting.

    `run` is what is timed: all requests from token ids to token ids and log-probabilities, each of exactly its
    length, at temperature 1 from the whole distribution, or greedily. Results come in the requests' order. One that
    works in other processes has `child_seconds() -> float` too, the processor seconds of those so far.
    """

    name: str
    num_threads: int

    def prepare(self, *, greedy: bool) -> None:
        """Before each run, not timed: set-up for the mode, and nothing kept from an earlier run."""
        ...

    def run(self, requests: Sequence[Request], *, greedy: bool) -> list[Output]: ...

    def close(self) -> None: ...
