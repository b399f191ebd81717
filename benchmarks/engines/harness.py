"""What the engines' benchmarks share: options, one random model, and engines started from configuration keys.

    Setup    what the user asked for: shape, device, interpreters, further keys
    Fleet    engines by (backend, variant), started by the product's own builder, kept until the end

Engines of a GPU stay up beside each other and idle while another is measured; on a CPU one is up at a time.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shutil
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import torch

from benchmarks import machine
from benchmarks.engines.folders import model_folder, untied
from benchmarks.learning.job import ROOT
from benchmarks.models import SHAPES, ModelShape
from benchmarks.report import RESULTS, Report
from skyrl_train.config import Config, load_config
from skyrl_train.config.machine import engine_release
from skyrl_train.engines.base import Engine
from skyrl_train.engines.build import Places, build_server_engine
from skyrl_train.entrypoints.build import device_of, engine_over
from skyrl_train.entrypoints.build_rollouts import load_tokenizer
from skyrl_train.training.model import load_model

BACKENDS = ("embedded", "sglang", "vllm")
SERVERS = ("sglang", "vllm")
CLOSE_TIMEOUT_S = 60.0
CELL_S = 180.0
"""Of one cell of a table at most."""
MIN_CELL_S = 2.0

T = TypeVar("T")


class Failed(str):
    """Stands in a table where a figure would."""


VARIANTS: dict[str, dict[str, str]] = {
    "plain": {},
    # Metrics cost a little: on where nothing is timed beside another variant.
    "disk": {"generator.weight_sync_backend": "disk", "generator.metrics.enabled": "true"},
    "no prefix cache": {"generator.enable_prefix_caching": "false"},
    "ngram": {
        "generator.speculative_decoding.enabled": "true",
        "generator.speculative_decoding.algorithm": "ngram",
        "generator.speculative_decoding.num_draft_tokens": "8",
    },
    # The trainer on the first GPU, the engine on the second; on a CPU the same through gloo.
    "group": {"trainer.placement.colocate_all": "false"},
}
"""Keys over those of `Setup.keys`, by the name of what is different."""

VLLM_CACHE_GIB = 11
"""Beside its weights; with what it needs to run."""


def gpu_keys(backend: str, shape: ModelShape, dtype: torch.dtype) -> dict[str, str]:
    """So that several small engines fit beside each other on one GPU, with room for 200 000 tokens or more each."""
    if backend == "sglang":
        # The fraction is an upper bound here: what counts is the number of tokens.
        return {"generator.gpu_memory_utilization": "0.8", "generator.scheduling.max_total_tokens": "262144"}
    if backend == "embedded":
        return {"generator.gpu_memory_utilization": "0.15"}
    weights = (shape.num_step_weights + shape.num_head_weights) * dtype.itemsize
    total = torch.cuda.get_device_properties(0).total_memory
    return {"generator.gpu_memory_utilization": f"{(weights + VLLM_CACHE_GIB * 2**30) / total:.3f}"}


@dataclass(frozen=True, kw_only=True)
class Setup:
    """`folder` is the model; `pythons` have the servers; `more` are keys of the servers' configuration, and win,
    `more_embedded` those of the embedded engine's.
    """

    shape: ModelShape
    device: str
    dtype: torch.dtype
    seed: int
    folder: Path
    work: Path
    pythons: Mapping[str, str]
    max_model_len: int
    max_num_seqs: int
    more: tuple[str, ...] = ()
    more_embedded: tuple[str, ...] = ()

    def overrides(self, backend: str, variant: str = "plain", *, number: int = 0) -> list[str]:
        """The configuration of one engine, as overrides of the main job's command line."""
        on_gpu = self.device == "cuda"
        dtype = str(self.dtype).removeprefix("torch.")
        keys = {
            "generator.backend": backend,
            "trainer.policy.model.path": str(self.folder),
            "trainer.policy.model.dtype": dtype,
            "trainer.placement.policy_num_gpus_per_node": str(int(on_gpu)),
            "trainer.placement.colocate_all": "true",
            "trainer.run_path": str(self.work / "runs" / f"{backend}-{variant.replace(' ', '-')}-{number}"),
            "trainer.seed": str(self.seed),
            "generator.max_model_len": str(self.max_model_len),
            "generator.max_input_length": str(self.max_model_len // 2),
            "generator.sampling_params.max_generate_length": str(self.max_model_len // 2),
            "generator.eval_sampling_params.max_generate_length": str(self.max_model_len // 2),
            "generator.max_num_seqs": str(self.max_num_seqs),
        }
        if on_gpu:
            keys |= gpu_keys(backend, self.shape, self.dtype)
        if backend in SERVERS:
            keys |= {"generator.model_dtype": dtype, **VARIANTS[variant]}
            if backend in self.pythons:
                keys["generator.engine_python"] = self.pythons[backend]
            if variant == "group":
                keys["generator.weight_sync_backend"] = "nccl" if on_gpu else "gloo"
        elif variant != "plain":
            keys |= VARIANTS[variant]
        more = self.more if backend in SERVERS else self.more_embedded
        return [*(f"{key}={value}" for key, value in keys.items()), *more]

    def config(self, backend: str, variant: str = "plain", *, number: int = 0) -> Config:
        return load_config(self.overrides(backend, variant, number=number)).config

    def describe(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"Qwen2 of shape {self.shape.name} with an untied head, {dtype}, random with seed {self.seed}"


def parser_of(prog: str, doc: str | None) -> argparse.ArgumentParser:
    """With the options that all of these have. `doc` is the module's: its first line says what it does."""
    parser = argparse.ArgumentParser(prog=prog, description=(doc or "").splitlines()[0])
    add_options(parser)
    return parser


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=None, help="default: by the device")
    parser.add_argument("--seed", type=int, default=0, help="of weights and workload")
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "engines", help="for models and servers' logs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--budget-s", type=float, default=3600.0, help="what doesn't fit any more is not run")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a key of the servers' configuration; may be repeated",
    )
    parser.add_argument(
        "--set-embedded", action="append", default=[], metavar="KEY=VALUE", help="the same of the embedded engine's"
    )


def setup_from(args: argparse.Namespace) -> Setup:
    dtype = getattr(torch, args.dtype or ("bfloat16" if args.device == "cuda" else "float32"))
    shape = untied(args.shape)
    work = args.work.resolve()
    return Setup(
        shape=shape,
        device=args.device,
        dtype=dtype,
        seed=args.seed,
        folder=model_folder(
            shape,
            work / "models",
            device=args.device,
            dtype=dtype,
            seed=args.seed,
            num_positions=args.max_model_len,
        ),
        work=work,
        pythons=interpreters(),
        max_model_len=args.max_model_len,
        max_num_seqs=args.max_num_seqs,
        more=tuple(args.set),
        more_embedded=tuple(args.set_embedded),
    )


def interpreters() -> dict[str, str]:
    """Those of SKYRL_SGLANG_PYTHON and SKYRL_VLLM_PYTHON, else what `make engines` installed."""
    found = {}
    for backend in SERVERS:
        installed = ROOT / ".engines" / backend / "bin" / "python"
        named = os.environ.get(f"SKYRL_{backend.upper()}_PYTHON")
        if named or installed.exists():
            found[backend] = named or str(installed)
    return found


@dataclass(kw_only=True)
class Ship:
    """One engine of a fleet."""

    backend: str
    variant: str
    engine: Engine
    config: Config
    start_s: float

    @property
    def name(self) -> str:
        return self.backend if self.variant == "plain" else f"{self.backend}, {self.variant}"


@dataclass(kw_only=True)
class Fleet:
    """Engines that are started when they are first asked for, or before, by `prepare`."""

    setup: Setup
    report: Report
    one_at_a_time: bool
    end: float
    """time.perf_counter() after which nothing is begun."""
    _ships: dict[tuple[str, str], asyncio.Task[Ship]] = field(default_factory=dict)
    _num_started: int = 0

    @property
    def left_s(self) -> float:
        return self.end - time.perf_counter()

    def prepare(self, backend: str, *variants: str) -> None:
        """Starts these in the background; does nothing where one engine is up at a time.

        vLLM sizes itself by what it finds free on the GPU, and gives up when that changes meanwhile: it is started when
        it is asked for.
        """
        if not self.one_at_a_time and backend != "vllm":
            for variant in variants:
                self._begin(backend, variant)

    async def muster(self, backend: str, *variants: str) -> None:
        """Starts these and waits until none of them is starting: a start takes processors and GPU from what is timed.

        The first one alone: it compiles what the others find compiled. A failure is raised by `get`.
        """
        if self.one_at_a_time:
            return
        for some in (variants[:1], variants[1:]):
            starting = []
            for variant in some:
                starting.append(self._begin(backend, variant))
                if backend == "vllm":
                    await asyncio.wait(starting, timeout=max(self.left_s, 0.0))
            if starting:
                await asyncio.wait(starting, timeout=max(self.left_s, 0.0))

    async def get(self, backend: str, variant: str = "plain") -> Ship:
        """Started; after a failed start the same failure each time."""
        if self.one_at_a_time:
            for key in [key for key in self._ships if key != (backend, variant)]:
                await self._close(key)
        return await asyncio.shield(self._begin(backend, variant))

    async def close(self) -> None:
        await asyncio.gather(*(self._close(key) for key in list(self._ships)))

    def _begin(self, backend: str, variant: str) -> asyncio.Task[Ship]:
        key = (backend, variant)
        if key not in self._ships:
            self._ships[key] = asyncio.create_task(self._start(backend, variant))
        return self._ships[key]

    async def _start(self, backend: str, variant: str) -> Ship:
        self._num_started += 1
        config = self.setup.config(backend, variant, number=self._num_started)
        start = time.perf_counter()
        engine = await build(config)
        try:
            await engine.start()
        except BaseException:
            await engine.close()
            raise
        seconds = time.perf_counter() - start
        info = replace(engine.info, model=Path(engine.info.model).name)  # where it lies is this machine's affair
        self.report.log(f"{backend}, {variant}: up after {seconds:.1f} s, {info}")
        return Ship(backend=backend, variant=variant, engine=engine, config=config, start_s=seconds)

    async def _close(self, key: tuple[str, str]) -> None:
        task = self._ships.pop(key)
        if not task.done():
            task.cancel()
        with contextlib.suppress(Exception, asyncio.CancelledError):
            ship = await task
            await asyncio.wait_for(ship.engine.close(), CLOSE_TIMEOUT_S)


@asynccontextmanager
async def open_fleet(args: argparse.Namespace, report: Report) -> AsyncIterator[Fleet]:
    end = time.perf_counter() + args.budget_s
    fleet = Fleet(setup=setup_from(args), report=report, one_at_a_time=args.device == "cpu", end=end)
    try:
        yield fleet
    finally:
        await fleet.close()
        keep_logs(fleet.setup, args.out)


def new_report(name: str, title: str, args: argparse.Namespace) -> Report:
    """A benchmark of one server (`name` has {engine}) has a table for each."""
    what = name.format(engine=getattr(args, "engine", ""))
    return Report(
        f"{title.format(engine=getattr(args, 'engine', ''))}, {args.shape}",
        f"engines-{what}-{args.shape}-{machine.slug(args.device)}",
        args.out,
    )


def run_alone(
    name: str,
    title: str,
    measure: Callable[[Fleet, Report, argparse.Namespace], Awaitable[None]],
    args: argparse.Namespace,
) -> None:
    """One benchmark with engines of its own: its table and log."""

    async def run() -> None:
        report = new_report(name, title, args)
        async with open_fleet(args, report) as fleet:
            await measure(fleet, report, args)
        report.save()

    asyncio.run(run())


async def cell(fleet: Fleet, what: str, action: Callable[[], Awaitable[T]], *, limit_s: float = CELL_S) -> T | Failed:
    """One measurement. A failure is in the log and comes back as what the table shows: the others still run."""
    report = fleet.report
    limit_s = min(limit_s, fleet.left_s)
    if limit_s < MIN_CELL_S:
        report.log(f"{what}: not run, the time is over")
        return Failed("not run: the time was over")
    try:
        async with asyncio.timeout(limit_s):
            return await action()
    except TimeoutError:
        report.log(f"{what}: not done after {limit_s:.0f} s\n{traceback.format_exc()}")
        return Failed(f"not done after {limit_s:.0f} s")
    except Exception as exc:
        report.log(f"{what}: failed\n{traceback.format_exc()}")
        return Failed(first_line(exc))


def facts(fleet: Fleet, ships: Sequence[Ship], workload: str) -> dict[str, str]:
    """Rows of a report's head."""
    rows = {**machine.describe(fleet.setup.device), "model": fleet.setup.describe(), "workload": workload}
    for ship in ships:
        where = engine_release(ship.config) or "in this process"
        rows[ship.name] = f"{where}; start {ship.start_s:.1f} s; log-probabilities: {ship.engine.info.logprob_space}"
    return rows


def keep_logs(setup: Setup, out: Path) -> None:
    """The servers' logs beside the tables: for a machine that is given back afterwards."""
    for log in (setup.work / "runs").rglob("*.log"):
        target = out / "servers" / f"{log.relative_to(setup.work / 'runs')}".replace(os.sep, "-")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(log, target)


def first_line(exc: BaseException) -> str:
    """For a cell of a table; the whole is in the log."""
    text = (str(exc).splitlines() or [""])[0][:160].replace("|", "/")
    return f"{type(exc).__name__}: {text}"


def names(allowed: Sequence[str]) -> object:
    """For argparse: a comma-separated choice of these."""

    def parse(text: str) -> tuple[str, ...]:
        chosen = tuple(text.split(","))
        if unknown := [name for name in chosen if name not in allowed]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is none of {', '.join(allowed)}")
        return chosen

    return parse


def ints(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


async def build(config: Config) -> Engine:
    """The product's own engine for this configuration, over weights of its own; not started."""
    folder, run_path = Path(config.trainer.policy.model.path), Path(str(config.trainer.run_path))
    if config.generator.backend == "embedded":
        dtype = getattr(torch, config.trainer.policy.model.dtype or "float32")
        model = await asyncio.to_thread(load_model, folder, dtype=dtype, device=device_of(config))
        return engine_over(model, config, load_tokenizer(folder))
    return await build_server_engine(
        config,
        Places(model=folder, logs=run_path / "engines", weights=run_path / "weights"),
        device=torch.device(device_of(config)),
        tokenizer=load_tokenizer(folder),
    )
