"""The critic on a CUDA device, and what host memory gives back of the device's."""

from __future__ import annotations

import gc

import pytest
import torch

from skyrl_train.algorithms.objective import PolicyObjective
from skyrl_train.algorithms.policy_losses import ppo_clip
from skyrl_train.algorithms.reductions import token_mean
from skyrl_train.data.pack import pack
from skyrl_train.training.critic import CriticTrainer
from skyrl_train.training.offload import HostMemory
from skyrl_train.training.optimizer import MasterAdamW, OptimizerSettings
from skyrl_train.training.trainer import PolicyTrainer
from skyrl_train.training.update import update_policy
from tests.tiny import make_model
from tests.training.batches import make_samples
from tests.training.test_critic import make_network, with_targets

pytestmark = pytest.mark.gpu
OBJECTIVE = PolicyObjective(policy_loss=ppo_clip, reduction=token_mean)
WIDE = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4}


@pytest.mark.parametrize("arch", ["qwen2", "llama"])
def test_a_critics_gradient_in_float32_equals_the_cpus(arch: str) -> None:
    batch = pack(with_targets(make_samples()), max_tokens_per_micro_batch=60)
    results = []
    for device in ("cpu", "cuda"):
        network = make_network(arch).to(device)
        critic = CriticTrainer(network, OptimizerSettings(lr=1e-3))
        metrics = critic.forward_backward(batch)
        gradients = [p.grad.to("cpu", copy=True) for p in network.parameters() if p.grad is not None]
        results.append((metrics, gradients, critic.optim_step().grad_norm))
    (wanted, wanted_gradients, norm), (found, gradients, found_norm) = results
    assert found == pytest.approx(wanted, rel=1e-4)
    assert found_norm == pytest.approx(norm, rel=1e-4)
    for a, b in zip(gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * norm)


def test_values_in_bfloat16_stay_near_float32() -> None:
    batch = pack(make_samples(num_prompts=8), max_tokens_per_micro_batch=10_000)
    (wanted,) = CriticTrainer(make_network("qwen3"), OptimizerSettings(lr=1e-3)).forward(batch)
    network = make_network("qwen3")
    network.body.bfloat16()
    (found,) = CriticTrainer(network.cuda(), OptimizerSettings(lr=1e-3)).forward(batch)
    assert found.dtype == torch.float32
    assert float((found.cpu() - wanted).abs().mean()) < 0.02 * float(wanted.std())


def allocated() -> int:
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def test_memory_is_really_given_back_and_the_copies_are_pinned() -> None:
    tensors = [torch.randn(1 << 20, device="cuda"), torch.randn(1 << 20, device="cuda").bfloat16()]
    before, wanted = allocated(), [t.cpu() for t in tensors]
    memory = HostMemory(tensors)
    memory.send_away()
    assert before - allocated() == 6 << 20
    assert all(memory.values(t).is_pinned() for t in tensors)
    assert all(torch.equal(memory.values(t), w) for t, w in zip(tensors, wanted, strict=True))
    memory.bring_back()
    assert allocated() == before
    assert all(torch.equal(t.cpu(), w) for t, w in zip(tensors, wanted, strict=True))


def test_a_reference_in_host_memory_gives_the_same_logprobs_and_its_memory() -> None:
    batch = pack(make_samples(), max_tokens_per_micro_batch=60)
    settings = OptimizerSettings(lr=1e-3)

    def make(offload: bool) -> PolicyTrainer:
        reference = make_model(seed=1, **WIDE).cuda()
        return PolicyTrainer(make_model(**WIDE).cuda(), settings, reference=reference, offload_reference=offload)

    trainer = make(False)
    wanted = trainer.forward(batch, which="reference")
    size = sum(p.numel() * p.element_size() for p in trainer.model.parameters())
    with_both = allocated()
    del trainer
    trainer = make(True)
    assert with_both - allocated() > 0.9 * size
    for _ in range(2):
        found = trainer.forward(batch, which="reference")
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    del found
    assert with_both - allocated() > 0.9 * size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_optimizer_in_host_memory_takes_the_same_steps_and_gives_its_memory(dtype: torch.dtype) -> None:
    """With the same gradients: those of a whole model differ from run to run, for atomics add in any order."""
    shapes = [(1024, 1024), (1024,), (512, 2048)]
    weights, held = [], []
    for offload in (False, True):
        generator = torch.Generator("cuda").manual_seed(0)

        def draw(shape: tuple[int, ...], generator: torch.Generator = generator) -> torch.Tensor:
            return torch.randn(shape, device="cuda", generator=generator).to(dtype)

        before = allocated()
        parameters = [torch.nn.Parameter(draw(shape)) for shape in shapes]
        optimizer = MasterAdamW(parameters, OptimizerSettings(lr=1e-3, offload_after_step=offload))
        for _ in range(3):
            for _ in range(2):  # gradients add up while masters are away
                torch.stack([(p * draw(p.shape)).sum().float() for p in parameters]).sum().backward()
            optimizer.step()
        held.append(allocated() - before)
        weights.append([p.detach().cpu() for p in parameters])
        del optimizer, parameters
    number = sum(w.numel() for w in weights[0])
    state = number * (8 if dtype == torch.float32 else 12)  # two moments, and a master where weights are bfloat16
    assert held[0] - held[1] > 0.95 * state
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_a_policy_whose_optimizer_waits_in_host_memory_trains() -> None:
    batch = pack(make_samples(), max_tokens_per_micro_batch=60)
    steps = []
    for offload in (False, True):
        settings = OptimizerSettings(lr=1e-3, offload_after_step=offload)
        trainer = PolicyTrainer(make_model().to("cuda", torch.bfloat16), settings)
        steps.append([update_policy(trainer, [batch], OBJECTIVE).metrics["policy/grad_norm"] for _ in range(3)])
    assert steps[1] == pytest.approx(steps[0], rel=2e-2)
