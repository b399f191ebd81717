"""Checkpointed tensors: equal to the bit whatever number of processes saves and loads."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from skyrl_train.errors import CheckpointError
from skyrl_train.training.optimizer import OptimizerSettings
from skyrl_train.training.sharded_state import (
    load_tensors,
    save_tensors,
    stored_names,
    unique_tensors,
    with_tied,
)
from skyrl_train.training.trainer import PolicyTrainer
from tests.tiny import make_model


def example() -> dict[str, torch.Tensor]:
    """Rows that two ranks share evenly and unevenly, half precision, and a scalar."""
    generator = torch.Generator().manual_seed(0)
    return {
        "model.even": torch.randn(8, 3, generator=generator),
        "model.uneven": torch.randn(5, 4, generator=generator),
        "model.half": torch.randn(6, generator=generator).to(torch.bfloat16),
        "optimizer.even.step": torch.tensor(7.0),
    }


def empty(like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.full_like(tensor, -1) for name, tensor in like.items()}


def on_rank(rank: int, folder: str, saves: bool, meeting: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    sharded = {
        name: distribute_tensor(tensor, mesh, [Shard(0)]) if tensor.dim() else tensor
        for name, tensor in example().items()
    }
    if saves:
        save_tensors(Path(folder), sharded)
    else:
        loaded = empty(sharded)
        load_tensors(Path(folder), loaded)
        for name, tensor in sharded.items():
            found = loaded[name]
            if isinstance(tensor, DTensor) and isinstance(found, DTensor):
                assert torch.equal(tensor.to_local(), found.to_local()), name
            else:
                assert torch.equal(tensor, found), name
    dist.barrier()
    # Not by the interpreter's exit: gloo's threads sometimes abort the process there, long after the work is done.
    os._exit(0)


def two_ranks(folder: Path, *, saves: bool) -> None:
    meeting = folder.parent / f"{folder.name}.meeting"
    mp.spawn(on_rank, (str(folder), saves, str(meeting)), nprocs=2)  # type: ignore[no-untyped-call]


def test_two_processes_save_and_one_loads(tmp_path: Path) -> None:
    two_ranks(tmp_path, saves=True)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    loaded = empty(example())
    load_tensors(tmp_path, loaded)
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in example().items())


def test_one_process_saves_and_two_load(tmp_path: Path) -> None:
    save_tensors(tmp_path, example())
    two_ranks(tmp_path, saves=False)


def test_large_tensors_are_spread_over_files_that_stay_small(tmp_path: Path) -> None:
    """Of 96, 80, 12 and 4 bytes: 96 | 80 | 12 + 4 at 80 bytes a file; the first is larger alone."""
    save_tensors(tmp_path, example(), max_file_bytes=80)
    held = {tuple(sorted(load_file(path))) for path in tmp_path.glob("*.safetensors")}
    assert held == {("model.even",), ("model.uneven",), ("model.half", "optimizer.even.step")}
    loaded = empty(example())
    load_tensors(tmp_path, loaded)
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in example().items())


def test_a_trainer_in_bfloat16_comes_back_with_its_float32_masters(tmp_path: Path) -> None:
    first, second = (
        PolicyTrainer(make_model(seed=seed).to(torch.bfloat16), OptimizerSettings(lr=1e-5)) for seed in (0, 1)
    )

    def step(trainer: PolicyTrainer) -> None:
        """Far below what bfloat16 can show: the masters move, most weights do not."""
        for number, parameter in enumerate(trainer.model.parameters()):
            (parameter.float() * (number + 1)).sum().backward()  # type: ignore[no-untyped-call]
        trainer.optim_step()

    step(first)
    first.save(tmp_path / "first")
    stored = load_file(next((tmp_path / "first").glob("*.safetensors")))
    name = "model.layers.0.mlp.up_proj.weight"
    assert stored[f"model.{name}"].dtype == torch.bfloat16 and stored[f"optimizer.{name}.master"].dtype == torch.float32
    assert not torch.equal(stored[f"model.{name}"].float(), stored[f"optimizer.{name}.master"])
    second.load(tmp_path / "first")
    for trainer in (first, second):
        for _ in range(3):
            step(trainer)
    first.save(tmp_path / "a")
    second.save(tmp_path / "b")
    a, b = (load_file(next((tmp_path / which).glob("*.safetensors"))) for which in ("a", "b"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_pickle_that_would_run_a_command_is_not_run(tmp_path: Path) -> None:
    """Neither as the index that torch keeps beside its own format, nor in place of a file of tensors."""
    trainer = PolicyTrainer(make_model(), OptimizerSettings(lr=1e-3))
    trainer.save(tmp_path / "policy")
    payload = pickle.dumps(Command(f"touch {tmp_path / 'was-run'}"))
    (tmp_path / "policy" / ".metadata").write_bytes(payload)
    trainer.load(tmp_path / "policy")
    next((tmp_path / "policy").glob("*.safetensors")).write_bytes(payload)
    with pytest.raises(CheckpointError, match="not whole"):
        trainer.load(tmp_path / "policy")
    assert not (tmp_path / "was-run").exists()
    pickle.loads(payload)
    assert (tmp_path / "was-run").exists(), "the payload is a working one"


class Command:
    def __init__(self, text: str) -> None:
        self.text = text

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (self.text,)


def test_what_does_not_fit_is_named_and_nothing_is_filled(tmp_path: Path) -> None:
    save_tensors(tmp_path, example())
    targets = empty(example())
    targets["model.more"] = torch.zeros(2)
    targets["model.half"] = targets["model.half"].float()
    del targets["model.even"]
    with pytest.raises(ValueError, match=r"1 missing: model.more; 1 not wanted here: model.even; 1 different: model.h"):
        load_tensors(tmp_path, targets)
    assert bool((targets["model.uneven"] == -1).all())


def test_no_file_of_a_checkpoint_is_pickled(tmp_path: Path) -> None:
    trainer = PolicyTrainer(make_model(), OptimizerSettings(lr=1e-3))
    trainer.save(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json"}


def test_tied_tensors_are_stored_once_and_loaded_under_both_names(tmp_path: Path) -> None:
    model = make_model(tie_word_embeddings=True)
    state = model.state_dict()
    save_tensors(tmp_path, unique_tensors(state))
    assert len(stored_names(tmp_path)) == len(state) - 1
    loaded = empty(unique_tensors(state))
    load_tensors(tmp_path, loaded)
    model.load_state_dict(with_tied(loaded, state))
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
