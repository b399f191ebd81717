"""Rollouts through our client beside SGLang's own in-process Engine: what HTTP, JSON and our bookkeeping cost.

    python -m benchmarks.engines.rollouts_vs_own_engine --requests 64 --new 64

Both sides run SGLang with the same arguments on the same requests, with log-probabilities, and take turns in the same
minute: ours, one call a request at once; SGLang's Engine, one call a request at once; SGLang's Engine, one call for
all. Both stay up, so each has its own memory. The prefix cache is emptied before each round.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import statistics
import subprocess
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.engines.asking import GREEDY, SAMPLED, ask, common_prefix, spread
from benchmarks.engines.harness import Failed, Fleet, Ship, cell, facts, parser_of, run_alone
from benchmarks.engines.own_engine import MARK
from benchmarks.engines.processes import between, cpu_seconds, descendants
from benchmarks.report import Report
from benchmarks.workload import LengthRange, Request, describe, draw_requests, num_new_tokens
from skyrl_train.engines.server.environment import as_process_environment
from skyrl_train.engines.sglang.launch import sglang_launch

NAME, TITLE = "rollouts-vs-own-engine", "Rollouts through our client and SGLang's own Engine"
MODES = {"greedy": GREEDY, "sampled": SAMPLED}
OURS, GATHER, BATCH = "skyrl_train, server", "sgl.Engine, a call a request", "sgl.Engine, one call for all"
START_TIMEOUT_S = 300.0
ROUND_TIMEOUT_S = 180.0


@dataclass(frozen=True, kw_only=True)
class Round:
    """One round of one side; `cpu` are processor seconds by role, the calling process among them."""

    wall_s: float
    num_tokens: int
    cpu: Mapping[str, float]
    first: tuple[int, ...]


@dataclass(kw_only=True)
class Side:
    name: str
    rounds: dict[str, list[Round]] = field(default_factory=dict)
    error: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--prompt", type=LengthRange.parse, default=LengthRange(low=128, high=128), metavar="LOW:HIGH")
    parser.add_argument("--new", type=LengthRange.parse, default=LengthRange(low=256, high=256), metavar="LOW:HIGH")
    parser.add_argument("--repetitions", type=int, default=3)


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("python -m benchmarks.engines.rollouts_vs_own_engine", __doc__)
    add_arguments(parser)
    run_alone(NAME, TITLE, measure, parser.parse_args(argv))


async def measure(fleet: Fleet, report: Report, args: argparse.Namespace) -> None:
    requests = draw_requests(
        args.requests, prompt=args.prompt, new=args.new, vocab_size=fleet.setup.shape.vocab_size, seed=args.seed
    )
    ours, gather, batch = Side(name=OURS), Side(name=GATHER), Side(name=BATCH)
    ship = await cell(fleet, "start, sglang", lambda: fleet.get("sglang"), limit_s=600)
    ships = [] if isinstance(ship, Failed) else [ship]
    if isinstance(ship, Failed):
        ours.error = ship
    async with own_engine(fleet, requests) as own:
        for side in (gather, batch):
            side.error = own if isinstance(own, Failed) else ""
        for mode, temperature in MODES.items():
            for repetition in range(args.repetitions + 1):
                for side in (ours, gather, batch):
                    if side.error:
                        continue
                    what = f"{side.name}, {mode}, round {repetition}"

                    async def one(side: Side = side, temperature: float = temperature) -> Round:
                        if side is ours:
                            return await our_round(ship, requests, temperature)
                        return await own.round("gather" if side is gather else "batch", temperature)

                    done = await cell(fleet, what, one)
                    if isinstance(done, Failed):
                        side.error = done
                    elif repetition:  # the first one warms up
                        cpu = ", ".join(f"{role} {seconds:.2f}" for role, seconds in sorted(done.cpu.items()))
                        report.log(f"{what}: {done.wall_s:.3f} s; processor s: {cpu}")
                        side.rounds.setdefault(mode, []).append(done)
    report.facts(facts(fleet, ships, f"{describe(requests)}; seed {args.seed}"))
    for mode in MODES:
        report.text(f"## {mode.capitalize()}")
        head = ["", "tokens/s", "of a call a request", f"seconds, median of {args.repetitions} (min to max)"]
        head += ["processor s by process", "first answer as ours"]
        report.table(head, [row(side, mode, gather, ours, num_new_tokens(requests)) for side in (ours, gather, batch)])
    report.text(
        "Processor seconds are medians. Ours: the client is this process, and the HTTP server is where SGLang's "
        "tokenizer manager runs; in the Engine both are one process, which idles between rounds as the server does. "
        "SGLang's schedulers poll while they wait for the GPU, so theirs measure the clock."
    )


async def our_round(ship: Ship, requests: Sequence[Request], temperature: float) -> Round:
    await ship.engine.flush_cache()
    before = _of_servers()
    run = await ask(ship.engine, requests, temperature=temperature)
    cpu = between(before, _of_servers())
    return Round(
        wall_s=run.wall_s,
        num_tokens=run.num_tokens,
        cpu={"client": run.cpu_s, **_shown(cpu)},
        first=run.token_ids[0],
    )


def _of_servers() -> dict[str, float]:
    """Without the own Engine's processes, which idle meanwhile but whose schedulers poll."""
    return cpu_seconds(leave_out="own_engine.py")


def _shown(cpu: Mapping[str, float]) -> dict[str, float]:
    return {role: seconds for role, seconds in cpu.items() if seconds >= 0.005}


@dataclass(kw_only=True)
class OwnEngine:
    """The process of own_engine.py, up."""

    process: asyncio.subprocess.Process

    async def round(self, how: str, temperature: float) -> Round:
        assert self.process.stdin is not None
        before = cpu_seconds(self.process.pid)
        self.process.stdin.write(f"{how} {temperature}\n".encode())
        await self.process.stdin.drain()
        figures = await asyncio.wait_for(self.answer(), ROUND_TIMEOUT_S)
        cpu = between(before, cpu_seconds(self.process.pid))
        return Round(
            wall_s=figures["wall_s"],
            num_tokens=figures["num_tokens"],
            cpu={"own Engine's process": figures["cpu_s"], **_shown(cpu)},
            first=tuple(figures["first"]),
        )

    async def answer(self) -> dict[str, Any]:
        """The next line that is meant for us. Raises RuntimeError at the end of its output or for an error of its."""
        assert self.process.stdout is not None
        while line := await self.process.stdout.readline():
            text = line.decode(errors="replace")
            if text.startswith(MARK):
                figures: dict[str, Any] = json.loads(text.removeprefix(MARK))
                if "error" in figures:
                    raise RuntimeError(figures["error"])
                return figures
        raise RuntimeError("SGLang's own Engine ended; see the end of own-engine.log")


@asynccontextmanager
async def own_engine(fleet: Fleet, requests: Sequence[Request]) -> AsyncIterator[OwnEngine | Failed]:
    """Up, or why not."""
    folder = fleet.setup.work / "runs" / "own-engine"
    folder.mkdir(parents=True, exist_ok=True)
    work = folder / "work.json"
    work.write_text(
        json.dumps({"prompts": [r.prompt_token_ids for r in requests], "budgets": [r.max_new_tokens for r in requests]})
    )
    with (folder / "own-engine.log").open("w") as log:
        own: OwnEngine | None = None

        async def start() -> OwnEngine:
            nonlocal own
            launch = await asyncio.to_thread(sglang_launch, fleet.setup.config("sglang"), 0, log_folder=folder)
            python, *words = launch.spec.command
            assert words[:2] == ["-m", "sglang.launch_server"], words
            process = await asyncio.create_subprocess_exec(
                python,
                str(Path(__file__).with_name("own_engine.py")),
                str(work),
                "--",
                *words[2:],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=as_process_environment(launch.spec.environment),
                limit=2**24,
            )
            own = OwnEngine(process=process)
            figures = await own.answer()
            fleet.report.log(f"SGLang's own Engine: up after {figures['start_s']:.1f} s")
            return own

        try:
            yield await cell(fleet, "start, SGLang's own Engine", start, limit_s=START_TIMEOUT_S)
        finally:
            if own is not None:
                await _end(own.process)


async def _end(process: asyncio.subprocess.Process) -> None:
    """By itself, or it and all that it started, by id."""
    assert process.stdin is not None
    tree = [*descendants(process.pid), process.pid]
    with contextlib.suppress(OSError):
        process.stdin.close()
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(process.wait(), 20.0)
    for pid in tree:
        if pid == process.pid and process.returncode is not None:
            continue
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def row(side: Side, mode: str, base: Side, ours: Side, num_tokens: int) -> list[str]:
    rounds = side.rounds.get(mode)
    if not rounds:
        return [side.name, side.error or "no round", *[""] * 4]
    seconds = statistics.median(one.wall_s for one in rounds)
    part = ""
    if base.rounds.get(mode):
        part = f"{statistics.median(one.wall_s for one in base.rounds[mode]) / seconds:.1%}"
    roles = sorted({role for one in rounds for role in one.cpu})
    cpu = ", ".join(f"{role} {statistics.median(one.cpu.get(role, 0.0) for one in rounds):.2f}" for role in roles)
    same = ""
    if mode == "greedy" and ours.rounds.get(mode):
        first, other = rounds[0].first, ours.rounds[mode][0].first
        same = f"{common_prefix(first, other)} of {len(first)} tokens"
    return [side.name, f"{num_tokens / seconds:,.0f}", part, spread([one.wall_s for one in rounds]), cpu, same]


if __name__ == "__main__":
    main()
