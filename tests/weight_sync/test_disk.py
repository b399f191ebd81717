"""A version's folder is whole or not there, and what a killed or failed write leaves is no version."""

from __future__ import annotations

import errno
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from skyrl_train.errors import WeightUpdateError
from skyrl_train.weight_sync import disk
from skyrl_train.weight_sync.disk import WeightFolders
from skyrl_train.weight_sync.model_folder import model_specs, stored_tensors
from skyrl_train.weight_sync.plan import WeightPlan
from tests.tiny import make_model, make_tokenizer

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    make_model("qwen3").save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def whole_plan(tensors: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> WeightPlan:
    return WeightPlan.of(tensors, dtype=dtype)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


@pytest.mark.parametrize("max_file_bytes", [2**30, 30_000])
def test_transformers_loads_the_written_folder(model_folder: Path, tmp_path: Path, max_file_bytes: int) -> None:
    model = make_model("qwen3", seed=1)
    tensors = dict(model.state_dict())
    folders = WeightFolders(tmp_path / "root", model_folder=model_folder, max_file_bytes=max_file_bytes)
    folder = folders.write(whole_plan(tensors), tensors, version=3)
    assert folder == folders.path(3)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, tensors[name]), name
    files = list(folder.glob("*.safetensors"))
    assert (len(files) > 5) is (max_file_bytes == 30_000)
    assert (folder / "tokenizer.json").exists()


def test_tensors_are_cast_to_the_plans_type(model_folder: Path, tmp_path: Path) -> None:
    tensors = {"model.norm.weight": torch.rand(64), "scalar": torch.tensor(0.1), "turned": torch.rand(4, 6).T}
    folders = WeightFolders(tmp_path / "root", model_folder=tmp_path / "nothing")
    (tmp_path / "nothing").mkdir()
    folder = folders.write(whole_plan(tensors, torch.bfloat16), tensors, version=1)
    loaded = load_file(folder / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in loaded.items()} == dict.fromkeys(tensors, torch.bfloat16)
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor.bfloat16())


def test_what_an_update_does_not_name_is_as_in_the_version_before(model_folder: Path, tmp_path: Path) -> None:
    folders = WeightFolders(tmp_path / "root", model_folder=model_folder)
    norm, k_norm = "model.norm.weight", "model.layers.0.self_attn.k_norm.weight"
    first, second = {norm: torch.full((64,), 2.0)}, {k_norm: torch.full((16,), 3.0)}
    folders.write(whole_plan(first), first, version=1)
    folder = folders.write(whole_plan(second), second, version=2)
    expected = {**load_file(model_folder / "model.safetensors"), **first, **second}
    found = load_file(folder / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_another_runs_folders_are_no_base(model_folder: Path, tmp_path: Path) -> None:
    root, norm = tmp_path / "root", {"model.norm.weight": torch.full((64,), 2.0)}
    WeightFolders(root, model_folder=model_folder).write(whole_plan(norm), norm, version=9)
    other = {"model.layers.0.self_attn.k_norm.weight": torch.zeros(16)}
    folder = WeightFolders(root, model_folder=model_folder).write(whole_plan(other), other, version=1)
    found = load_file(folder / "model.safetensors")
    assert not torch.equal(found["model.norm.weight"], norm["model.norm.weight"])


def test_two_versions_are_kept_and_leftovers_go(model_folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / ".writing-7-1").mkdir(parents=True)
    folders = WeightFolders(root, model_folder=model_folder)
    tensors = {"model.norm.weight": torch.ones(64)}
    for version in (1, 2, 3, 3):
        folders.write(whole_plan(tensors), tensors, version=version)
    assert names(root) == ["weights-2", "weights-3"]


def test_a_disk_without_room_is_an_error_before_anything_is_written(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    folders = WeightFolders(root, model_folder=model_folder)
    tensors = {"model.norm.weight": torch.ones(64)}
    for version in (1, 2):
        folders.write(whole_plan(tensors), tensors, version=version)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: Usage(100, 99, 1))
    with pytest.raises(WeightUpdateError, match="the disk is full"):
        folders.write(whole_plan(tensors), tensors, version=3)
    assert names(root) == ["weights-2"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_write_that_fails_half_way_leaves_the_version_before(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    root = tmp_path / "root"
    folders = WeightFolders(root, model_folder=model_folder)
    tensors = {"model.norm.weight": torch.ones(64)}
    folders.write(whole_plan(tensors), tensors, version=1)

    def fail(handle: int) -> None:
        raise OSError(number, "the device said no")

    monkeypatch.setattr(disk.os, "fsync", fail)
    with pytest.raises(WeightUpdateError, match="full" if number == errno.ENOSPC else "the device said no"):
        folders.write(whole_plan(tensors), tensors, version=2)
    assert names(root) == ["weights-1"]


def test_headers_say_what_a_model_has(model_folder: Path, tmp_path: Path) -> None:
    tensors = load_file(model_folder / "model.safetensors")
    assert {name: spec.shape for name, spec in model_specs(model_folder).items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }
    assert model_specs(tmp_path) == {}
    (tmp_path / "broken.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    with pytest.raises(WeightUpdateError, match="broken"):
        stored_tensors(tmp_path)
