"""SGLang's lines of a request each, back to the trajectories that asked: generator.metrics.export_to_file.

The name of an attempt on the wire carries all that is needed, `rid_of` and engines/server/traffic.py write it:

    7/2/0/t1#9f02c4.42$   trajectory 7/2/0, turn 1; the 42nd attempt that one process of the run (9f02c4) sent

One line is one attempt that the server answered: a request that a weight update interrupted has several, all but the
last with finish reason "abort", and one that a server took with it when it died has none of that attempt. The same
trajectory comes again in another epoch or evaluation; `weight_version` tells which (it is the policy's version).
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from skyrl_train.errors import DataError

_RID = re.compile(r"(?P<request>.*)#(?P<process>\w+)\.(?P<number>\d+)\$", re.DOTALL)
_TURN = re.compile(r"(?P<trajectory>.*/-?\d+/\d+)(?:/t(?P<turn>\d+))?", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class ExportedRequest:
    """One attempt as the server saw it. Times are in seconds; None is what this release doesn't tell.

    `attempt` counts from 1 within one request of the trajectory. `engine` is the folder under the export's own in
    which the line lies, empty for the only engine. `row` is the whole line.
    """

    trajectory_id: str
    turn: int
    attempt: int
    engine: str
    process: str
    number: int
    weight_version: str | None
    finish_reason: str | None
    num_prompt_tokens: int
    num_cached_tokens: int
    num_generated_tokens: int
    e2e_latency_s: float | None
    queue_time_s: float | None
    row: Mapping[str, Any]


def read_request_export(folder: Path | str) -> list[ExportedRequest]:
    """The lines of a run's trajectories under `folder`, in the order in which the servers were asked; others, of
    whoever else used the servers, are left out. So is a last line that was cut short by a kill. Raises DataError,
    naming file and line, for any other line that is no JSON object, and where there is no such folder.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"{root} is no folder; generator.metrics.export_to_file.directory names it")
    found = [
        request
        for path in sorted(root.rglob("*.log"))
        for row in _rows(path)
        if (request := _request(row, engine=str(path.parent.relative_to(root)).strip("."))) is not None
    ]
    # Lines are in the order of answers; files carry the hour in their names, so processes are in order.
    processes = {process: place for place, process in enumerate(dict.fromkeys(one.process for one in found))}
    return _with_attempts(sorted(found, key=lambda one: (processes[one.process], one.engine, one.number)))


def by_turn(requests: Iterable[ExportedRequest]) -> dict[tuple[str, int], list[ExportedRequest]]:
    """(trajectory id, turn) -> its attempts, over all epochs and evaluations."""
    grouped: dict[tuple[str, int], list[ExportedRequest]] = defaultdict(list)
    for request in requests:
        grouped[request.trajectory_id, request.turn].append(request)
    return dict(grouped)


def of_rollout(
    rollout: Mapping[str, Any], grouped: Mapping[tuple[str, int], Sequence[ExportedRequest]]
) -> list[list[ExportedRequest]]:
    """The attempts of each turn of a line of `rollouts/*.jsonl`, by the versions that sampled the turn."""
    turns = []
    for turn, made in enumerate(rollout["turns"]):
        versions = {str(span["version"]) for span in made["versions"]}
        attempts = grouped.get((rollout["trajectory_id"], turn), ())
        turns.append([request for request in attempts if request.weight_version in versions])
    return turns


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            yield row
        elif number < len(lines):
            raise DataError(f"{path}, line {number}: expected a JSON object, found {line[:80]!r}")


def _request(row: Mapping[str, Any], *, engine: str) -> ExportedRequest | None:
    wire = _RID.fullmatch(str(row.get("id", "")))
    asked = None if wire is None else _TURN.fullmatch(wire["request"].replace("%24", "$").replace("%25", "%"))
    if wire is None or asked is None:
        return None
    reason = row.get("finish_reason")
    version = row.get("weight_version")
    return ExportedRequest(
        trajectory_id=asked["trajectory"],
        turn=int(asked["turn"] or 0),
        attempt=1,
        engine=engine,
        process=wire["process"],
        number=int(wire["number"]),
        weight_version=None if version is None else str(version),
        finish_reason=reason.get("type") if isinstance(reason, dict) else reason,
        num_prompt_tokens=int(row.get("prompt_tokens") or 0),
        num_cached_tokens=int(row.get("cached_tokens") or 0),
        num_generated_tokens=int(row.get("completion_tokens") or 0),
        e2e_latency_s=row.get("e2e_latency"),
        queue_time_s=row.get("queue_time"),
        row=row,
    )


def _with_attempts(requests: Sequence[ExportedRequest]) -> list[ExportedRequest]:
    """A request goes on until an attempt is not aborted; what comes then is the same trajectory in another epoch."""
    before: dict[tuple[str, int], ExportedRequest] = {}
    counted = []
    for request in requests:
        key = (request.trajectory_id, request.turn)
        last = before.get(key)
        goes_on = last is not None and last.finish_reason == "abort"
        before[key] = replace(request, attempt=last.attempt + 1 if goes_on and last is not None else 1)
        counted.append(before[key])
    return counted
