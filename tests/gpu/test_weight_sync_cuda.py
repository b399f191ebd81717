"""Weights from one GPU to another process: by NCCL to the second GPU, by handle on the same one."""

from __future__ import annotations

import asyncio
import base64
import subprocess
import sys
import threading
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from skyrl_train.errors import WeightUpdateError
from skyrl_train.weight_sync.broadcast import GroupAddress, TrainerGroup
from skyrl_train.weight_sync.buckets import BucketBuffer
from skyrl_train.weight_sync.cuda_ipc import allocate_shared, handle_bytes
from skyrl_train.weight_sync.plan import WeightPlan

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(200)]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL joins no two processes on one GPU")

PARTNER = Path(__file__).parents[1] / "weight_sync" / "partner.py"
NUM_BYTES = 256 * 2**20


class Partner:
    """The other end, on the second GPU."""

    def __init__(self, behaviour: str) -> None:
        self.behaviour = behaviour
        self.process: asyncio.subprocess.Process | None = None

    async def join(self, address: GroupAddress) -> None:
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(PARTNER),
            address.host,
            str(address.port),
            address.name,
            str(NUM_BYTES),
            self.behaviour,
            "nccl",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert await self.line() == "joined"

    async def line(self) -> str:
        assert self.process is not None and self.process.stdout is not None
        return (await self.process.stdout.readline()).decode().strip()

    async def leave(self) -> None:
        if self.process is not None and self.process.returncode is None:
            self.process.kill()
            await self.process.wait()


async def form(partner: Partner, name: str) -> TrainerGroup:
    return await TrainerGroup.form(
        backend="nccl", name=name, num_workers=1, join=partner.join, device=torch.device("cuda:0"), deadline_s=90
    )


def ones() -> torch.Tensor:
    return torch.ones(NUM_BYTES, dtype=torch.uint8, device="cuda:0")


async def after(seconds: float, error: Exception | None) -> None:
    await asyncio.sleep(seconds)
    if error is not None:
        raise error
    await asyncio.Event().wait()


def assert_nobody_in_a_collective() -> None:
    deadline = time.monotonic() + 10
    while names := [thread.name for thread in threading.enumerate() if thread.name.startswith("weight-")]:
        assert time.monotonic() < deadline, names
        time.sleep(0.05)


async def assert_a_new_group_works(name: str) -> None:
    partner = Partner("receive")
    group = await form(partner, name)
    try:
        assert await group.broadcast(ones(), request=partner.line(), deadline_s=60) == str(NUM_BYTES)
    finally:
        group.close()
        await partner.leave()
    assert_nobody_in_a_collective()


@two_gpus
def test_broadcasts_arrive_and_the_default_group_is_not_needed() -> None:
    async def run() -> None:
        partner = Partner("receive")
        group = await form(partner, "weights-1")
        try:
            for turn in (1, 2, 3):
                began = time.perf_counter()
                answer = await group.broadcast(ones() * turn, request=partner.line(), deadline_s=60)
                print(f"broadcast of {NUM_BYTES / 1e9:.2f} GB: {time.perf_counter() - began:.4f} s")
                assert answer == str(NUM_BYTES * turn)
        finally:
            group.close()
            await partner.leave()
        assert not dist.is_initialized()

    asyncio.run(run())
    assert_nobody_in_a_collective()


@two_gpus
@pytest.mark.parametrize("behaviour", ["refuse", "once"])
@pytest.mark.parametrize("ending", ["refused", "deadline"])
def test_a_server_that_does_not_receive_leaves_no_thread_in_nccl(behaviour: str, ending: str) -> None:
    """At the first broadcast, while the communicator is being made, and at a later one."""

    async def run() -> None:
        partner = Partner(behaviour)
        group = await form(partner, "weights-1")
        try:
            if behaviour == "once":
                await group.broadcast(ones(), request=partner.line(), deadline_s=60)
            refusal: Coroutine[Any, Any, None] = after(2, RuntimeError("no") if ending == "refused" else None)
            began = time.monotonic()
            with pytest.raises(
                WeightUpdateError, match="no" if ending == "refused" else r"not done after|did not come"
            ):
                await group.broadcast(ones(), request=refusal, deadline_s=60 if ending == "refused" else 4)
            print(f"{behaviour}, {ending}: out after {time.monotonic() - began:.1f} s")
            assert_nobody_in_a_collective()
        finally:
            await partner.leave()
        await assert_a_new_group_works("weights-2")

    asyncio.run(run())


@two_gpus
def test_a_server_that_dies_is_left() -> None:
    async def run() -> None:
        partner = Partner("die")
        group = await form(partner, "weights-1")
        with pytest.raises(WeightUpdateError):
            await group.broadcast(ones(), request=after(3, RuntimeError("connection broke")), deadline_s=60)
        assert_nobody_in_a_collective()
        await partner.leave()
        await assert_a_new_group_works("weights-2")

    asyncio.run(run())


def test_another_process_reads_the_bucket_by_its_handle_and_sees_it_filled_again() -> None:
    """A GPU goes by its UUID, which SGLang's own rebuilding function takes: it is written out here."""
    program = """
import base64, pickle, sys, torch
from torch.multiprocessing import reductions
original = reductions.rebuild_cuda_tensor
def by_uuid(*args):
    uuids = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
    return original(*args[:6], uuids.index(args[6]), *args[7:])
reductions.rebuild_cuda_tensor = by_uuid
for line in sys.stdin:
    data = pickle.loads(base64.b64decode(line))
    flat = data["flattened_tensor"]
    print([flat[m.start_idx:m.end_idx].view(m.dtype).reshape(m.shape).float().sum().item() for m in data["metadata"]])
    del data, flat
    sys.stdout.flush()
"""
    device = torch.device("cuda:0")
    tensors = {"a": torch.ones(1000, 300, device=device), "b": torch.full((7,), 2.0, device=device)}
    plan = WeightPlan.of(tensors, dtype=torch.bfloat16)
    buffer = BucketBuffer(device, allocate=allocate_shared)
    reader = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert reader.stdin is not None and reader.stdout is not None
    try:
        for turn in (1, 2, 3):
            (bucket,) = buffer.buckets(plan, {name: tensor * turn for name, tensor in tensors.items()})
            reader.stdin.write(base64.b64encode(handle_bytes(bucket)).decode() + "\n")
            reader.stdin.flush()
            assert reader.stdout.readline().strip() == str([300_000.0 * turn, 14.0 * turn])
    finally:
        reader.stdin.close()
        reader.wait()
        reader.stdout.close()
