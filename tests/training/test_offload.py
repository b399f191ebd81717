"""What waits in host memory holds nothing on its device, comes back to the bit, and changes no result."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from skyrl_train.algorithms.objective import PolicyObjective
from skyrl_train.data.pack import pack
from skyrl_train.training.offload import HostMemory
from skyrl_train.training.optimizer import MasterAdamW, OptimizerSettings
from skyrl_train.training.trainer import PolicyTrainer
from skyrl_train.training.update import update_policy
from skyrl_train.types import TrainingSample
from tests.tiny import make_model
from tests.training.batches import make_samples


def test_bytes_leave_and_come_back_and_the_tensors_stay() -> None:
    a, b = torch.arange(6.0).reshape(2, 3), torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    memory = HostMemory([a, b, a])
    assert memory.num_device_bytes == 6 * 4 + 4 * 2
    memory.send_away()
    assert memory.is_away and memory.num_device_bytes == 0
    assert (a.shape, b.shape) == ((2, 3), (4,))
    assert memory.values(a).tolist() == [[0, 1, 2], [3, 4, 5]]
    b.grad = torch.ones_like(b)  # a gradient may arrive meanwhile
    with memory.on_device():
        assert a.tolist() == [[0, 1, 2], [3, 4, 5]] and b.tolist() == [1, 1, 1, 1]
        a.mul_(2)
    memory.bring_back()
    assert a.tolist() == [[0, 2, 4], [6, 8, 10]]
    assert not memory.is_away and memory.values(a) is a


def test_what_is_constant_is_copied_out_once() -> None:
    a = torch.zeros(3)
    memory = HostMemory([a], constant=True)
    memory.send_away()
    with memory.on_device():
        a.fill_(7)  # breaks the promise, which shows that nothing was copied again
    memory.bring_back()
    assert a.tolist() == [0, 0, 0]


def test_a_tensor_that_shares_its_storage_is_refused() -> None:
    with pytest.raises(ValueError, match="shares its storage"):
        HostMemory([torch.zeros(4, 4)[0]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_optimizer_that_waits_in_host_memory_takes_the_same_steps(
    dtype: torch.dtype, tmp_path: Path, objective: PolicyObjective
) -> None:
    def train(offload_after_step: bool) -> tuple[PolicyTrainer, list[torch.Tensor]]:
        settings = OptimizerSettings(lr=1e-2, weight_decay=0.1, offload_after_step=offload_after_step)
        trainer = PolicyTrainer(make_model("qwen2").to(dtype), settings)
        for step in range(4):
            update_policy(trainer, [pack(make_samples(seed=step), max_tokens_per_micro_batch=60)], objective)
            if step == 1:
                folder = tmp_path / str(offload_after_step)
                trainer.save(folder)
                trainer = PolicyTrainer(make_model("qwen2", seed=3).to(dtype), settings)
                trainer.load(folder)
        return trainer, [p.detach() for p in trainer.model.parameters()]

    (_, wanted), (_, found) = train(False), train(True)
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


def test_between_steps_the_optimizer_holds_nothing_on_the_device() -> None:
    p = torch.nn.Parameter(torch.ones(8, 8, dtype=torch.bfloat16))
    optimizer = MasterAdamW([p], OptimizerSettings(lr=0.1, offload_after_step=True))
    assert optimizer.num_device_bytes == 0, "the master waits from the start"
    for _ in range(2):
        p.sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        assert optimizer.num_device_bytes == 0
    assert p.float().mean().item() == pytest.approx(0.8, rel=1e-2)
    plain = MasterAdamW([torch.nn.Parameter(p.detach().clone())], OptimizerSettings(lr=0.1))
    assert plain.num_device_bytes == 64 * 4, "one master"


def test_a_reference_in_host_memory_gives_the_same_logprobs(samples: Sequence[TrainingSample]) -> None:
    batch = pack(samples, max_tokens_per_micro_batch=60)
    settings = OptimizerSettings(lr=1e-3)
    wanted = PolicyTrainer(make_model(), settings, reference=make_model(seed=1)).forward(batch, which="reference")
    reference = make_model(seed=1)
    size = sum(p.numel() * p.element_size() for p in reference.parameters())
    trainer = PolicyTrainer(make_model(), settings, reference=reference, offload_reference=True)
    held: list[int] = []
    reference.model.layers[0].register_forward_pre_hook(lambda *_: held.append(trainer.offloaded.num_device_bytes))
    assert trainer.offloaded.num_device_bytes == 0
    for _ in range(2):
        found = trainer.forward(batch, which="reference")
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        assert trainer.offloaded.num_device_bytes == 0
    assert held == [size] * (2 * len(batch.micro_batches[0]))
    trainer.forward(batch)
    assert trainer.offloaded.num_device_bytes == 0, "the policy's pass needs no reference"
