"""The training side on a CUDA device: the same numbers as on the CPU, up to the dtype."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from skyrl_train.algorithms.kl import k3
from skyrl_train.algorithms.objective import PolicyObjective
from skyrl_train.algorithms.policy_losses import ppo_clip
from skyrl_train.algorithms.reductions import token_mean
from skyrl_train.data.pack import pack
from skyrl_train.training.attention import ReferenceAttention, packed_attention
from skyrl_train.training.attention_blocks import BlockAttention
from skyrl_train.training.attention_varlen import VarlenAttention, varlen_is_available
from skyrl_train.training.optimizer import OptimizerSettings
from skyrl_train.training.trainer import PolicyTrainer
from skyrl_train.training.update import update_policy
from tests.tiny import make_model
from tests.training.batches import make_samples
from tests.training.test_attention import tree

pytestmark = pytest.mark.gpu
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
OBJECTIVE = PolicyObjective(policy_loss=ppo_clip, reduction=token_mean, kl=k3, kl_loss_coef=0.1, entropy_loss_coef=0.01)


@pytest.mark.parametrize("window", [None, 1, 7, 40])
@pytest.mark.parametrize("head_size", [32, 64, 128])
def test_varlen_equals_the_explicit_mask(window: int | None, head_size: int) -> None:
    micro_batch = tree([None, 0, 0, None, 1, None], [37, 5, 70, 64, 3, 1])
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(180, heads, head_size, generator=generator).bfloat16() for heads in (4, 2, 2, 4)]

    def outputs(
        context: ReferenceAttention | VarlenAttention, device: torch.device, dtype: torch.dtype
    ) -> list[torch.Tensor]:
        q, k, v, weight = (x.to(device, dtype, copy=True) for x in inputs)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = context.attend(0, *leaves, scaling=0.1, sliding_window=window)
        return [x.double().cpu() for x in (out.detach(), *torch.autograd.grad((out * weight).sum(), leaves))]

    wanted = outputs(ReferenceAttention(micro_batch, device=CPU), CPU, torch.float64)
    found = outputs(VarlenAttention(micro_batch, device=CUDA), CUDA, torch.bfloat16)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02 * float(b.abs().max()) + 1e-5)


def test_the_backend_follows_the_dtype() -> None:
    micro_batch = tree([None], [3])
    assert varlen_is_available(CUDA, torch.bfloat16)
    assert isinstance(packed_attention(micro_batch, device=CUDA, dtype=torch.bfloat16), VarlenAttention)
    assert isinstance(packed_attention(micro_batch, device=CUDA, dtype=torch.float32), BlockAttention)


@pytest.mark.parametrize("arch", ["qwen2", "qwen3", "llama", "gemma3_text"])
def test_a_step_in_float32_equals_the_cpus(arch: str) -> None:
    batch = pack(make_samples(), max_tokens_per_micro_batch=60)
    results = []
    for device in ("cpu", "cuda"):
        trainer = PolicyTrainer(
            make_model(arch).to(device), OptimizerSettings(lr=1e-3), reference=make_model(arch, seed=1).to(device)
        )
        metrics = update_policy(trainer, [batch], OBJECTIVE).metrics
        results.append((metrics, [p.detach().cpu() for p in trainer.model.parameters()]))
    (wanted, weights), (found, moved) = results
    assert found == pytest.approx(wanted, rel=1e-3, abs=1e-5)
    for a, b in zip(moved, weights, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=3e-4)


def test_logprobs_in_bfloat16_stay_near_float32() -> None:
    batch = pack(make_samples(num_prompts=8), max_tokens_per_micro_batch=10_000)
    settings = OptimizerSettings(lr=1e-3)
    (wanted,) = PolicyTrainer(make_model("qwen3"), settings).forward(batch)
    for share_prefix in (True, False):
        batch = pack(make_samples(num_prompts=8), max_tokens_per_micro_batch=10_000, share_prefix=share_prefix)
        (found,) = PolicyTrainer(make_model("qwen3").bfloat16().cuda(), settings).forward(batch)
        torch.testing.assert_close(found.cpu(), wanted, rtol=0, atol=0.15)
        assert float((found.cpu() - wanted).abs().mean()) < 0.03


def test_bfloat16_steps_keep_the_tensors_and_resume(tmp_path: Path) -> None:
    model = make_model("llama").bfloat16().cuda()
    places = [p.data_ptr() for p in model.parameters()]
    trainer = PolicyTrainer(model, OptimizerSettings(lr=1e-3), gradient_checkpointing=True)
    objective = PolicyObjective(policy_loss=ppo_clip, reduction=token_mean)
    batch = pack(make_samples(), max_tokens_per_micro_batch=60)
    update_policy(trainer, [batch], objective)
    trainer.save(tmp_path)
    update_policy(trainer, [batch], objective)
    assert [p.data_ptr() for p in model.parameters()] == places
    again = PolicyTrainer(make_model("llama", seed=2).bfloat16().cuda(), OptimizerSettings(lr=1e-3))
    again.load(tmp_path)
    update_policy(again, [batch], objective)
    for a, b in zip(model.parameters(), again.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2**-7)  # one step of bfloat16 at 1
