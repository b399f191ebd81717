"""Every way of weights into a real vLLM server: the new ones whole, or an error and the old ones."""

from __future__ import annotations

import asyncio
import copy
import shutil
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from transformers import PreTrainedModel

from skyrl_train.engines.vllm.weights import VLLMChannel, vllm_channel
from skyrl_train.errors import WeightUpdateError
from skyrl_train.weight_sync.plan import TensorSpec, WeightPlan
from tests.engines.vllm.live import BLOCK, Live, ask, assert_of, greedy, started

pytestmark = [pytest.mark.engines, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600)]

PATHS = ("disk", "gloo", "cuda_ipc")
SMALL_BUCKETS = 40_000
LONG = [(7 * i) % 256 for i in range(2 * BLOCK + 10)]
Q = "model.layers.0.self_attn.q_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def live(vllm_python: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Live]:
    # Qwen2's fused projections have biases: they are parts of the layer too.
    async with started(vllm_python, tmp_path_factory.mktemp("vllm"), arch="qwen2") as server:
        yield server


@asynccontextmanager
async def channel_to(live: Live, path: str, root: Path) -> AsyncIterator[VLLMChannel]:
    channel = vllm_channel(path, live.url, model_folder=live.folders[0], disk_root=root, timeout_s=30)
    await channel.open()
    try:
        yield channel
    finally:
        await channel.close()


def tensors_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


def plan_of(tensors: dict[str, torch.Tensor]) -> WeightPlan:
    return WeightPlan.of(tensors, dtype=torch.float32, bucket_bytes=SMALL_BUCKETS)


async def push(live: Live, channel: VLLMChannel, tensors: dict[str, torch.Tensor], version: int) -> None:
    """As the engine does it: nothing runs meanwhile."""
    plan = plan_of(tensors)
    await channel.prepare(plan, tensors, version=version)
    await live.client.halt()
    try:
        await channel.push(plan, tensors, version=version)
    finally:
        await live.client.release()


async def assert_serves(live: Live, model: PreTrainedModel, version: int | None = None) -> None:
    """Also through the prefix cache: the prompt was asked before under other weights."""
    assert_of(model, await ask(live, greedy(12), LONG), LONG)
    if version is not None:
        assert await live.client.weight_version() == str(version)


@pytest.mark.parametrize("path", PATHS)
async def test_an_update_is_served_whole_and_old_prefixes_are_forgotten(live: Live, path: str, tmp_path: Path) -> None:
    await ask(live, greedy(2), LONG)
    async with channel_to(live, path, tmp_path) as channel:
        for version, model in ((1, live.models[1]), (2, live.models[0])):
            await push(live, channel, tensors_of(model), version)
            first = await ask(live, greedy(12), LONG)
            assert first.num_cached_tokens == 0
            assert_of(model, first, LONG)
            assert (await ask(live, greedy(2), LONG)).num_cached_tokens == 2 * BLOCK
            await assert_serves(live, model, version)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.norm.weight": torch.zeros(3)}, r"model.norm.weight is \[3\], the model has \[64\]"),
        ({"model.extra.weight": torch.zeros(3)}, "unknown to the model: model.extra.weight"),
    ],
)
async def test_a_refused_update_leaves_the_old_weights(
    live: Live, path: str, change: dict[str, torch.Tensor], message: str, tmp_path: Path
) -> None:
    async with channel_to(live, path, tmp_path) as channel:
        await push(live, channel, tensors_of(live.models[0]), 10)
        with pytest.raises(WeightUpdateError, match=message):
            await push(live, channel, tensors_of(live.models[1]) | change, 11)
        await assert_serves(live, live.models[0], 10)
        await push(live, channel, tensors_of(live.models[1]), 12)
        await assert_serves(live, live.models[1], 12)


async def test_a_file_that_is_not_whole_is_refused_before_a_tensor_is_taken(live: Live, tmp_path: Path) -> None:
    async with channel_to(live, "disk", tmp_path) as channel:
        await push(live, channel, tensors_of(live.models[0]), 20)
        tensors = tensors_of(live.models[1])
        plan = plan_of(tensors)

        def cut_short(folder: Path) -> None:
            (file,) = folder.glob("*.safetensors")
            file.write_bytes(file.read_bytes()[:-4])

        def gone(folder: Path) -> None:
            shutil.rmtree(folder)

        def no_header(folder: Path) -> None:
            (file,) = folder.glob("*.safetensors")
            file.write_bytes(struct.pack("<Q", 2**40) + b"{}")

        for spoil, message in ((cut_short, "not written whole"), (gone, "does not exist"), (no_header, "cut short")):
            await channel.prepare(plan, tensors, version=21)
            spoil(tmp_path / "weights-21")
            await live.client.halt()
            with pytest.raises(WeightUpdateError, match=message):
                await channel.push(plan, tensors, version=21)
            await live.client.release()
            await assert_serves(live, live.models[0], 20)


class Spoilt(dict[str, torch.Tensor]):
    """Tensors of which one can't be read any more once `broken` is set."""

    broken = False

    def __getitem__(self, name: str) -> torch.Tensor:
        if self.broken and name == DOWN:
            raise RuntimeError("this tensor is gone")
        return super().__getitem__(name)


@pytest.mark.parametrize("path", ["gloo", "cuda_ipc"])
async def test_an_update_that_breaks_off_in_the_middle_leaves_the_old_weights(
    live: Live, path: str, tmp_path: Path
) -> None:
    """Some buckets are in the server already; the next update finds that one open and starts anew."""
    async with channel_to(live, path, tmp_path) as channel:
        await push(live, channel, tensors_of(live.models[0]), 30)
        tensors = Spoilt(tensors_of(live.models[1]))
        plan = plan_of(tensors)
        assert DOWN not in {spec.name for spec in next(plan.buckets())}
        tensors.broken = True
        await live.client.halt()
        with pytest.raises(RuntimeError, match="gone"):
            await channel.push(plan, tensors, version=31)
        await live.client.release()
        await assert_serves(live, live.models[0], 30)
        await push(live, channel, tensors_of(live.models[1]), 32)
        await assert_serves(live, live.models[1], 32)


async def test_a_cancelled_update_leaves_the_old_weights(live: Live, tmp_path: Path) -> None:
    async with channel_to(live, "gloo", tmp_path) as channel:
        await push(live, channel, tensors_of(live.models[0]), 34)
        tensors = tensors_of(live.models[1])
        await live.client.halt()
        pushing = asyncio.ensure_future(channel.push(plan_of(tensors), tensors, version=35))
        await asyncio.sleep(0.02)
        pushing.cancel()
        await asyncio.gather(pushing, return_exceptions=True)
        assert pushing.cancelled()
        await live.client.release()
        await assert_serves(live, live.models[0], 34)


async def test_a_trainer_that_leaves_its_group_lets_the_server_go_and_forms_another(live: Live, tmp_path: Path) -> None:
    async with channel_to(live, "gloo", tmp_path) as channel:
        await push(live, channel, tensors_of(live.models[0]), 40)
        group = channel._carrier._group  # type: ignore[attr-defined]
        group.close()
        with pytest.raises(WeightUpdateError):
            await push(live, channel, tensors_of(live.models[1]), 41)
        await assert_serves(live, live.models[0], 40)
        await push(live, channel, tensors_of(live.models[1]), 42)
        await assert_serves(live, live.models[1], 42)


async def test_a_part_of_a_model_changes_that_part_alone(live: Live, tmp_path: Path) -> None:
    """A single matrix of its own layer; one of a fused layer only with the others, once an update changed them."""
    async with channel_to(live, "gloo", tmp_path) as channel:
        await push(live, channel, tensors_of(live.models[0]), 50)
        mixed = make_mixed(live.models, [DOWN])
        await push(live, channel, {DOWN: tensors_of(live.models[1])[DOWN]}, 51)
        await assert_serves(live, mixed, 51)
        with pytest.raises(WeightUpdateError, match="send all parts of a layer"):
            await push(live, channel, {Q: tensors_of(live.models[1])[Q]}, 52)
        await assert_serves(live, mixed, 51)


async def test_a_plan_of_numbers_that_are_no_floats_is_refused(live: Live, tmp_path: Path) -> None:
    async with channel_to(live, "gloo", tmp_path) as channel:
        await push(live, channel, tensors_of(live.models[0]), 60)
        plan = WeightPlan(specs=(TensorSpec(name=DOWN, shape=(64, 128), dtype=torch.int32),))
        await live.client.halt()
        with pytest.raises(WeightUpdateError, match="no floats"):
            await channel.push(plan, {DOWN: torch.zeros(64, 128, dtype=torch.int32)}, version=61)
        await live.client.release()
        await assert_serves(live, live.models[0], 60)


def make_mixed(models: tuple[PreTrainedModel, ...], names: list[str]) -> PreTrainedModel:
    """The first model with `names` of the second."""
    mixed = copy.deepcopy(models[0])
    for name in names:
        mixed.get_parameter(name).data.copy_(models[1].get_parameter(name))
    return mixed
