"""A real SGLang server on a CPU for tests of what talks to it, and what transformers says of the same model."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import torch
from transformers import PreTrainedModel

FLAGS = (
    "--device cpu --dtype float32 --attention-backend torch_native --sampling-backend pytorch --disable-cuda-graph "
    "--max-total-tokens 4000 --max-running-requests 8 --mem-fraction-static 0.3 --sleep-on-idle"
)
START_TIMEOUT_S = 300


class RunningServer:
    """Started by `start`, also again; ended with its whole process group."""

    def __init__(self, python: Path, model: Path, log: Path, *flags: str) -> None:
        self._python = python
        self._model = model
        self._log = log
        self._flags = flags
        self._process: subprocess.Popen[bytes] | None = None
        self.url = ""

    def start(self) -> None:
        """Returns once it is healthy; a server that runs already is kept."""
        if self._process is not None and self._process.poll() is None and self._is_healthy():
            return
        self.stop()
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [str(self._python), "-m", "sglang.launch_server", "--model-path", str(self._model)]
        command += ["--host", "127.0.0.1", "--port", str(port), *FLAGS.split(), *self._flags]
        environment = {
            **os.environ,
            "SGLANG_USE_CPU_ENGINE": "1",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PATH": f"{self._python.parent}:{os.environ['PATH']}",
        }
        environment.pop("SGLANG_CPU_OMP_THREADS_BIND", None)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._is_healthy():
            assert self._process.poll() is None and time.monotonic() < deadline, self._log.read_text()[-3000:]
            time.sleep(0.5)

    def kill(self) -> None:
        """At once, as a crash would."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self.kill()
        self._process = None

    def _is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=30) as answer:
                return bool(answer.status == 200)
        except (OSError, ValueError):
            return False


async def post(url: str, path: str, body: Any) -> Any:
    async with aiohttp.ClientSession() as session, session.post(f"{url}{path}", json=body) as response:
        assert response.status == 200, await response.text()
        return await response.json(content_type=None)


async def weight_version(url: str) -> str:
    async with aiohttp.ClientSession() as session, session.get(f"{url}/model_info") as response:
        return str((await response.json())["weight_version"])


async def score(url: str, token_ids: Sequence[int]) -> list[float]:
    """Log-probabilities of token_ids[1:]."""
    sampling = {"temperature": 0, "max_new_tokens": 1}
    answer = await post(
        url,
        "/generate",
        {"input_ids": list(token_ids), "sampling_params": sampling, "return_logprob": True, "logprob_start_len": 0},
    )
    return [entry[0] for entry in answer["meta_info"]["input_token_logprobs"][1:]]


@torch.no_grad()
def reference(model: PreTrainedModel, token_ids: Sequence[int]) -> list[float]:
    ids = torch.tensor([list(token_ids)])
    logprobs = model(ids).logits[0, :-1].float().log_softmax(-1)
    return [float(value) for value in logprobs.gather(1, ids[0, 1:, None])[:, 0]]
