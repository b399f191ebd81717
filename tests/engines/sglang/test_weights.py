"""Every way of weights into a real SGLang server: the new ones whole, or an error in time and a server to be healed."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from skyrl_train.engines.sglang.weights import SGLangBroadcast, SGLangDisk, sglang_channel
from skyrl_train.errors import WeightsTorn, WeightUpdateError
from skyrl_train.weight_sync.buckets import BucketBuffer
from skyrl_train.weight_sync.channel import WeightChannel
from skyrl_train.weight_sync.cuda_ipc import allocate_shared, handle_bytes
from skyrl_train.weight_sync.plan import WeightPlan
from tests.engines.sglang.serving import RunningServer, post, reference, score, weight_version
from tests.tiny import make_model, make_tokenizer

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]

SHAPE: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1}
PROBE = tuple(range(5, 60, 3))
PATHS = ("disk", "tensor", "gloo")
SMALL_BUCKETS = 40_000
RELEASE = "0.5.23"


def policy(seed: int, **shape: Any) -> PreTrainedModel:
    return make_model("qwen3", seed=seed, attn_implementation="eager", **{**SHAPE, **shape})


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    policy(0).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def process(sglang_python: Path, model_folder: Path) -> Iterator[RunningServer]:
    server = RunningServer(sglang_python, model_folder, model_folder.parent / "sglang.log")
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture
def server(process: RunningServer) -> RunningServer:
    """Up, whatever the test before did to it."""
    process.start()
    return process


@pytest.fixture
def bare_folder(model_folder: Path, tmp_path: Path) -> Path:
    """A folder without weights says nothing about names and shapes: what is sent reaches the server unchecked."""
    shutil.copy(model_folder / "config.json", tmp_path)
    return tmp_path


@asynccontextmanager
async def channel_to(server: RunningServer, kind: Any, folder: Path, **options: Any) -> AsyncIterator[WeightChannel]:
    channel = sglang_channel(kind, server.url, release=RELEASE, model_folder=folder, **options)
    await channel.open()
    try:
        yield channel
    finally:
        await channel.close()


async def push(
    server: RunningServer,
    channel: WeightChannel,
    tensors: dict[str, torch.Tensor],
    version: int,
    *,
    bucket_bytes: int = SMALL_BUCKETS,
) -> None:
    plan = WeightPlan.of(tensors, dtype=torch.float32, bucket_bytes=bucket_bytes)
    await post(server.url, "/pause_generation", {"mode": "retract"})
    await channel.push(plan, tensors, version=version)
    await post(server.url, "/continue_generation", {})


async def assert_serves(server: RunningServer, model: PreTrainedModel, version: int) -> None:
    assert await score(server.url, PROBE) == pytest.approx(reference(model, PROBE), abs=1e-4)
    assert await weight_version(server.url) == str(version)


def in_collectives() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("weight-")]


async def assert_nobody_in_a_collective() -> None:
    """A thread whose work is done needs a moment to end."""
    deadline = time.monotonic() + 5
    while in_collectives():
        assert time.monotonic() < deadline, in_collectives()
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("kind", PATHS)
async def test_after_a_push_the_server_has_the_new_weights(
    server: RunningServer, model_folder: Path, kind: str
) -> None:
    """In one bucket and in many, twice: the buffer, the group and the folders are used again."""
    async with channel_to(server, kind, model_folder) as channel:
        for version, bucket_bytes in enumerate((SMALL_BUCKETS, 2**30, SMALL_BUCKETS), start=100):
            model = policy(version)
            await push(server, channel, dict(model.state_dict()), version, bucket_bytes=bucket_bytes)
            await assert_serves(server, model, version)
    await assert_nobody_in_a_collective()


@pytest.mark.parametrize("kind", PATHS)
async def test_tensors_that_are_not_named_stay(server: RunningServer, model_folder: Path, kind: str) -> None:
    model = policy(0)
    async with channel_to(server, kind, model_folder) as channel:
        await push(server, channel, dict(model.state_dict()), 200)
        for version, name in enumerate(("model.layers.0.self_attn.k_proj.weight", "model.norm.weight"), start=201):
            with torch.no_grad():
                model.get_parameter(name).mul_(-0.5)
            await push(server, channel, {name: model.get_parameter(name)}, version)
            await assert_serves(server, model, version)


async def test_a_folder_that_was_prepared_while_requests_run_is_loaded_as_it_is(
    server: RunningServer, model_folder: Path, tmp_path: Path
) -> None:
    model = policy(300)
    tensors = dict(model.state_dict())
    async with channel_to(server, "disk", model_folder, disk_root=tmp_path / "weights") as channel:
        assert isinstance(channel, SGLangDisk)
        plan = WeightPlan.of(tensors, dtype=torch.float32)
        await channel.prepare(plan, tensors, version=300)
        (written,) = (tmp_path / "weights").glob("weights-300")
        before = written.stat().st_mtime_ns
        await push(server, channel, tensors, 300, bucket_bytes=plan.bucket_bytes)
        assert written.stat().st_mtime_ns == before
        await assert_serves(server, model, 300)


@pytest.mark.parametrize("kind", PATHS)
async def test_what_does_not_fit_the_model_is_refused_before_the_first_byte(
    server: RunningServer, model_folder: Path, kind: str
) -> None:
    model = policy(400)
    good = dict(model.state_dict())
    async with channel_to(server, kind, model_folder) as channel:
        await push(server, channel, good, 400)
        with pytest.raises(WeightUpdateError, match=r"q_prog\.weight is not in the model; it has .*q_proj") as refused:
            await push(server, channel, {"model.layers.0.self_attn.q_prog.weight": torch.zeros(64, 64)}, 401)
        assert not isinstance(refused.value, WeightsTorn)
        with pytest.raises(WeightUpdateError, match=r"norm\.weight has shape \[3\], the model's has \[64\]"):
            await push(server, channel, {**good, "model.norm.weight": torch.zeros(3)}, 402)
        await post(server.url, "/continue_generation", {})
        await assert_serves(server, model, 400)


@pytest.mark.parametrize("kind", PATHS)
async def test_a_server_that_fails_in_the_middle_is_said_to_be_torn_and_can_be_healed(
    server: RunningServer, model_folder: Path, bare_folder: Path, kind: str
) -> None:
    """A shape that the server's loader can't take: by disk and tensor it dies of it, by group it answers."""
    good = dict(policy(500).state_dict())
    wrong = {**good, "model.layers.1.mlp.down_proj.weight": torch.zeros(3, 3)}
    began = time.monotonic()
    async with channel_to(server, kind, bare_folder, timeout_s=60) as channel:
        with pytest.raises(WeightsTorn, match="may hold half an update"):
            await push(server, channel, wrong, 501)
        await assert_nobody_in_a_collective()
        assert time.monotonic() - began < 60
        if kind == "gloo":
            await push(server, channel, good, 502)
            await assert_serves(server, policy(500), 502)
    server.start()
    async with channel_to(server, kind, model_folder) as channel:
        await push(server, channel, good, 503)
        await assert_serves(server, policy(500), 503)


async def test_a_server_that_left_the_group_gets_the_trainer_out_and_the_next_push_forms_a_new_one(
    server: RunningServer, model_folder: Path
) -> None:
    model = policy(600, vocab_size=300)
    tensors = dict(model.state_dict())
    async with channel_to(server, "gloo", model_folder, timeout_s=60) as channel:
        assert isinstance(channel, SGLangBroadcast) and channel.group is not None
        await post(server.url, "/destroy_weights_update_group", {"group_name": channel.group.address.name})
        with pytest.raises(WeightUpdateError, match="init_weights_update_group"):
            await push(server, channel, tensors, 600, bucket_bytes=2**30)
        await assert_nobody_in_a_collective()
        await push(server, channel, tensors, 601)
        await assert_serves(server, model, 601)


async def test_an_update_that_another_trainer_left_open_is_ended(server: RunningServer, model_folder: Path) -> None:
    model = policy(700)
    await post(server.url, "/begin_weight_update", {})
    async with channel_to(server, "tensor", model_folder) as channel:
        await push(server, channel, dict(model.state_dict()), 700)
        await assert_serves(server, model, 700)


async def test_a_server_that_is_killed_in_the_broadcast_is_an_error_in_time(
    server: RunningServer, model_folder: Path, bare_folder: Path
) -> None:
    huge = {"model.no_such.weight": torch.zeros(128 * 2**20), **policy(800).state_dict()}

    async def kill() -> None:
        while not any(name.startswith("weight-broadcast") for name in in_collectives()):
            await asyncio.sleep(0.001)
        server.kill()

    async with channel_to(server, "gloo", bare_folder, timeout_s=120) as channel:
        killing = asyncio.create_task(kill())
        began = time.monotonic()
        with pytest.raises(WeightsTorn, match="connection"):
            await push(server, channel, huge, 800, bucket_bytes=2**30)
        await killing
        assert time.monotonic() - began < 60
        await assert_nobody_in_a_collective()
    server.start()
    async with channel_to(server, "gloo", model_folder) as channel:
        await push(server, channel, dict(policy(801).state_dict()), 801)
        await assert_serves(server, policy(801), 801)


def test_the_servers_unpickler_takes_what_is_handed_over(sglang_python: Path) -> None:
    tensors = {"a": torch.arange(6, dtype=torch.float32).view(2, 3), "b": torch.full((5,), 7.0)}
    plan = WeightPlan.of(tensors, dtype=torch.bfloat16)
    buffer = BucketBuffer(torch.device("cpu"), allocate=allocate_shared)
    (bucket,) = buffer.buckets(plan, tensors)
    program = """
import base64, json, sys
from sglang.srt.utils import MultiprocessingSerializer
from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket
data = MultiprocessingSerializer.deserialize(base64.b64decode(sys.argv[1]))
found = FlattenedTensorBucket(flattened_tensor=data["flattened_tensor"], metadata=data["metadata"])
print(json.dumps({name: [str(t.dtype), t.float().tolist()] for name, t in found.reconstruct_tensors()}))
"""
    handle = base64.b64encode(handle_bytes(bucket)).decode()
    done = subprocess.run([str(sglang_python), "-c", program, handle], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "a": ["torch.bfloat16", [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]],
        "b": ["torch.bfloat16", [7.0] * 5],
    }
