"""The trainer's end of a gloo group, against a process that joins as servers do."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from asyncio.subprocess import PIPE, Process
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from skyrl_train.errors import WeightUpdateError
from skyrl_train.weight_sync.broadcast import GroupAddress, TrainerGroup

PARTNER = Path(__file__).with_name("partner.py")
NUM_BYTES = 64 * 2**20  # more than the sockets' buffers hold: a sender without a receiver waits


async def start(address: GroupAddress, behaviour: str) -> Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        str(PARTNER),
        address.host,
        str(address.port),
        address.name,
        str(NUM_BYTES),
        behaviour,
        stdin=PIPE,
        stdout=PIPE,
    )


class Partner:
    """A worker process; `join` is what an HTTP call to a server would do."""

    def __init__(self, behaviour: str) -> None:
        self.behaviour = behaviour
        self.process: Process | None = None

    async def join(self, address: GroupAddress) -> None:
        self.process = await start(address, self.behaviour)
        assert await self.line() == "joined"

    async def line(self) -> str:
        assert self.process is not None and self.process.stdout is not None
        return (await self.process.stdout.readline()).decode().strip()

    async def leave(self) -> None:
        if self.process is None or self.process.stdin is None:
            return
        self.process.stdin.close()
        await self.process.wait()


async def form(partner: Partner, name: str = "weights-1") -> TrainerGroup:
    return await TrainerGroup.form(
        backend="gloo", name=name, num_workers=1, join=partner.join, release=partner.leave, deadline_s=60
    )


def in_collectives() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("weight-")]


async def assert_nobody_in_a_collective() -> None:
    """A thread whose work is done needs a moment to end."""
    deadline = time.monotonic() + 5
    while in_collectives():
        assert time.monotonic() < deadline, in_collectives()
        await asyncio.sleep(0.01)


async def test_a_worker_that_joins_as_servers_do_receives_the_bytes() -> None:
    partners = [Partner("receive"), Partner("receive")]
    groups = [await form(partner, f"weights-{i}") for i, partner in enumerate(partners)]
    assert not dist.is_initialized()
    for i, (partner, group) in enumerate(zip(partners, groups, strict=True)):
        sent = torch.full((NUM_BYTES,), i + 1, dtype=torch.uint8)
        answer = await group.broadcast(sent, request=partner.line(), deadline_s=60)
        assert answer == str(NUM_BYTES * (i + 1))
        group.close()
        group.close()
        await partner.leave()
    await assert_nobody_in_a_collective()


async def test_a_server_that_refuses_gets_the_trainer_out_of_the_broadcast() -> None:
    partner = Partner("refuse")
    group = await form(partner)

    async def refused() -> None:
        await asyncio.sleep(0.2)
        raise RuntimeError("unknown tensor w")

    with pytest.raises(WeightUpdateError, match="unknown tensor w"):
        await group.broadcast(torch.zeros(NUM_BYTES, dtype=torch.uint8), request=refused(), deadline_s=120)
    assert group.closed
    await assert_nobody_in_a_collective()

    async def never() -> None:
        raise AssertionError("a closed group asks nobody")

    with pytest.raises(WeightUpdateError, match="is closed"):
        await group.broadcast(torch.zeros(4, dtype=torch.uint8), request=never(), deadline_s=1)


async def test_a_worker_that_dies_in_the_broadcast_is_an_error() -> None:
    partner = Partner("die")
    group = await form(partner)

    async def forever() -> None:
        await asyncio.Event().wait()

    with pytest.raises(WeightUpdateError, match="failed"):
        await group.broadcast(torch.zeros(NUM_BYTES, dtype=torch.uint8), request=forever(), deadline_s=60)
    await assert_nobody_in_a_collective()
    await partner.leave()


async def test_a_server_that_neither_receives_nor_answers_is_left_at_the_deadline() -> None:
    partner = Partner("refuse")
    group = await form(partner)

    async def forever() -> None:
        await asyncio.Event().wait()

    with pytest.raises(WeightUpdateError, match=r"Timed out|did not come within"):
        await group.broadcast(torch.zeros(NUM_BYTES, dtype=torch.uint8), request=forever(), deadline_s=1)
    await assert_nobody_in_a_collective()


async def test_a_cancelled_broadcast_leaves_no_thread_behind() -> None:
    partner = Partner("refuse")
    group = await form(partner)
    asked = asyncio.Event()

    async def forever() -> None:
        asked.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(
        group.broadcast(torch.zeros(NUM_BYTES, dtype=torch.uint8), request=forever(), deadline_s=120)
    )
    await asked.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert group.closed
    await assert_nobody_in_a_collective()


async def test_a_server_that_refuses_to_join_ends_the_setup() -> None:
    async def refuse(address: GroupAddress) -> None:
        raise RuntimeError("no such group")

    with pytest.raises(WeightUpdateError, match="no such group"):
        await TrainerGroup.form(backend="gloo", name="g", num_workers=1, join=refuse, deadline_s=120)
    await assert_nobody_in_a_collective()


async def test_workers_that_never_come_end_the_setup_at_its_deadline() -> None:
    async def says_yes(address: GroupAddress) -> None:
        return None

    with pytest.raises(WeightUpdateError, match=r"no worker of 1|did not come"):
        await TrainerGroup.form(backend="gloo", name="g", num_workers=1, join=says_yes, deadline_s=0.5)
    await assert_nobody_in_a_collective()
