"""Serve a model: `python -m skyrl_train.entrypoints.serve runs/quickstart/export [--port 8000 ...]`.

Exit codes: 0 stopped by Ctrl-C or SIGTERM, after open requests had their time to end; 2 it can't be served as asked,
nothing was started; 3 the server failed; 130 stopped by Ctrl-C while the model was loading.
"""

from __future__ import annotations

import argparse
import logging
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skyrl_train.errors import ConfigError

if TYPE_CHECKING:
    from skyrl_train.engines.embedded.engine import EmbeddedEngine

logger = logging.getLogger(__name__)

KEY_VARIABLE = "SKYRL_API_KEY"
DTYPES = ("auto", "float32", "bfloat16", "float16")


def main(argv: Sequence[str] | None = None) -> int:
    """Serve as the command line says; returns the exit code."""
    arguments = read_arguments(argv)
    try:
        key = checked_key(arguments)
        listener = bind(arguments.host, arguments.port)
        with listener:
            engine, tokenizer = load(arguments)
            return run(engine, tokenizer, listener, arguments, key)
    except ConfigError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def read_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m skyrl_train.entrypoints.serve",
        description="Serve a model in HF format over OpenAI's protocol, on the embedded engine.",
    )
    add = parser.add_argument
    add("model", type=Path, metavar="FOLDER", help="HF folder: config.json, weights, tokenizer")
    add("--host", default="127.0.0.1", help="interface to listen on; others than loopback need a key (%(default)s)")
    add("--port", type=int, default=8000, help="0 takes a free one (%(default)s)")
    add("--api-key", metavar="KEY", help=f"clients must send it as a bearer token; also read from ${KEY_VARIABLE}")
    add("--served-model-name", metavar="NAME", help="the name that clients use (the folder as given)")
    add("--dtype", choices=DTYPES, default="auto", help="auto: float32 on the CPU, bfloat16 on a GPU")
    add("--device", default="auto", help="cpu, cuda, cuda:1 ...; auto: a GPU if there is one")
    add("--max-num-seqs", type=int, default=256, help="requests computed at once (%(default)s)")
    add("--max-num-batched-tokens", type=int, default=2048, help="rows of one step (%(default)s)")
    add("--max-model-len", type=int, metavar="TOKENS", help="prompt and answer together (what the model can)")
    add("--kv-cache-tokens", type=int, metavar="TOKENS", help="size of the KV cache (from --kv-cache-frac)")
    add("--kv-cache-frac", type=float, default=0.3, help="part of the free memory for it (%(default)s)")
    add("--no-prefix-caching", action="store_true", help="compute every prompt anew")
    add("--seed", type=int, default=0, help="seeds the requests that bring no seed (%(default)s)")
    add("--drain-s", type=int, default=30, help="seconds that open requests get when the server stops (%(default)s)")
    return parser.parse_args(argv)


def checked_key(arguments: argparse.Namespace) -> str | None:
    """The key that clients need, if any. Raises ConfigError if other machines could come in without one."""
    from skyrl_train.serving.auth import is_loopback

    key: str | None = arguments.api_key if arguments.api_key is not None else os.environ.get(KEY_VARIABLE)
    if key is not None:
        if not key or not all("!" <= character <= "~" for character in key):
            raise ConfigError("the key must be visible ASCII characters without spaces, and not empty")
        return key
    try:
        closed = bool(arguments.host) and is_loopback(arguments.host)
    except OSError as exc:
        raise ConfigError(f"--host {arguments.host} does not resolve: {exc}") from exc
    if not closed:
        raise ConfigError(
            f"--host {arguments.host!r} can be reached from other machines, and there is no key: anybody could use the "
            f"model. Set --api-key or ${KEY_VARIABLE}, or leave --host at 127.0.0.1"
        )
    return None


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that doesn't listen yet: a port in use is found out before a model is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except (OSError, OverflowError) as exc:
        raise ConfigError(f"can't listen on {host}:{port}: {exc}; choose another --port (0 takes a free one)") from exc
    return listener


def load(arguments: argparse.Namespace) -> tuple[EmbeddedEngine, Any]:
    """The engine and the tokenizer of a folder. Raises ConfigError for one that can't be served."""
    folder: Path = arguments.model
    if not (folder / "config.json").is_file():
        raise ConfigError(f"no model at {folder}: an HF folder with config.json, weights and tokenizer is needed")
    import torch
    from safetensors import SafetensorError
    from transformers import AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from skyrl_train.engines.embedded.config import EmbeddedConfig
    from skyrl_train.engines.embedded.engine import EmbeddedEngine
    from skyrl_train.training.model import load_model

    config = EmbeddedConfig(
        max_num_seqs=arguments.max_num_seqs,
        max_num_batched_tokens=arguments.max_num_batched_tokens,
        max_context_len=arguments.max_model_len,
        kv_cache_tokens=arguments.kv_cache_tokens,
        kv_cache_frac=arguments.kv_cache_frac,
        enable_prefix_caching=not arguments.no_prefix_caching,
        seed=arguments.seed,
    )
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = arguments.dtype
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        torch.empty(0, device=device)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = load_model(folder, dtype=getattr(torch, dtype), device=device)
        return EmbeddedEngine(model, tokenizer, config=config, driver="thread"), tokenizer
    except (OSError, ValueError, RuntimeError, AssertionError, SafetensorError) as exc:
        # Whatever is wrong with the folder, the device or its memory, transformers and torch say it with one of these.
        logger.debug("loading %s failed", folder, exc_info=True)
        raise ConfigError(f"can't load {folder} on {device}: {' '.join(str(exc).split())}") from exc


def run(
    engine: EmbeddedEngine, tokenizer: Any, listener: socket.socket, arguments: argparse.Namespace, key: str | None
) -> int:
    """Serve until a signal; closes the engine."""
    import asyncio
    import signal

    import uvicorn

    from skyrl_train.serving.app import create_app

    name = arguments.served_model_name or str(arguments.model)
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(engine, tokenizer, name, key),
            log_level="warning",
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=arguments.drain_s,
        )
    )
    # uvicorn handles these while it serves. When all is drained it raises the signal again, for whoever
    # handled it before: by then there is nothing left to do.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    host, port = listener.getsockname()[:2]
    try:
        listener.listen(2048)
        shown = f"[{host}]" if ":" in host else host
        print(f"serving {name} at http://{shown}:{port}/v1 (Ctrl-C stops)", flush=True)
        server.run(sockets=[listener])
    except OSError as exc:
        raise ConfigError(f"can't listen on {host}:{port}: {exc}; choose another --port") from exc
    finally:
        asyncio.run(engine.close())
    print("stopped", flush=True)
    return 0 if server.started else 3


if __name__ == "__main__":
    sys.exit(main())
