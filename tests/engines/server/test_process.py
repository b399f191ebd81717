"""Real processes: a small server that comes up late, dies, hangs, leaves children behind or loses its port."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from skyrl_train.engines.server.guard import look_up
from skyrl_train.engines.server.process import ServerProcess
from skyrl_train.errors import ConfigError, EngineUnavailable
from tests.engines.server.launching import is_alive, living, pid_of, small_server, until_exists, until_none_lives

Make = Callable[..., ServerProcess]


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Make]:
    """Makes server processes in `tmp_path`, which are ended with the test."""
    made: list[ServerProcess] = []

    def make(*options: str, **spec: Any) -> ServerProcess:
        made.append(ServerProcess(small_server(tmp_path, *options, **spec)))
        return made[-1]

    yield make
    for server in made:
        await server.stop()


async def get(url: str) -> str:
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        return await answer.text()


async def test_a_started_server_answers_and_a_stopped_one_is_gone(make: Make, tmp_path: Path) -> None:
    server = make("--ready-after", "0.3")
    url = await server.start()
    assert server.url == url and url.startswith("http://127.0.0.1:")
    assert await get(f"{url}/health")
    assert server.pid == pid_of(tmp_path, "main") and server.is_running
    await server.stop()
    assert living(tmp_path) == [] and look_up(server.pid) is None and not server.is_running
    await server.stop()
    assert "stopped by us" in await server.wait_dead()


async def test_a_restart_goes_on_in_the_same_log(make: Make, tmp_path: Path) -> None:
    server = make()
    first_url, first_pid = await server.start(), server.pid
    second_url = await server.restart()
    assert server.pid != first_pid and second_url != first_url
    assert await get(f"{second_url}/health")
    log = (tmp_path / "logs" / "small-0.log").read_text()
    assert log.count("small server listens on") == 2
    assert first_url.rpartition(":")[2] in log and second_url.rpartition(":")[2] in log


async def test_a_server_that_dies_while_it_starts_is_noticed_with_its_last_words(make: Make, tmp_path: Path) -> None:
    lines = "\n".join(f"line {i} {'x' * 1000}" for i in range(50))
    message = f"{lines}\nModuleNotFoundError: No module named 'sglang'"
    server = make("--exit-at-once", "3", "--message", message, startup_timeout_s=3600.0)
    with pytest.raises(EngineUnavailable, match="small-0 died while it started: exit status 3; ") as raised:
        await server.start()
    text = str(raised.value)
    assert "generator.engine_python must name an interpreter that has sglang installed" in text
    assert str(tmp_path / "logs" / "small-0.log") in text
    assert "line 49" in text and "line 20" not in text and max(map(len, text.splitlines())) < 400
    assert not server.is_running


async def test_what_an_earlier_start_wrote_is_not_blamed_on_this_one(make: Make, tmp_path: Path) -> None:
    with pytest.raises(EngineUnavailable):
        await make("--exit-at-once", "3", "--message", "torch.OutOfMemoryError: CUDA out of memory.").start()
    with pytest.raises(EngineUnavailable) as raised:
        await make("--exit-at-once", "5", "--message", "something else").start()
    assert "something else" in str(raised.value) and "memory" not in str(raised.value)


async def test_a_server_that_never_gets_healthy_is_ended_at_the_deadline(make: Make, tmp_path: Path) -> None:
    (tmp_path / "sick").touch()
    server = make("--unhealthy-while", str(tmp_path / "sick"), "--daemon", startup_timeout_s=1.5)
    with pytest.raises(EngineUnavailable, match=r"not ready after 1\.5 s \(/health answers 503\).*startup_timeout_s"):
        await server.start()
    assert (tmp_path / "pids" / "daemon").exists() and living(tmp_path) == []


async def test_a_start_that_is_cancelled_leaves_nothing(make: Make, tmp_path: Path) -> None:
    starting = asyncio.create_task(make("--ready-after", "600", "--daemon").start())
    await until_exists(tmp_path / "pids" / "daemon")
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert living(tmp_path) == []


async def test_a_server_that_is_stopped_while_it_starts_says_so(make: Make, tmp_path: Path) -> None:
    server = make("--ready-after", "600")
    starting = asyncio.create_task(server.start())
    await until_exists(tmp_path / "pids" / "main")
    await server.stop()
    with pytest.raises(EngineUnavailable, match="stopped by us"):
        await starting
    assert living(tmp_path) == []


async def test_a_death_is_told_with_the_exit_status(make: Make, tmp_path: Path) -> None:
    server = make("--exit-after", "0.5", "--daemon")
    await server.start()
    text = await server.wait_dead()
    assert "small-0 died: exit status 4; " in text and "small server listens on" in text
    assert not server.is_running
    await server.stop()
    assert living(tmp_path) == []
    await server.start()
    assert server.is_running


async def test_a_server_that_is_killed_takes_its_tree_along(make: Make, tmp_path: Path) -> None:
    server = make("--daemon", "--scheduler")
    await server.start()
    assert living(tmp_path) == ["daemon", "main", "scheduler"]
    os.kill(pid_of(tmp_path, "main"), signal.SIGKILL)
    assert "SIGKILL" in await server.wait_dead()
    # Nobody calls stop.
    await until_none_lives(tmp_path)


async def test_a_scheduler_that_is_killed_is_told_though_the_server_still_answers(make: Make, tmp_path: Path) -> None:
    server = make("--scheduler", "--ignore-sigterm", stop_timeout_s=0.2)
    url = await server.start()
    pid = pid_of(tmp_path, "scheduler")
    os.kill(pid, signal.SIGKILL)
    assert f"its process sglang::scheduler ({pid}) is gone; " in await server.wait_dead()
    assert await get(f"{url}/health") and not server.is_running
    await server.restart()
    assert server.is_running and living(tmp_path) == ["main", "scheduler"]


async def test_who_ignores_sigterm_is_killed_after_the_deadline(make: Make, tmp_path: Path) -> None:
    server = make("--ignore-sigterm", "--daemon", stop_timeout_s=0.3)
    await server.start()
    await asyncio.gather(server.stop(), server.stop())
    assert living(tmp_path) == []


async def test_a_killed_guard_leaves_no_server_behind(make: Make, tmp_path: Path) -> None:
    server = make("--scheduler")
    await server.start()
    process = look_up(pid_of(tmp_path, "main"))
    assert process is not None
    os.kill(process.parent, signal.SIGKILL)
    assert "small-0 died" in await server.wait_dead()
    await until_none_lives(tmp_path)
    await server.stop()


async def test_failed_health_checks_in_a_row_count_as_death(make: Make, tmp_path: Path) -> None:
    server = make("--unhealthy-while", str(tmp_path / "sick"))
    await server.start()
    watching = asyncio.create_task(server.watch(interval_s=0.02, max_failures=3))
    (tmp_path / "sick").touch()
    assert "it failed 3 health checks in a row, the last one: /health answers 503" in await watching
    assert not server.is_running and is_alive(pid_of(tmp_path, "main"))
    assert "3 health checks" in await server.wait_dead()


async def test_a_server_that_is_suspended_fails_no_health_check(make: Make, tmp_path: Path) -> None:
    sick = tmp_path / "sick"
    server = make("--unhealthy-while", str(sick))
    await server.start()
    sick.touch()
    looks = 0

    def suspended() -> bool:
        nonlocal looks
        looks += 1
        if looks == 10:
            sick.unlink()
        if looks == 20:
            os.kill(pid_of(tmp_path, "main"), signal.SIGKILL)
        return looks < 10

    text = await server.watch(interval_s=0.02, max_failures=1, suspended=suspended)
    assert "SIGKILL" in text and "health" not in text.partition("; ")[0]


async def test_a_lost_bind_is_tried_again_on_another_port(make: Make, tmp_path: Path) -> None:
    server = make("--lose-bind-once", str(tmp_path / "lost"))
    await server.start()
    log = (tmp_path / "logs" / "small-0.log").read_text()
    assert "Address already in use" in log and log.count("=== engine small-0 starts on port") == 2


async def test_a_port_on_which_somebody_else_answers_is_left_to_him(make: Make, tmp_path: Path) -> None:
    handed = tmp_path / "port"
    server = make("--hand-port-over-once", str(handed), stop_timeout_s=1)
    starting = asyncio.create_task(server.start())
    await until_exists(handed)
    while not (port := handed.read_text()):
        await asyncio.sleep(0.02)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", int(port)):
        url = await starting
        assert not url.endswith(f":{port}")
        assert await get(f"{url}/variable/NOTHING") == "(unset)"


async def test_the_environment_is_ours_with_changes(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEPT", "kept")
    monkeypatch.setenv("TAKEN_OUT", "there")
    server = make(environment={"ADDED": "added", "TAKEN_OUT": None})
    url = await server.start()
    assert [await get(f"{url}/variable/{name}") for name in ("KEPT", "ADDED", "TAKEN_OUT")] == [
        "kept",
        "added",
        "(unset)",
    ]


async def test_mistakes_of_the_user_are_named(make: Make, tmp_path: Path) -> None:
    spec = small_server(tmp_path)
    nowhere = ServerProcess(replace(spec, command=(str(tmp_path / "no-env" / "bin" / "python"), "-m", "server")))
    with pytest.raises(ConfigError, match=r"no-env/bin/python is no program.*generator\.engine_python"):
        await nowhere.start()
    broken = tmp_path / "python"
    broken.write_bytes(b"\x7fELF nonsense")
    broken.chmod(0o755)
    no_program = ServerProcess(replace(spec, command=(str(broken),)))
    with pytest.raises(ConfigError, match=r"python could not be started: .*generator\.engine_python"):
        await no_program.start()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"its log .*/file/server\.log can't be written: "):
        await make(log_path=tmp_path / "file" / "server.log").start()
    assert living(tmp_path) == []


async def test_a_full_disk_is_named(make: Make) -> None:
    with pytest.raises(EngineUnavailable, match="/dev/full can't be written: No space left on device; make room"):
        await make(log_path=Path("/dev/full")).start()


async def test_many_starts_and_stops_keep_no_descriptor(make: Make) -> None:
    server = make("--scheduler")
    await server.restart()
    await server.stop()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        await server.restart()
    await server.stop()
    assert len(os.listdir("/proc/self/fd")) == before


async def test_servers_that_start_at_once_have_ports_of_their_own(make: Make, tmp_path: Path) -> None:
    servers = [make(log_path=tmp_path / f"{i}.log") for i in range(3)]
    urls = await asyncio.gather(*(server.start() for server in servers))
    assert len(set(urls)) == 3
    for url in urls:
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))):
            pass
