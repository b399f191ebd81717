"""Sleep and wake by tag: what memory comes back to the trainer, how long each call takes, and that nothing is lost.

    python -m benchmarks.engines.colocated --engine sglang --device cuda --shape 0.5b

In the order of the loop on a shared GPU: drain, sleep (weights and cache), wake the weights, update them from the
trainer's tensors, wake the cache, resume. The answers after it must be those before it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Awaitable, Callable, Sequence

import torch

from benchmarks.engines.asking import GREEDY, ask, num_equal
from benchmarks.engines.folders import spread_model
from benchmarks.engines.harness import SERVERS, Failed, Fleet, Ship, cell, facts, parser_of, run_alone
from benchmarks.report import Report
from benchmarks.workload import LengthRange, draw_requests
from skyrl_train.types import NamedWeights, WeightUpdate

NAME, TITLE = "colocated-{engine}", "Sleep and wake on a shared GPU, {engine}"
GIB = 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engine", choices=SERVERS, default="sglang")
    parser.add_argument("--rounds", type=int, default=2)


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("python -m benchmarks.engines.colocated", __doc__)
    add_arguments(parser)
    run_alone(NAME, TITLE, measure, parser.parse_args(argv))


async def measure(fleet: Fleet, report: Report, args: argparse.Namespace) -> None:
    ship = await cell(fleet, "start", lambda: fleet.get(args.engine), limit_s=600)
    if isinstance(ship, Failed):
        report.text(f"{args.engine} did not start: {ship}")
        return
    report.facts(facts(fleet, [ship], "16 requests of 64 and 64 tokens, greedy, before and after"))
    if "sleep" not in ship.engine.info.capabilities:
        report.text(f"{ship.name} can't sleep here: it takes turns with the trainer on GPUs only.")
        return
    for number in range(args.rounds):
        rows: list[list[str]] = []
        failure = await cell(fleet, f"round {number}", lambda r=rows: one_round(fleet, ship, r))
        report.text(f"## Round {number + 1}")
        report.table(["call", "seconds", "GPU memory in use, GiB"], rows)
        if isinstance(failure, Failed):
            report.text(f"It ended there: {failure}")
            return


async def one_round(fleet: Fleet, ship: Ship, rows: list[list[str]]) -> None:
    """Fills `rows` as it goes."""
    setup, engine = fleet.setup, ship.engine
    length = LengthRange(low=64, high=64)
    requests = draw_requests(16, prompt=length, new=length, vocab_size=setup.shape.vocab_size, seed=setup.seed)
    before = await ask(engine, requests, temperature=GREEDY)
    rows.append(["serving", "", in_use()])

    async def step(name: str, action: Callable[[], Awaitable[None]]) -> None:
        start = time.perf_counter()
        await action()
        rows.append([name, f"{time.perf_counter() - start:.3f}", in_use()])
        fleet.report.log(" | ".join(rows[-1]))

    await step("pause, drained", lambda: engine.pause("wait"))
    await step("sleep: cache", lambda: engine.sleep(("kv_cache",)))
    await step("sleep: weights", lambda: engine.sleep(("weights",)))
    model = spread_model(setup.shape, device=setup.device, dtype=setup.dtype, seed=setup.seed)
    rows.append(["(the trainer's model is made)", "", in_use()])
    await step("wake: weights", lambda: engine.wake(("weights",)))
    version = (await engine.stats()).policy_version + 1
    weights = NamedWeights(tensors=model.state_dict())

    async def update() -> None:
        await engine.update_weights(WeightUpdate(version=version, source=weights))

    await step(f"update by {ship.config.generator.weight_sync_backend}", update)
    await step("wake: cache", lambda: engine.wake(("kv_cache",)))
    await step("resume", engine.resume)
    after = await ask(engine, requests, temperature=GREEDY)
    same = num_equal(before.token_ids, after.token_ids)
    rows.append([f"serving: {same} of {len(requests)} answers as before", "", in_use()])


def in_use() -> str:
    """Of all processes on the GPU."""
    if not torch.cuda.is_available():
        return ""
    free_bytes, total = torch.cuda.mem_get_info()
    return f"{(total - free_bytes) / GIB:.1f}"


if __name__ == "__main__":
    main()
