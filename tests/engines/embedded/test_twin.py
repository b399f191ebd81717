from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, apply_rotary_pos_emb

from skyrl_train.engines.embedded.attention import ShapeProbe
from skyrl_train.engines.embedded.fused import (
    FusedGatedMLP,
    FusedRMSNorm,
    Kernels,
    as_gated_mlp,
    as_rms_norm,
    as_rotary,
)
from skyrl_train.engines.embedded.native.build import load_native
from skyrl_train.engines.embedded.twin import InferenceModel
from tests.tiny import ARCHITECTURES, make_model

KERNELS = Kernels(load_native())
IDS = torch.arange(40)[None]


class OwnAttention:
    """Causal attention over the rows of one sequence, without a cache."""

    def attend(
        self,
        layer_idx: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float,
        sliding_window: int | None,
    ) -> torch.Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        return out[0].transpose(0, 1)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(
            input_ids=IDS, position_ids=IDS, use_cache=False, attention_context=OwnAttention()
        ).logits
    return result


def kinds(model: nn.Module) -> Counter[str]:
    return Counter(type(module).__name__ for module in model.modules())


def with_random_norms(arch: str, **overrides: Any) -> Any:
    """Fresh norms are all ones or zeros, which hides a weight that isn't used."""
    model = make_model(arch, **overrides)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    return model


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_twin_computes_what_the_model_computes(arch: str) -> None:
    model = with_random_norms(arch, head_dim=32) if arch != "phi3" else with_random_norms(arch)
    inference = InferenceModel(model, load_native())
    expected = logits(model)
    assert torch.allclose(logits(inference), expected, atol=2e-5 * float(expected.abs().max()))
    assert "FusedRMSNorm" in kinds(inference.twin)


def test_the_parts_of_a_llama_like_model_are_all_fused() -> None:
    found = kinds(InferenceModel(make_model("qwen3", head_dim=32), load_native()).twin)
    assert found["FusedRMSNorm"] == 2 * 4 + 1
    assert found["FusedGatedMLP"] == 2
    # The originals are kept inside, for what the kernels can't take.
    assert found["Qwen3RMSNorm"] == 2 * 4 + 1


def test_the_original_is_not_changed() -> None:
    model = make_model("qwen2").train()
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    globals_before = dict(type(model.model.layers[0].self_attn).forward.__globals__)
    inference = InferenceModel(model, load_native())
    logits(inference)
    for name, module in model.named_modules():
        assert module.__dict__.keys() == before[name].keys()
        assert all(module.__dict__[key] is value for key, value in before[name].items())
    assert dict(type(model.model.layers[0].self_attn).forward.__globals__) == globals_before
    assert model.training and not inference.twin.training


def test_the_twin_has_no_parameters_of_its_own() -> None:
    model = make_model("gemma3_text")
    mine = {id(parameter) for parameter in InferenceModel(model, load_native()).twin.parameters()}
    assert mine == {id(parameter) for parameter in model.parameters()}


def test_weights_that_change_in_place_or_by_assignment_are_seen() -> None:
    model = make_model("qwen2")
    inference = InferenceModel(model, load_native())
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    assert torch.allclose(logits(inference), logits(model), atol=1e-4)
    model.model.layers[0].input_layernorm.weight = nn.Parameter(torch.randn(64))
    model.model.layers[1].mlp.up_proj.weight = nn.Parameter(torch.randn(128, 64))
    assert torch.allclose(logits(inference), logits(model), atol=1e-4)


def test_a_replaced_submodule_is_seen_after_a_refresh() -> None:
    model = make_model("qwen2")
    inference = InferenceModel(model, load_native())
    assert not inference.refresh()
    model.model.layers[0].mlp.up_proj = nn.Sequential(nn.Linear(64, 128, bias=False))
    assert not torch.allclose(logits(inference), logits(model), atol=1e-3)
    assert inference.refresh()
    assert torch.allclose(logits(inference), logits(model), atol=1e-4)


def test_dropout_is_off_in_the_twin_of_a_model_in_training() -> None:
    model = make_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.0).train()
    inference = InferenceModel(model, None)
    first = logits(inference)
    assert torch.equal(first, logits(inference))
    assert not torch.equal(logits(model), logits(model))
    inference(input_ids=IDS, position_ids=IDS, use_cache=False, attention_context=ShapeProbe())


def test_forward_hooks_of_the_original_run_in_the_twin() -> None:
    model = make_model("qwen2")
    inference = InferenceModel(model, load_native())
    seen = []
    model.model.layers[1].register_forward_hook(lambda *args: seen.append(1))
    logits(inference)
    assert seen == [1]


@pytest.mark.parametrize("rows", [1, 3, 700])
def test_rms_norm_equals_that_of_transformers(rows: int) -> None:
    for original in (LlamaRMSNorm(64, eps=1e-5), Gemma3RMSNorm(64, eps=1e-3)):
        with torch.no_grad():
            original.weight.copy_(torch.randn(64))
        fused = as_rms_norm(original, KERNELS)
        assert isinstance(fused, FusedRMSNorm)
        x = torch.randn(1, rows, 64) * torch.logspace(-4, 3, rows)[:, None]
        assert torch.allclose(fused(x), original(x), rtol=1e-5, atol=1e-6)
        strided = torch.randn(64, rows).t()
        assert torch.allclose(fused(strided), original(strided), rtol=1e-5, atol=1e-6)


def in_last_digits(found: torch.Tensor, wanted: torch.Tensor, digits: int) -> bool:
    """bfloat16 numbers, `digits` steps of their last digit apart at most; wanted in float32 or bfloat16."""
    scale = wanted.float().abs().clamp(min=1e-30)
    return found.dtype == torch.bfloat16 and bool(
        ((found.float() - wanted.float()).abs() <= digits * scale / 128).all()
    )


def test_norms_in_bfloat16_equal_those_of_transformers() -> None:
    for original in (LlamaRMSNorm(64, eps=1e-5), Gemma3RMSNorm(64, eps=1e-3)):
        with torch.no_grad():
            original.weight.copy_(torch.randn(64))
        original.to(torch.bfloat16)
        fused = as_rms_norm(original, KERNELS)
        assert isinstance(fused, FusedRMSNorm)
        x = (torch.randn(1, 33, 64) * torch.logspace(-4, 3, 33)[:, None]).to(torch.bfloat16)
        assert in_last_digits(fused(x), original(x), 1)
        assert torch.equal(fused(x.float()), original(x.float())), "another type than the weight's is the original's"


def test_gate_and_rotary_embedding_in_bfloat16_are_rounded_once() -> None:
    gate, up = torch.randn(2, 4, 512).to(torch.bfloat16)
    wanted = nn.functional.silu(gate.float()) * up.float()
    assert in_last_digits(KERNELS.silu_times(gate.clone(), up), wanted, 1)
    rotary = as_rotary(apply_rotary_pos_emb, KERNELS)
    assert rotary is not None
    q, k = (torch.randn(1, 5, heads, 64).to(torch.bfloat16).transpose(1, 2) for heads in (4, 2))
    cos, sin = torch.randn(2, 1, 5, 64).to(torch.bfloat16)
    wide = apply_rotary_pos_emb(*(x.float() for x in (q, k, cos, sin)))
    for mine, exact in zip(rotary(q, k, cos, sin), wide, strict=True):
        torch.testing.assert_close(mine, exact.to(torch.bfloat16), rtol=1 / 128, atol=1e-6)
    mixed = rotary(q.float(), k.float(), cos, sin)
    assert all(x.dtype == torch.float32 for x in mixed)


class ClampedNorm(LlamaRMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = super().forward(x)
        return out.clamp(-2, 2)


def test_what_is_no_rms_norm_is_not_taken_for_one() -> None:
    assert as_rms_norm(nn.LayerNorm(64), KERNELS) is None
    assert as_rms_norm(ClampedNorm(64), KERNELS) is None
    assert as_rms_norm(LlamaRMSNorm(40), KERNELS) is None  # no multiple of 16
    assert as_rms_norm(LlamaRMSNorm(64).to(torch.float16), KERNELS) is None


@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh", "relu"])
def test_only_a_silu_gate_is_fused(activation: str) -> None:
    config = make_model("llama").config
    config.hidden_act = activation
    mlp = LlamaMLP(config)
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter.zero_()  # zeros prove nothing about the activation
    fused = as_gated_mlp(mlp, KERNELS)
    assert isinstance(fused, FusedGatedMLP) == (activation == "silu")


def test_the_gate_is_exact_far_from_zero() -> None:
    gate = torch.cat(
        (torch.linspace(-100, 100, 496), torch.tensor([0.0, -0.0, 1e-20, -1e-20, 1e30, -1e30]), torch.ones(10))
    )
    up = torch.randn(512)
    expected = nn.functional.silu(gate) * up
    assert torch.allclose(KERNELS.silu_times(gate.clone(), up), expected, rtol=1e-5, atol=1e-30)


def test_the_rotary_embedding_equals_that_of_transformers() -> None:
    rotary = as_rotary(apply_rotary_pos_emb, KERNELS)
    assert rotary is not None
    for dim in (32, 64, 128, 48):  # 48 goes to the original: half of it is no multiple of 16
        q, k = (torch.randn(1, 5, heads, dim).transpose(1, 2) for heads in (4, 2))
        cos, sin = torch.randn(2, 1, 5, dim)
        for mine, theirs in zip(rotary(q, k, cos, sin), apply_rotary_pos_emb(q, k, cos, sin), strict=True):
            assert torch.allclose(mine, theirs, atol=1e-6)


def test_a_rotary_embedding_of_another_kind_is_left_alone() -> None:
    def interleaved(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        return q * cos[:, None], k * sin[:, None]

    assert as_rotary(interleaved, KERNELS) is None
    assert as_rotary(lambda q: q, KERNELS) is None  # type: ignore[arg-type, return-value]
