"""Adapters on a CUDA device: the CPU's numbers in float32, and an engine of merged weights in bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from skyrl_train.algorithms.kl import k3
from skyrl_train.algorithms.objective import PolicyObjective
from skyrl_train.algorithms.policy_losses import ppo_clip
from skyrl_train.algorithms.reductions import token_mean
from skyrl_train.data.pack import pack
from skyrl_train.engines.embedded.config import EmbeddedConfig
from skyrl_train.engines.embedded.engine import EmbeddedEngine
from skyrl_train.training.lora import Adapters, LoraSettings
from skyrl_train.training.optimizer import OptimizerSettings
from skyrl_train.training.trainer import PolicyTrainer
from skyrl_train.training.update import update_policy
from skyrl_train.weight_sync.sync import sync_weights
from tests.tiny import make_model, make_tokenizer
from tests.training.batches import make_samples
from tests.training.test_engine_agreement import sample_groups

pytestmark = pytest.mark.gpu
OBJECTIVE = PolicyObjective(policy_loss=ppo_clip, reduction=token_mean, kl=k3, kl_loss_coef=0.1)


def make_trainer(
    device: str, dtype: torch.dtype = torch.float32, *, lr: float = 1e-2, **settings: Any
) -> PolicyTrainer:
    model = make_model("qwen3", hidden_size=128).to(dtype)
    model.to(device)
    adapters = Adapters(model, LoraSettings(rank=4, **settings))
    return PolicyTrainer(model, OptimizerSettings(lr=lr), adapters=adapters, reference="start")


@pytest.mark.parametrize("init_method", ["kaiming", "pissa"])
def test_two_steps_in_float32_equal_the_cpus(init_method: Any) -> None:
    """From one start: a PiSSA start is unique up to signs, which differ between devices."""
    batch = pack(make_samples(), max_tokens_per_micro_batch=60)
    cpu, cuda = (make_trainer(device, lr=1e-3, init_method=init_method) for device in ("cpu", "cuda"))
    cuda.model.load_state_dict(cpu.model.state_dict())
    results = []
    for trainer in (cpu, cuda):
        metrics = [update_policy(trainer, [batch], OBJECTIVE).metrics for _ in range(2)]
        results.append((metrics, {n: t.cpu() for n, t in trainer._adapters.merged_tensors().items()}))
    (wanted, weights), (found, moved) = results
    for a, b in zip(found, wanted, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(moved[name], weight, rtol=1e-3, atol=5e-4, msg=name)


async def test_the_engine_gets_new_weights_under_its_captured_graphs() -> None:
    """In bfloat16 the merged matrices are rounded once: rollouts are near the trainer, and stay so over updates."""
    trainer = make_trainer("cuda", torch.bfloat16, lr=2e-2)
    engine = EmbeddedEngine(
        trainer.engine_model, make_tokenizer(), config=EmbeddedConfig(max_context_len=64, kv_cache_tokens=4096)
    )
    try:
        for _ in range(4):
            batch = pack(await sample_groups(engine, temperature=1.0), max_tokens_per_micro_batch=100)
            metrics = update_policy(trainer, [batch], OBJECTIVE).metrics
            assert metrics["policy/rollout_logprob_abs_diff_mean"] < 0.02
            await sync_weights(engine, trainer.export_weights(trainer.version))
        stale = metrics["policy/ref_kl"]
    finally:
        await engine.close()
    assert stale > 1e-3, "the policy moved, and the engine with it"


def test_a_loaded_states_dropout_has_the_masks_of_its_version(tmp_path: Path) -> None:
    """Backward passes on CUDA add in any order, so gradients are near and not equal; other masks are far from that."""
    batch = pack(make_samples(), max_tokens_per_micro_batch=10_000)

    def gradient(trainer: PolicyTrainer) -> torch.Tensor:
        trainer.forward_backward(batch, PolicyObjective(policy_loss=ppo_clip, reduction=token_mean))
        parameters = [p for p in trainer.model.parameters() if p.requires_grad]
        found = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        for parameter in parameters:
            parameter.grad = None
        return found

    first, second = (make_trainer("cuda", dropout=0.3) for _ in range(2))
    update_policy(first, [batch], OBJECTIVE)
    first.save(tmp_path)
    wanted = gradient(first)
    second.load(tmp_path)
    torch.rand(3, device="cuda")
    assert (gradient(second) - wanted).norm() < 1e-3 * wanted.norm()
    second.version += 1
    assert (gradient(second) - wanted).norm() > 0.1 * wanted.norm()
