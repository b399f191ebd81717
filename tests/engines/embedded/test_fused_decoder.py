from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from skyrl_train.engines.embedded.fused_decoder import FusedDecoder, Norms, NotThisForm, TorchOperations, recognise
from tests.engines.embedded.test_twin import OwnAttention, with_random_norms
from tests.tiny import make_model

IDS = torch.arange(17) * 7 % 300
POSITIONS = torch.arange(17)
KNOWN = ("qwen2", "qwen3", "llama", "mistral")


class PlainAttention:
    """What DecoderContext says, over the rows of one sequence."""

    def attend(
        self,
        layer_idx: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        tables: tuple[torch.Tensor, torch.Tensor],
        norms: Norms | None,
        scaling: float,
        sliding_window: int | None,
    ) -> torch.Tensor:
        if norms is not None:
            query = TorchOperations.rms_norm(query, *norms[:2])
            key = TorchOperations.rms_norm(key, *norms[2:])
        cosines, sines = (table[POSITIONS][:, None] for table in tables)

        def turned(x: torch.Tensor) -> torch.Tensor:
            a, b = x.chunk(2, -1)
            return x * cosines + torch.cat((-b, a), -1) * sines

        own = OwnAttention()
        return own.attend(layer_idx, turned(query), turned(key), value, scaling=scaling, sliding_window=sliding_window)


@torch.no_grad()
def fused_logits(decoder: FusedDecoder) -> torch.Tensor:
    return decoder.logits(decoder.forward(decoder.embed(IDS), PlainAttention(), TorchOperations()))


@torch.no_grad()
def model_logits(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(
        input_ids=IDS[None], position_ids=POSITIONS[None], use_cache=False, attention_context=OwnAttention()
    ).logits[0]
    return logits


@pytest.mark.parametrize("arch", KNOWN)
@pytest.mark.parametrize("tied", [False, True])
def test_the_fused_decoder_computes_what_the_model_computes(arch: str, tied: bool) -> None:
    model = with_random_norms(arch, tie_word_embeddings=tied)
    expected = model_logits(model)
    decoder = recognise(model, 64)
    assert decoder.num_packed == 4
    for logits in (fused_logits(decoder), model_logits(model)):  # the model's own forward reads the moved weights
        assert torch.allclose(logits, expected, atol=1e-5 * float(expected.abs().max()))


def test_bfloat16_models_are_recognised_and_keep_their_type() -> None:
    model = with_random_norms("qwen2").to(torch.bfloat16)
    decoder = recognise(model, 64)
    assert decoder.num_packed == 4 and decoder.tables[0].dtype == torch.bfloat16
    expected = model_logits(model).float()
    assert float((fused_logits(decoder).float() - expected).abs().max() / expected.abs().max()) < 0.03


def replaced_activation(model: Any) -> None:
    model.model.layers[1].mlp.act_fn = ACT2FN["gelu"]


def clamped_norm(model: Any) -> None:
    class Clamped(type(model.model.norm)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).clamp(-1, 1)  # type: ignore[no-any-return]

    model.model.norm.__class__ = Clamped


def wrapped_map(model: Any) -> None:
    attention = model.model.layers[0].self_attn
    attention.q_proj = nn.Sequential(attention.q_proj)


def forward_hook(model: Any) -> None:
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)


def other_scale(model: Any) -> None:
    model.model.embed_tokens.register_forward_pre_hook(lambda *_: None)


def mixed_types(model: Any) -> None:
    model.model.norm.to(torch.float64)


@pytest.mark.parametrize(
    "change", [replaced_activation, clamped_norm, wrapped_map, forward_hook, other_scale, mixed_types]
)
def test_what_computes_something_else_is_not_taken_for_one(change: Any) -> None:
    model = make_model("llama")
    change(model)
    where = [parameter.data_ptr() for parameter in model.parameters()]
    with pytest.raises(NotThisForm):
        recognise(model, 64)
    assert where == [parameter.data_ptr() for parameter in model.parameters()]


@pytest.mark.parametrize("arch", ["olmo2", "phi3", "gemma3_text", "gpt2"])
def test_models_of_other_forms_are_refused(arch: str) -> None:
    with pytest.raises(NotThisForm):
        recognise(make_model(arch), 64)


def test_multipliers_that_names_do_not_show_are_seen() -> None:
    assert recognise(make_model("granite"), 64).num_packed == 4
    for multiplier in ("residual_multiplier", "embedding_multiplier", "logits_scaling"):
        with pytest.raises(NotThisForm, match="logits differ"):
            recognise(make_model("granite", **{multiplier: 0.5}), 64)


def test_the_trial_leaves_the_model_as_it_is() -> None:
    model = make_model("qwen2").train()
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    identities = {name: id(parameter) for name, parameter in model.named_parameters()}
    recognise(model, 64)
    for name, module in model.named_modules():
        assert all(module.__dict__[key] is value for key, value in before[name].items())
    assert all(torch.equal(weights[name], parameter) for name, parameter in model.named_parameters())
    assert identities == {name: id(parameter) for name, parameter in model.named_parameters()}


def test_new_parameters_are_seen_and_what_left_the_packed_memory_is_computed_alone() -> None:
    model = with_random_norms("qwen2")
    decoder = recognise(model, 64)
    layer = model.model.layers[0]
    layer.self_attn.k_proj.weight = nn.Parameter(torch.randn_like(layer.self_attn.k_proj.weight))
    layer.input_layernorm.weight = nn.Parameter(torch.randn(64))
    model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))
    assert decoder.separate_what_moved() == 1 and decoder.num_packed == 3
    assert decoder.separate_what_moved() == 0
    expected = model_logits(model)
    assert torch.allclose(fused_logits(decoder), expected, atol=1e-5 * float(expected.abs().max()))
