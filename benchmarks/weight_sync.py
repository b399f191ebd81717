"""Seconds of a weight update by each path into a real server, against copying the same bytes once on the device.

    python -m benchmarks.weight_sync                                        # CPU, tiny shape
    python -m benchmarks.weight_sync --device cuda --shape 0.5b --engine sglang
    python -m benchmarks.weight_sync --device cuda --shape 7b --engine sglang,vllm --budget-s 500

One server an engine and placement is started from the product's own configuration (interpreters: SKYRL_SGLANG_PYTHON,
SKYRL_VLLM_PYTHON, or what `make engines` installed) with a random model that lies on this disk. For each path a channel
is opened, and weights of another seed are pushed `--repetitions` times while the server is halted. What the product
adds around it, ending or holding requests, depends on the load and is measured with the rollouts.

    open      the channel: for a group, all workers have joined
    first     the first push: allocations, first communicator
    push      median of the others; what of a folder can be written before the pause is "ahead" instead
    probe     largest difference of log-probabilities between the server and transformers after the last push

A path that fails or is over its time is a row that says why. NCCL needs a second GPU and is a server of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import statistics
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks import machine
from benchmarks.engines.folders import spread_model
from benchmarks.engines.harness import SERVERS, Setup, add_options, first_line, names, setup_from
from benchmarks.engines.weights import free
from benchmarks.report import Report
from skyrl_train.config.machine import engine_release
from skyrl_train.engines.server.client import ServerClient
from skyrl_train.engines.server.process import LaunchSpec, ServerProcess
from skyrl_train.errors import EngineUnavailable
from skyrl_train.weight_sync.channel import WeightChannel
from skyrl_train.weight_sync.plan import WeightPlan
from skyrl_train.weight_sync.verify import TOLERANCES, probe_tokens, verify_weights

PATHS = ("disk", "tensor", "cuda_ipc", "gloo", "nccl")
ON = {"cpu": ("disk", "tensor", "gloo"), "cuda": ("disk", "cuda_ipc", "gloo", "nccl")}
PATH_S = 150.0
"""Of one path at most."""
MIN_PATH_S = 10.0
STOP_S = 25.0
"""Kept for the server to end in."""
HEAD = ("engine", "path", "open, s", "ahead, s", "first, s", "push, s", "GB/s", "device copies", "probe", "")


@dataclass(frozen=True, kw_only=True)
class Launched:
    """A server to start, and how to reach it while it runs."""

    spec: LaunchSpec
    connect: Callable[[str], ServerClient]
    open_channel: Callable[[str, str], WeightChannel]
    """By path and url."""


@dataclass(kw_only=True)
class Weights:
    """The trainer's: tensors of another seed than the server began with, and what its forward says of the probe."""

    model: PreTrainedModel
    token_ids: tuple[int, ...]
    plan: WeightPlan

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        return self.model.state_dict()

    def change(self) -> None:
        """So that weights that stayed as they were would show."""
        with torch.no_grad():
            self.model.model.norm.weight.mul_(-1.0)

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        ids = torch.tensor([list(token_ids)], device=self.model.device)
        with torch.no_grad():
            logprobs = self.model(ids).logits[0, :-1].float().log_softmax(-1)
        return [float(value) for value in logprobs.gather(1, ids[0, 1:, None])[:, 0]]


def launch(setup: Setup, engine: str, variant: str, disk_root: Path) -> Launched:
    config = setup.config(engine, variant)
    logs, folder = setup.work / "runs" / f"weight-sync-{engine}-{variant}", setup.folder
    device = torch.device("cuda:0" if setup.device == "cuda" else "cpu")
    common: dict[str, Any] = {"model_folder": folder, "device": device, "disk_root": disk_root}
    if engine == "sglang":
        from skyrl_train.engines.sglang.launch import sglang_launch
        from skyrl_train.engines.sglang.weights import sglang_channel

        sglang = sglang_launch(config, 0, log_folder=logs, model_path=str(folder))
        release = sglang.traits.release
        return Launched(
            spec=sglang.spec,
            connect=sglang.client,
            open_channel=lambda path, url: sglang_channel(path, url, release=release, **common),  # type: ignore[arg-type]
        )
    from skyrl_train.engines.vllm.launch import vllm_launch
    from skyrl_train.engines.vllm.weights import vllm_channel

    # Its shared carrier takes memory of the host as well, under the one name.
    vllm = vllm_launch(config, 0, log_folder=logs, model_path=str(folder))
    assert vllm.spec is not None
    return Launched(
        spec=vllm.spec,
        connect=vllm.client,
        open_channel=lambda path, url: vllm_channel("cuda_ipc" if path == "tensor" else path, url, **common),
    )


class Bench:
    """One run: its servers, one after the other, and the rows of its table."""

    def __init__(self, args: argparse.Namespace, setup: Setup, report: Report, end: float) -> None:
        self._args = args
        self._setup = setup
        self._report = report
        self._end = end
        self._copy_s = 0.0
        self.rows: list[list[str]] = []

    async def run(self, weights: Weights) -> None:
        num_bytes = weights.plan.num_bytes
        self._copy_s = 2 * num_bytes / machine.copy_bytes_per_s(self._setup.device, min(num_bytes, 2**31))
        for engine in self._args.engine:
            for variant, paths in self._placements().items():
                try:
                    await self._engine(engine, variant, paths, weights)
                except Exception as exc:
                    self._report.log(f"{engine}, {variant}: failed\n{traceback.format_exc()}")
                    done = {row[1] for row in self.rows if row[0] == engine}
                    self.rows += [_failed(engine, path, first_line(exc)) for path in paths if path not in done]

    def head(self, weights: Weights) -> dict[str, str]:
        setup, num_bytes = self._setup, weights.plan.num_bytes
        releases = {engine: engine_release(setup.config(engine)) or "unknown" for engine in self._args.engine}
        return {
            **machine.describe(setup.device),
            "model": setup.describe(),
            "update": f"{num_bytes / 1e9:.3f} GB in {len(weights.plan.specs)} tensors, buckets of "
            f"{self._args.bucket_mib} MiB, {self._args.repetitions} pushes after the first",
            "a copy of it on the device": f"{self._copy_s * 1000:.2f} ms "
            f"({2 * num_bytes / self._copy_s / 1e9:,.0f} GB/s read and written)",
            "folders": str(self._args.disk_root or "below --work"),
            **releases,
        }

    def _placements(self) -> dict[str, list[str]]:
        """Paths by the placement of the server that they need."""
        paths = list(self._args.paths or ON[self._setup.device])
        apart = [path for path in paths if path == "nccl"]
        beside = [path for path in paths if path != "nccl"]
        return {variant: some for variant, some in (("plain", beside), ("group", apart)) if some}

    async def _engine(self, engine: str, variant: str, paths: list[str], weights: Weights) -> None:
        if variant == "group" and torch.cuda.device_count() < 2:
            self.rows += [_failed(engine, path, "needs a second GPU") for path in paths]
            return
        disk_root = (self._args.disk_root or self._setup.work / "folders") / engine
        launched = launch(self._setup, engine, variant, disk_root)
        process = ServerProcess(launched.spec)
        began = time.perf_counter()
        try:
            url = await self._start(process)
            self._report.log(f"{engine}, {variant}: up after {time.perf_counter() - began:.1f} s")
            for path in paths:
                if not process.is_running:
                    url = await self._start(process)
                self.rows.append(await self._path(engine, path, launched, url, weights))
        finally:
            await process.stop()
            shutil.rmtree(disk_root, ignore_errors=True)

    async def _start(self, process: ServerProcess) -> str:
        limit_s = self._end - time.perf_counter() - STOP_S
        try:
            async with asyncio.timeout(max(limit_s, 0.0)):
                return await process.start()
        except TimeoutError as exc:
            raise EngineUnavailable(
                f"the server was not up within the {max(limit_s, 0.0):.0f} s that were left"
            ) from exc

    def fill(self) -> None:
        """A row for each path that has none: what broke the run off is in the log."""
        done = {(row[0], row[1]) for row in self.rows}
        for engine in self._args.engine:
            for paths in self._placements().values():
                self.rows += [_failed(engine, path, "broken off") for path in paths if (engine, path) not in done]

    async def _path(self, engine: str, path: str, launched: Launched, url: str, weights: Weights) -> list[str]:
        limit_s = min(PATH_S, self._end - time.perf_counter() - STOP_S)
        if limit_s < MIN_PATH_S:
            return _failed(engine, path, "not run: the time was over")
        client = launched.connect(url)
        try:
            async with asyncio.timeout(limit_s):
                return await self._measure(engine, path, client, launched.open_channel(path, url), weights)
        except TimeoutError:
            self._report.log(f"{engine}, {path}: not done\n{traceback.format_exc()}")
            return _failed(engine, path, f"not done after {limit_s:.0f} s")
        except Exception as exc:
            self._report.log(f"{engine}, {path}: failed\n{traceback.format_exc()}")
            return _failed(engine, path, first_line(exc))
        finally:
            await client.close()

    async def _measure(
        self, engine: str, path: str, client: ServerClient, channel: WeightChannel, weights: Weights
    ) -> list[str]:
        try:
            open_s = await _timed(channel.open())
            await client.halt()
            ahead, pushes = [], []
            for turn in range(self._args.repetitions + 1):
                weights.change()
                machine.synchronize(self._setup.device)
                update = {"plan": weights.plan, "tensors": weights.tensors, "version": turn + 1}
                ahead.append(await _timed(channel.prepare(**update)))
                pushes.append(await _timed(channel.push(**update)))
                self._report.log(f"{engine}, {path}: push {turn}: ahead {ahead[-1]:.4f} s, push {pushes[-1]:.4f} s")
            await client.release()
            # The figure is the row's; whether it passes is said beside it.
            difference, verdict = await self._probe(client, weights, engine)
        finally:
            await channel.close()
        push_s = statistics.median(pushes[1:] or pushes)
        ahead_s = statistics.median(ahead[1:] or ahead)
        return [
            engine,
            path,
            f"{open_s:.3f}",
            f"{ahead_s:.3f}" if ahead_s > 1e-3 else "-",
            f"{ahead[0] + pushes[0]:.3f}",
            f"{push_s:.4f}",
            f"{weights.plan.num_bytes / push_s / 1e9:.1f}",
            f"{push_s / self._copy_s:.1f}",
            difference,
            verdict,
        ]

    async def _probe(self, client: ServerClient, weights: Weights, engine: str) -> tuple[str, str]:
        dtype = self._setup.dtype
        worst = await verify_weights(
            client.score,
            weights.score,
            token_ids=weights.token_ids,
            dtype=dtype,
            engine=engine,
            version=self._args.repetitions + 1,
            tolerance=float("inf"),
        )
        bound = TOLERANCES[dtype]
        return f"{worst:.2g}", "" if worst <= bound else f"WRONG WEIGHTS: over {bound:g}"


async def _timed(action: Awaitable[None]) -> float:
    start = time.perf_counter()
    await action
    return time.perf_counter() - start


def _failed(engine: str, path: str, why: str) -> list[str]:
    return [engine, path, *[""] * (len(HEAD) - 3), why]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.weight_sync", description=(__doc__ or "").splitlines()[0])
    add_options(parser)
    parser.add_argument("--engine", type=names(SERVERS), default=("sglang",), help="sglang, vllm, or sglang,vllm")
    parser.add_argument("--paths", type=names(PATHS), default=None, help="default: all that the device has")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--bucket-mib", type=int, default=512)
    parser.add_argument("--disk-root", type=Path, default=None, help="for the folders; /dev/shm is memory")
    return parser.parse_args(argv)


async def measure(args: argparse.Namespace) -> list[list[str]]:
    end = time.perf_counter() + args.budget_s
    report = Report(
        f"Seconds of a weight update, {args.shape}", f"weight-sync-{args.shape}-{machine.slug(args.device)}", args.out
    )
    setup = setup_from(args)
    model = spread_model(setup.shape, device=setup.device, dtype=setup.dtype, seed=setup.seed + 1)
    weights = Weights(
        model=model,
        token_ids=probe_tokens(setup.shape.vocab_size),
        plan=WeightPlan.of(model.state_dict(), dtype=setup.dtype, bucket_bytes=args.bucket_mib * 2**20),
    )
    bench = Bench(args, setup, report, end)
    try:
        await bench.run(weights)
    finally:
        bench.fill()
        report.facts(bench.head(weights))
        report.table(HEAD, bench.rows)
        report.save()
        free(setup.device)
    return bench.rows


def main(argv: Sequence[str] | None = None) -> list[list[str]]:
    return asyncio.run(measure(parse(argv)))


if __name__ == "__main__":
    main()
