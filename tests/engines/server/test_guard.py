"""The trainer is killed: nothing of the server is left, whatever the server does about it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.engines.server.launching import is_alive, living, pid_of, until_exists, until_none_lives

ROOT = Path(__file__).parents[3]
Run = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def run_trainer(tmp_path: Path) -> Iterator[Run]:
    made: list[subprocess.Popen[bytes]] = []

    def run(*arguments: str) -> subprocess.Popen[bytes]:
        (tmp_path / "pids").mkdir()
        command = [sys.executable, "-m", "tests.engines.server.trainer", str(tmp_path), *arguments]
        made.append(subprocess.Popen(command, cwd=ROOT, start_new_session=True))
        return made[-1]

    yield run
    for trainer in made:
        trainer.kill()
        trainer.wait()


@pytest.mark.parametrize("server", [(), ("--ignore-sigterm",)], ids=["polite", "ignores SIGTERM"])
async def test_nothing_outlives_a_killed_trainer(run_trainer: Run, tmp_path: Path, server: tuple[str, ...]) -> None:
    trainer = run_trainer("plain", "--", "--daemon", "--scheduler", *server)
    await until_exists(tmp_path / "ready")
    assert living(tmp_path) == ["daemon", "main", "scheduler"]
    trainer.kill()
    await until_none_lives(tmp_path)


async def test_nothing_outlives_a_trainer_that_is_killed_while_the_server_starts(
    run_trainer: Run, tmp_path: Path
) -> None:
    trainer = run_trainer("plain", "--", "--daemon", "--ready-after", "600")
    await until_exists(tmp_path / "pids" / "daemon")
    trainer.kill()
    await until_none_lives(tmp_path)


async def test_a_forked_copy_that_holds_the_lifeline_keeps_no_server_alive(run_trainer: Run, tmp_path: Path) -> None:
    trainer = run_trainer("fork", "--", "--daemon")
    await until_exists(tmp_path / "ready")
    await until_exists(tmp_path / "pids" / "fork")
    trainer.kill()
    trainer.wait()
    while living(tmp_path) != ["fork"]:
        await asyncio.sleep(0.02)
    os.kill(pid_of(tmp_path, "fork"), signal.SIGKILL)


async def test_a_trainer_that_exits_without_a_word_leaves_nothing(run_trainer: Run, tmp_path: Path) -> None:
    trainer = run_trainer("plain", "--", "--daemon")
    await until_exists(tmp_path / "ready")
    trainer.terminate()
    trainer.wait()
    await until_none_lives(tmp_path)


async def test_the_terminals_interrupt_does_not_reach_the_server(run_trainer: Run, tmp_path: Path) -> None:
    trainer = run_trainer("plain", "--")
    await until_exists(tmp_path / "ready")
    server = pid_of(tmp_path, "main")
    assert os.getpgid(server) != os.getpgid(trainer.pid) and os.getsid(server) != os.getsid(trainer.pid)
    os.killpg(trainer.pid, signal.SIGINT)
    with urllib.request.urlopen((tmp_path / "ready").read_text() + "/health") as answer:
        assert answer.status == 200
    assert is_alive(server) and trainer.poll() is None
