"""Servers for tests: the real command as a process, and an app over an engine that the test holds."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import uvicorn
from fastapi import FastAPI

from skyrl_train.engines.embedded import EmbeddedConfig, EmbeddedEngine
from tests.tiny import make_model, make_tokenizer

LIMITS = ("--max-num-seqs", "32", "--kv-cache-tokens", "16384", "--device", "cpu")


@dataclass(frozen=True, kw_only=True)
class Served:
    """A running `serve` command."""

    url: str
    process: subprocess.Popen[str]


def serve_command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "skyrl_train.entrypoints.serve", *map(str, arguments)]


def environment(**variables: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables}


@contextmanager
def served(folder: Path, *arguments: str, **variables: str) -> Iterator[Served]:
    """Starts the command on a free port, waits until it serves, and has it end by SIGTERM with code 0."""
    process = subprocess.Popen(
        serve_command(folder, "--port", "0", *LIMITS, *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**variables),
    )
    with process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line.startswith("serving "):
                process.kill()
                raise AssertionError(f"{line}{process.communicate()[1]}")
            yield Served(url=line.split(" at ")[1].split(" ")[0].removesuffix("/v1"), process=process)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors


def make_engine(model: torch.nn.Module | None = None) -> EmbeddedEngine:
    """An engine over a model, a tiny one if none is given, stepped by a thread of its own."""
    config = EmbeddedConfig(max_num_seqs=16, kv_cache_tokens=8192)
    return EmbeddedEngine(model or make_model(), make_tokenizer(), config=config, driver="thread")


@asynccontextmanager
async def app_running(app: FastAPI) -> AsyncGenerator[str, None]:
    """The app behind a real socket, in a thread; its URL."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        await asyncio.to_thread(thread.join)
