"""Tokens per second through the endpoint, whole and streamed, beside the same engine in process.

    python -m benchmarks.serving                                   # 64 requests at once, tiny model, this CPU

The endpoint is the real command in a process of its own, the client this process: on a machine with few cores they
share them, so the difference is what HTTP, JSON and text cost on both sides together.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import torch
from transformers import PreTrainedModel

from benchmarks import machine
from benchmarks.measure import Timing, summarize, time_once
from benchmarks.models import SHAPES, build_model, build_tokenizer
from benchmarks.report import RESULTS, Report, rate
from benchmarks.workload import LengthRange, Request, describe, draw_requests, num_new_tokens
from skyrl_train.attention import ATTENTION_NAME
from skyrl_train.engines.embedded import EmbeddedConfig, EmbeddedEngine
from skyrl_train.training.model import export_hf
from skyrl_train.types import GenerateRequest, SamplingParams

KV_CACHE_TOKENS = 65_536

Ask = Callable[[httpx.AsyncClient, Request], Awaitable[int]]
"""Sends a request and reads its answer; how many tokens it had."""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt", type=LengthRange.parse, default=LengthRange(low=16, high=128), metavar="LOW:HIGH")
    parser.add_argument("--new", type=LengthRange.parse, default=LengthRange(low=16, high=256), metavar="LOW:HIGH")
    parser.add_argument("--seed", type=int, default=0, help="of weights and workload")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of the model's arithmetic")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    shape = SHAPES[args.shape]
    report = Report(
        f"Serving: {args.requests} requests at once, {args.shape}", f"serving-{machine.slug('cpu')}", args.out
    )
    requests = draw_requests(
        args.requests, prompt=args.prompt, new=args.new, vocab_size=shape.vocab_size, seed=args.seed
    )
    report.log(describe(requests))
    model = build_model(shape, attn_implementation="sdpa", device="cpu", dtype=torch.float32, seed=args.seed)
    with tempfile.TemporaryDirectory() as folder, served(model, shape.vocab_size, Path(folder), args) as url:
        ours = build_model(shape, attn_implementation=ATTENTION_NAME, device="cpu", dtype=torch.float32, seed=args.seed)
        engine = EmbeddedEngine(
            ours,
            None,
            config=EmbeddedConfig(kv_cache_tokens=KV_CACHE_TOKENS, enable_prefix_caching=False),
            driver="thread",
        )
        ways: dict[str, Callable[[], int]] = {
            "in process": lambda: asyncio.run(in_process(engine, requests)),
            "HTTP": lambda: asyncio.run(over_http(url, requests, ask_whole)),
            "HTTP, streamed": lambda: asyncio.run(over_http(url, requests, ask_stream)),
        }
        for way in ways.values():
            assert way() == num_new_tokens(requests)  # warms up, and counts what came
        timings: dict[str, list[Timing]] = {name: [] for name in ways}
        server_cpu_s: dict[str, list[float]] = {name: [] for name in ways}
        for i in range(args.repetitions):
            for name, way in ways.items():
                before = processor_seconds(url)
                timings[name].append(time_once(way, "cpu"))
                server_cpu_s[name].append(processor_seconds(url) - before)
                server = f"{server_cpu_s[name][-1]:.2f} processor s in the server"
                report.log(f"{name}, repetition {i}: {timings[name][-1]}; {server}")
        asyncio.run(engine.close())
    report.facts({**machine.describe("cpu"), "workload": f"{describe(requests)}; seed {args.seed}"})
    base = summarize(timings["in process"]).median_s
    rows = []
    for name in ways:
        figures = summarize(timings[name])
        speed = rate(num_new_tokens(requests), figures.median_s)
        seconds = f"{figures.median_s:.2f} ({figures.min_s:.2f} to {figures.max_s:.2f})"
        server = statistics.median(server_cpu_s[name])
        cpu = [
            f"{figures.cpu_s:.2f}",
            f"{server:.2f}",
            f"{1e6 * (figures.cpu_s + server) / num_new_tokens(requests):.0f}",
        ]
        rows.append([name, speed, f"{base / figures.median_s:.0%}", seconds, *cpu, figures.others])
    head = ["", "tokens/s", "of in process", "seconds, median (min to max)", "processor s, here", "in the server"]
    report.table([*head, "processor µs a token", "others used, up to"], rows)
    report.text(
        "Over HTTP, the processors that others used include the server's own process. Processor seconds are the "
        "figures to trust on a machine that others use."
    )
    report.save()


@contextmanager
def served(model: PreTrainedModel, vocab_size: int, folder: Path, args: argparse.Namespace) -> Iterator[str]:
    """The serve command over these weights; its URL."""
    export_hf(model, build_tokenizer(vocab_size), folder / "model")
    command = [sys.executable, "-m", "skyrl_train.entrypoints.serve", str(folder / "model"), "--port", "0"]
    command += ["--device", "cpu", "--kv-cache-tokens", str(KV_CACHE_TOKENS), "--no-prefix-caching"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line.startswith("serving "):
                raise RuntimeError(f"the server did not start: {line}")
            yield line.split(" at ")[1].split(" ")[0]
        finally:
            process.terminate()
            process.communicate()


def processor_seconds(url: str) -> float:
    """What the server has used since its start."""
    text = httpx.get(url.removesuffix("/v1") + "/metrics", trust_env=False).text
    found = next(line for line in text.splitlines() if line.startswith("process_cpu_seconds_total "))
    return float(found.split(" ")[1])


async def in_process(engine: EmbeddedEngine, requests: Sequence[Request]) -> int:
    completions = await asyncio.gather(
        *(
            engine.generate(
                GenerateRequest(
                    request_id=str(i),
                    prompt_token_ids=request.prompt_token_ids,
                    sampling=SamplingParams(max_new_tokens=request.max_new_tokens),
                )
            )
            for i, request in enumerate(requests)
        )
    )
    return sum(len(completion.token_ids) for completion in completions)


async def over_http(url: str, requests: Sequence[Request], ask: Ask) -> int:
    limits = httpx.Limits(max_connections=len(requests))
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits, trust_env=False) as client:
        return sum(await asyncio.gather(*(ask(client, request) for request in requests)))


def _body(request: Request) -> dict[str, object]:
    return {"prompt": request.prompt_token_ids, "max_tokens": request.max_new_tokens}


async def ask_whole(client: httpx.AsyncClient, request: Request) -> int:
    response = await client.post("/completions", json=_body(request))
    response.raise_for_status()
    num_tokens: int = response.json()["usage"]["completion_tokens"]
    return num_tokens


async def ask_stream(client: httpx.AsyncClient, request: Request) -> int:
    body = {**_body(request), "stream": True, "stream_options": {"include_usage": True}}
    last = {}
    async with client.stream("POST", "/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                last = json.loads(line.removeprefix("data: "))
    num_tokens: int = last["usage"]["completion_tokens"]
    return num_tokens


if __name__ == "__main__":
    main()
