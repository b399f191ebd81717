"""Runs of the main job that are killed: each in a process of its own, forked in milliseconds, ended by SIGKILL.

    this process ──► fork server: imports everything once, computes nothing ──► life ──► life ──► life ...

A life is killed from outside after some time, or kills itself at the n-th time that a moment comes: only what Python
and torch report of themselves is listened to (audit events, the optimizer's hooks), so the job runs as it always does.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, ClassVar

import safetensors.torch  # noqa: F401  # what the job imports late is imported here, once for all lives
import torch
import torchdata.stateful_dataloader  # noqa: F401
import transformers.models.qwen2.modeling_qwen2  # noqa: F401
from torch.optim.optimizer import register_optimizer_step_pre_hook

from skyrl_train.config.load import load_config
from skyrl_train.entrypoints.run import run

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 120

Moment = str
MOMENTS: dict[Moment, int] = {
    "an environment's step": 48,
    "before an optimizer step": 6,
    "a checkpoint's file is opened": 9,
    "a checkpoint is whole and not yet renamed": 2,
    "a checkpoint is renamed and older ones are not yet removed": 2,
    "an old checkpoint is half removed": 4,
}
"""Each with the most times that one waits for it: a few training steps."""


class NumberedEnv:
    """Row n's rewards lie between 2^n and 2^n + 1/8: a step's mean reward says which rows it was made of."""

    runs_inline = True
    at_step: ClassVar[Callable[[], None]] = staticmethod(lambda: None)

    def __init__(self, *, env_config: Any, extras: dict[str, Any]) -> None:
        self._number = extras["number"]

    def init(self, prompt: list[Any]) -> tuple[list[Any], dict[str, Any]]:
        return prompt, {}

    def step(self, action: str) -> dict[str, Any]:
        NumberedEnv.at_step()
        vowels = sum(letter in "aeiouAEIOU" for letter in action)
        return {
            "observations": [],
            "reward": float(1 << self._number) + min(vowels, 4) / 32,
            "done": True,
            "metadata": {},
        }

    def close(self) -> None:
        pass


def rows_of(reward_mean: float, num_prompts: int) -> list[int]:
    """The rows whose rewards have this mean, each of them once. 4 prompts, rows 0 1 2 4: (1 + 2 + 4 + 16 + 0.4) / 4."""
    bits = int(reward_mean * num_prompts)
    return [number for number in range(bits.bit_length()) if bits >> number & 1]


def live(
    command: Sequence[str],
    log: Path,
    *,
    after_s: float | None = None,
    moment: Moment | None = None,
    times: int = 1,
    max_file_bytes: int | None = None,
) -> int:
    """One life of the job; its exit code, -9 if it was killed: after this long, or the `times`-th time of `moment`.

    `max_file_bytes`: a longer file is refused by the kernel, as by a disk that is full.
    """
    process = _start((list(command), str(log), moment, times, max_file_bytes))
    process.join(TIMEOUT_S if after_s is None else after_s)
    if process.is_alive():
        process.kill()
        process.join()
        assert after_s is not None, f"no end within {TIMEOUT_S} s\n{log.read_text()[-4000:]}"
    assert process.exitcode is not None
    return process.exitcode


def _start(arguments: tuple[Any, ...]) -> ForkServerProcess:
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__, "pytest"])
    process = context.Process(target=_live, args=arguments)
    # For the fork server, which the first process starts: a process that has threads of OpenMP can't be forked.
    before = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "PYTHONPATH")}
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    try:
        process.start()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return process


def _live(command: list[str], log: str, moment: Moment | None, times: int, max_file_bytes: int | None) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    if max_file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
    if moment is not None:
        _die_at(moment, times)
    sys.exit(run(load_config(command)))


def _die_at(moment: Moment, times: int) -> None:
    left = times

    def comes() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    if moment == "an environment's step":
        NumberedEnv.at_step = staticmethod(comes)
    elif moment == "before an optimizer step":
        register_optimizer_step_pre_hook(lambda *_: comes())
    else:
        sys.addaudithook(_listener(moment, comes))


def _listener(moment: Moment, comes: Callable[[], None]) -> Callable[[str, tuple[Any, ...]], None]:
    """Hears of a call before it is made."""
    renamed = removing = False

    def hear(event: str, args: tuple[Any, ...]) -> None:
        nonlocal renamed, removing
        if moment == "a checkpoint is renamed and older ones are not yet removed" and renamed:
            renamed = False
            comes()
        if event == "os.rename":
            source, target = (os.fsdecode(path) for path in args[:2])
            renamed = source.endswith(".writing")
            removing = target.endswith(".removing")
            if moment == "a checkpoint is whole and not yet renamed" and renamed:
                comes()
        elif event == "os.remove" and removing and moment == "an old checkpoint is half removed":
            comes()
        elif event == "open" and moment == "a checkpoint's file is opened":
            path, mode = args[:2]
            if isinstance(path, str | os.PathLike) and ".writing/" in str(path) and mode is not None and "w" in mode:
                comes()

    return hear
