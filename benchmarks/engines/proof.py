"""Right before fast: a server engine through its whole contract on a real model's shape, in a few minutes.

    python -m benchmarks.engines.proof --engine sglang --device cuda --shape 0.5b
    python -m benchmarks.engines.proof --engine sglang --paths group            # trainer and engine on two GPUs

Answers' log-probabilities beside transformers', updates by each path, updates under running requests (two constant
models: a mixture would show), sessions with two branches, n-gram drafts on and off, sleep and wake. One row each: what
was seen, and whether it is right. A row that fails doesn't stop the others.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.engines import colocated
from benchmarks.engines.asking import GREEDY, SAMPLED, Run, ask, common_prefix, num_equal, request
from benchmarks.engines.folders import constant_model, looping_model, spread_model
from benchmarks.engines.harness import SERVERS, Failed, Fleet, Ship, cell, facts, names, parser_of, run_alone
from benchmarks.engines.reference import TOLERANCE, load_reference, logprob_difference
from benchmarks.engines.speculation import draw
from benchmarks.engines.weights import free, give, give_tensors
from benchmarks.report import Report
from benchmarks.workload import LengthRange, Request, draw_requests, draw_tokens
from skyrl_train.types import Completion, SessionRef

NAME, TITLE = "proof-{engine}", "{engine} proved"
PATHS = ("plain", "disk", "group")
"""Variants of the engine by how new weights reach it. plain is what the placement says: CUDA IPC on a shared GPU."""
CONSTANTS = ((777, 3), (1234, 5))
"""(token, direction) of the two constant models."""
TORN_ROUNDS = 4


@dataclass(kw_only=True)
class Verdicts:
    """Rows of the table, as they come."""

    rows: list[list[str]] = field(default_factory=list)
    num_wrong: int = 0

    def add(self, what: str, seen: str, right: bool | None) -> None:
        """`right` None: this engine can't, and says so."""
        self.rows.append([what, seen, {True: "yes", False: "NO", None: "not here"}[right]])
        self.num_wrong += right is False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engine", choices=SERVERS, default="sglang")
    parser.add_argument("--paths", type=names(PATHS), default=("plain", "disk"))
    parser.add_argument("--only-updates", action="store_true", help="no sessions, drafts and sleep")


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("python -m benchmarks.engines.proof", __doc__)
    add_arguments(parser)
    verdicts: list[Verdicts] = []

    async def run(fleet: Fleet, report: Report, args: argparse.Namespace) -> None:
        verdicts.append(await measure(fleet, report, args))

    run_alone(NAME, TITLE, run, parser.parse_args(argv))
    if verdicts[0].num_wrong:
        sys.exit(f"{verdicts[0].num_wrong} rows are wrong")


async def measure(fleet: Fleet, report: Report, args: argparse.Namespace) -> Verdicts:
    verdicts, ships = Verdicts(), []
    backend = args.engine
    fleet.prepare(backend, args.paths[0])

    async def prove(what: str, action: Callable[[], Awaitable[tuple[str, bool | None]]]) -> None:
        done = await cell(fleet, what, action)
        seen, right = (done, False) if isinstance(done, Failed) else done
        verdicts.add(what, seen, right)
        report.log(f"{what}: {seen} -> {verdicts.rows[-1][2]}")

    for variant in args.paths:
        ship = await cell(fleet, f"start, {variant}", lambda v=variant: fleet.get(backend, v), limit_s=600)
        if isinstance(ship, Failed):
            verdicts.add(f"{variant}: start", ship, False)
            continue
        # One start compiles what the next ones find compiled.
        fleet.prepare(backend, *args.paths, *(() if args.only_updates else ("ngram",)))
        ships.append(ship)
        path = ship.config.generator.weight_sync_backend
        verdicts.add(f"{path}: start", f"{ship.start_s:.1f} s", True)
        if variant == args.paths[0]:
            await prove("greedy answers", lambda s=ship: answers(fleet, s, GREEDY))
            await prove("sampled answers", lambda s=ship: answers(fleet, s, SAMPLED))
        await prove(f"{path}: another model's weights", lambda s=ship: other_weights(fleet, s))
        await prove(f"{path}: updates under running requests", lambda s=ship: torn(fleet, s))
        await prove(f"{path}: the first weights again", lambda s=ship: first_weights(fleet, s))
        if variant == args.paths[-1]:
            await prove("the server's own metrics", lambda s=ship: metrics(s))
        if variant == args.paths[0] and not args.only_updates:
            await prove("abort with a partial answer", lambda s=ship: abort(fleet, s))
            await prove("session of 3 turns, 2 branches", lambda s=ship: sessions(fleet, s))
            await prove("sleep and wake", lambda s=ship: sleep(fleet, s))
    if not args.only_updates:
        await prove("n-gram drafts: greedy answers of a looping model", lambda: drafts(fleet, backend, ships))
    report.facts(facts(fleet, ships, "32 requests of 64 and 64 tokens where nothing else is said"))
    report.table(["what", "seen", "right"], verdicts.rows)
    report.text(f"Log-probabilities are right within {TOLERANCE[fleet.setup.dtype]} of transformers' at every token.")
    return verdicts


def work(fleet: Fleet, count: int = 32, *, prompt: int = 64, new: int = 64, seed: int = 0) -> list[Request]:
    lengths = {"prompt": LengthRange(low=prompt, high=prompt), "new": LengthRange(low=new, high=new)}
    vocab_size = fleet.setup.shape.vocab_size
    return list(draw_requests(count, **lengths, vocab_size=vocab_size, seed=fleet.setup.seed + seed))


async def answers(fleet: Fleet, ship: Ship, temperature: float) -> tuple[str, bool]:
    requests = work(fleet)
    run = await ask(ship.engine, requests, temperature=temperature)
    return compare(fleet, run, requests, temperature)


def compare(
    fleet: Fleet, run: Run, requests: Sequence[Request], temperature: float, model: object = None
) -> tuple[str, bool]:
    """With transformers' forward pass of `model`, or of the folder."""
    setup = fleet.setup
    reference = model or load_reference(setup.folder, device=setup.device, dtype=setup.dtype)
    prompts = [one.prompt_token_ids for one in requests[:8]]
    found = logprob_difference(reference, prompts, run.completions[:8])
    del reference
    free(setup.device)
    limit = TOLERANCE[setup.dtype]
    right = found.largest <= limit and (temperature != GREEDY or found.greedy_gap <= limit)
    gap = f", greedy tokens within {found.greedy_gap:.1e} of the best" if temperature == GREEDY else ""
    return f"log-probabilities within {found}{gap}; {run.tokens_per_s:,.0f} tokens/s", right


async def other_weights(fleet: Fleet, ship: Ship) -> tuple[str, bool]:
    setup = fleet.setup
    model = spread_model(setup.shape, device=setup.device, dtype=setup.dtype, seed=setup.seed + 1)
    seconds = [await give_tensors(ship, model.state_dict()) for _ in range(2)]
    requests = work(fleet, seed=1)
    run = await ask(ship.engine, requests, temperature=GREEDY)
    seen, right = compare(fleet, run, requests, GREEDY, model)
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    del model
    free(setup.device)
    return f"{size / 1e9:.2f} GB in {seconds[0]:.3f} and {seconds[1]:.3f} s; {seen}", right


async def torn(fleet: Fleet, ship: Ship) -> tuple[str, bool]:
    """Requests run all the time while two constant models take turns: every token is that of its version."""
    setup, engine = fleet.setup, ship.engine
    models = [
        constant_model(
            setup.shape, token, direction=direction, device=setup.device, dtype=setup.dtype, seed=setup.seed
        ).state_dict()
        for token, direction in CONSTANTS
    ]
    await give_tensors(ship, models[0])
    served = {(await engine.stats()).policy_version: CONSTANTS[0][0]}
    done: list[Completion] = []
    stop = asyncio.Event()
    rng = random.Random(setup.seed)

    async def ask_on() -> None:
        while not stop.is_set():
            prompt = draw_tokens(rng, 32, setup.shape.vocab_size)
            done.append(await engine.generate(request(prompt, 96, temperature=SAMPLED)))

    askers = [asyncio.create_task(ask_on()) for _ in range(16)]
    try:
        for number in range(1, TORN_ROUNDS + 1):
            await asyncio.sleep(0.3 if setup.device == "cuda" else 1.0)
            version = (await engine.stats()).policy_version + 1
            served[version] = CONSTANTS[number % 2][0]
            await give_tensors(ship, models[number % 2])
    finally:
        stop.set()
        try:
            await asyncio.wait_for(asyncio.gather(*askers), 60.0)
        finally:
            for asker in askers:
                asker.cancel()
    del models
    free(setup.device)
    wrong = sum(
        token != served[span.version]
        for completion in done
        for span in completion.versions
        for token in completion.token_ids[span.start : span.end]
    )
    several = sum(len(completion.versions) > 1 for completion in done)
    tokens = sum(len(completion.token_ids) for completion in done)
    seen = f"{TORN_ROUNDS} updates; {len(done)} answers, {several} over an update; {wrong} of {tokens} tokens wrong"
    return seen, wrong == 0 and several > 0


async def first_weights(fleet: Fleet, ship: Ship) -> tuple[str, bool]:
    seconds = await give(fleet, ship, spread_model)
    requests = work(fleet, seed=2)
    run = await ask(ship.engine, requests, temperature=SAMPLED)
    seen, right = compare(fleet, run, requests, SAMPLED)
    return f"{seconds:.3f} s; {seen}", right


async def abort(fleet: Fleet, ship: Ship) -> tuple[str, bool]:
    (long,) = work(fleet, 1, new=1500)
    asked = request(long.prompt_token_ids, long.max_new_tokens, temperature=SAMPLED, request_id="proof-abort")
    task = asyncio.create_task(ship.engine.generate(asked))
    await asyncio.sleep(0.5)
    start = time.perf_counter()
    await ship.engine.abort(["proof-abort"])
    completion = await asyncio.wait_for(task, 30.0)
    seconds, count = time.perf_counter() - start, len(completion.token_ids)
    seen = f"{completion.finish_reason} after {seconds:.3f} s with {count} tokens"
    return seen, completion.finish_reason == "abort" and 0 < count < long.max_new_tokens


async def sessions(fleet: Fleet, ship: Ship) -> tuple[str, bool | None]:
    """Each turn sends new tokens alone; the same history as a whole prompt must score the same."""
    engine = ship.engine
    if "sessions" not in engine.info.capabilities:
        return "no sessions", None
    rng = random.Random(fleet.setup.seed)
    new = [draw_tokens(rng, 160, fleet.setup.shape.vocab_size) for _ in range(4)]
    session = await engine.open_session(engine.info.max_context_len)
    prompts: list[tuple[int, ...]] = []
    made: list[Completion] = []
    try:
        parent: str | None = None
        for turn in (0, 1):
            completion = await _turn(engine, session, parent, new[turn])
            before = prompts[-1] + made[-1].token_ids if made else ()
            prompts.append(before + new[turn])
            made.append(completion)
            parent = completion.request_id
        history = prompts[-1] + made[-1].token_ids
        for branch in (2, 3):
            made.append(await _turn(engine, session, parent, new[branch]))
            prompts.append(history + new[branch])
    finally:
        await engine.close_session(session)
    run = Run(completions=tuple(made), wall_s=1.0, cpu_s=0.0)
    requests = [Request(prompt_token_ids=prompt, max_new_tokens=32) for prompt in prompts]
    seen, right = compare(fleet, run, requests, GREEDY)
    cached = [completion.num_cached_tokens for completion in made]
    left = (await engine.stats()).num_sessions
    return f"cached {cached} of {[len(p) for p in prompts]}; {seen.partition(';')[0]}", right and cached[-1] > 0 == left


async def _turn(engine: object, session: str, parent: str | None, new: tuple[int, ...]) -> Completion:
    asked = request(new, 32, temperature=GREEDY, session=SessionRef(session_id=session, parent_request_id=parent))
    return await engine.generate(asked)  # type: ignore[attr-defined, no-any-return]


async def sleep(fleet: Fleet, ship: Ship) -> tuple[str, bool | None]:
    if "sleep" not in ship.engine.info.capabilities:
        return "can't sleep", None
    rows: list[list[str]] = []
    await colocated.one_round(fleet, ship, rows)
    memory = " -> ".join(row[2] for row in rows if row[2])
    return f"{memory} GiB; {rows[-1][0]}", rows[-1][0].startswith("serving: 16 of 16")


async def drafts(fleet: Fleet, backend: str, ships: Sequence[Ship]) -> tuple[str, bool]:
    """The same model with drafts and without."""
    requests = draw("foreseen", 16, 128, 96, fleet.setup.shape.vocab_size, seed=fleet.setup.seed)
    runs = []
    for variant in ("plain", "ngram"):
        ship = await fleet.get(backend, variant)
        if all(ship is not other for other in ships):
            ships.append(ship)  # type: ignore[attr-defined]
        await give(fleet, ship, looping_model)
        runs.append(await ask(ship.engine, requests, temperature=GREEDY))
        await give(fleet, ship, spread_model)
    off, on = runs
    same = num_equal(off.token_ids, on.token_ids)
    worst = max(
        abs(a - b)
        for one, other in zip(off.completions, on.completions, strict=True)
        for a, b in zip(one.logprobs, other.logprobs, strict=True)
    )
    shortest = min(common_prefix(a, b) for a, b in zip(off.token_ids, on.token_ids, strict=True))
    accepted = "not told" if on.accept_len is None else f"{on.accept_len:.2f}"
    seen = f"{same} of {len(requests)} equal (all for {shortest} tokens), log-probabilities within {worst:.1e}, "
    return f"{seen}accept length {accepted}", same == len(requests) and worst <= TOLERANCE[fleet.setup.dtype]


async def metrics(ship: Ship) -> tuple[str, bool | None]:
    text = await ship.engine.metrics_text()  # type: ignore[attr-defined]
    series = {line.split("{")[0].split(" ")[0] for line in text.splitlines() if line and not line.startswith("#")}
    return f"{len(series)} series", True if series else None


if __name__ == "__main__":
    main()
