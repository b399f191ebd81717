from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from skyrl_train.engines.embedded.native.build import load_native
from skyrl_train.engines.embedded.packed_linear import PackedMatrix, Packing, can_pack, can_pack_pair
from skyrl_train.engines.embedded.twin import InferenceModel
from skyrl_train.types import LocalWeights, NamedWeights, WeightUpdate
from tests.engines.embedded.common import greedy_reference, logprob_reference, make_core, random_prompts, request, run
from tests.engines.embedded.test_twin import logits, with_random_norms
from tests.tiny import ARCHITECTURES, make_model

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}
"""Of the largest number: a rounding of the result."""


def linear(n: int, k: int, dtype: torch.dtype, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(n * k)
    made = nn.Linear(k, n, bias=bias)
    return made.to(dtype)


def assert_close(found: torch.Tensor | None, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    assert found is not None and found.dtype == dtype and found.shape == wanted.shape
    torch.testing.assert_close(found.float(), wanted, rtol=0, atol=TOLERANCE[dtype] * float(wanted.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (31, 7), (32, 64), (33, 17), (200, 48), (257, 130)])
@torch.no_grad()
def test_a_packed_product_equals_the_plain_one(n: int, k: int, dtype: torch.dtype) -> None:
    one, other = linear(n, k, dtype), linear(n, k, dtype, bias=False)
    packing = Packing(load_native())
    with_bias, without, gated = packing.matrix(one), packing.matrix(other), packing.matrix(other, up=one)
    for rows in (*range(1, 14), 25, 100, 700):
        x = torch.randn(1, rows, k).to(dtype)
        wide, a, b = (t.float() for t in (x, one.weight, other.weight))
        assert_close(with_bias(x), nn.functional.linear(wide, a, one.bias.float()), dtype)
        assert_close(without(x), nn.functional.linear(wide, b), dtype)
        wanted = nn.functional.silu(nn.functional.linear(wide, b)) * nn.functional.linear(wide, a)
        assert_close(gated(x), wanted, dtype)


@pytest.mark.parametrize("threads", [1, 2, 3])
@torch.no_grad()
def test_a_row_has_the_same_bits_whatever_stands_beside_it_and_however_many_threads(threads: int) -> None:
    matrix = Packing(load_native()).matrix(linear(700, 300, torch.float32))
    x = torch.randn(40, 300)
    alone = torch.cat([matrix(row[None]) for row in x])  # type: ignore[misc]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert all(torch.equal(matrix(x[:rows]), alone[:rows]) for rows in range(1, 41))  # type: ignore[arg-type]
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def test_what_the_kernel_cant_take_is_left_to_the_plain_form() -> None:
    one = linear(32, 16, torch.float32)
    matrix = Packing(load_native()).matrix(one)
    assert matrix(torch.randn(3, 16).double()) is None
    assert matrix(torch.randn(16, 3).t()) is None
    assert not can_pack(one.half()) and not can_pack(nn.Bilinear(2, 2, 2)) and not can_pack(nn.LayerNorm(16))
    assert not can_pack_pair(linear(32, 16, torch.float32), linear(32, 16, torch.float32, bias=False))
    assert not can_pack_pair(linear(32, 16, torch.float32, bias=False), linear(32, 16, torch.bfloat16, bias=False))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_on_packed_weights_computes_what_it_computes_without(arch: str, dtype: torch.dtype) -> None:
    model = with_random_norms(arch).to(dtype)
    inference = InferenceModel(model, load_native(), packs_weights=True)
    expected, found = logits(model).float(), logits(inference).float()
    if dtype == torch.float32:
        assert torch.allclose(found, expected, atol=2e-5 * float(expected.abs().max()))
    else:  # eight bits, rounded at other places: as near to the exact numbers as the plain form is
        exact = logits(with_random_norms(arch).to(torch.bfloat16).float())
        assert float((found - exact).abs().mean()) <= 1.3 * float((expected - exact).abs().mean())
        assert float((found - exact).abs().max()) <= 2 * float((expected - exact).abs().max())
    assert inference.packing is not None and inference.packing.num_bytes > 0


def test_a_parameter_changed_in_place_or_replaced_is_packed_again_by_itself() -> None:
    model = make_model("qwen2")
    inference = InferenceModel(model, load_native(), packs_weights=True)
    logits(inference)
    for layer in (model.model.layers[0].mlp.up_proj, model.model.layers[1].self_attn.q_proj, model.lm_head):
        with torch.no_grad():
            layer.weight.mul_(2)
        assert torch.allclose(logits(inference), logits(model), atol=1e-4)
        layer.weight = nn.Parameter(torch.randn(layer.weight.shape) * 0.1)
        assert torch.allclose(logits(inference), logits(model), atol=1e-4)


def test_released_copies_come_again_with_their_next_use() -> None:
    model = make_model("qwen2")
    inference = InferenceModel(model, load_native(), packs_weights=True)
    before = logits(inference)
    packing = inference.packing
    assert packing is not None
    size = packing.num_bytes
    packing.release()
    assert packing.num_bytes == 0
    assert torch.equal(logits(inference), before) and packing.num_bytes == size


def shrink_behind_the_counter(model: Any) -> None:
    """Through .data, as optimizers of some libraries write: no version counter tells."""
    for parameter in model.parameters():
        versions = parameter._version
        parameter.data.mul_(0.5)
        assert parameter._version == versions


@pytest.mark.parametrize("packs", [True, False])
def test_no_update_leaves_a_stale_copy(packs: bool) -> None:
    """The answers after each way of an update are those of an engine that was made after it."""
    model = make_model("qwen2")
    core = make_core(model, pack_weights=packs)
    prompts = random_prompts(5, 17, 30)
    asked = [request(str(i), prompt) for i, prompt in enumerate(prompts)]

    def answers() -> list[tuple[int, ...]]:
        return [completion.token_ids for completion in run(core, asked)]

    def update(version: int, source: Any) -> None:
        core.pause("keep")
        core.update_weights(WeightUpdate(version=version, source=source))
        core.resume()

    def wanted() -> list[tuple[int, ...]]:
        model.config._attn_implementation = "eager"
        try:
            return [greedy_reference(model, prompt, 16) for prompt in prompts]
        finally:
            model.config._attn_implementation = "skyrl"

    seen = [answers()]
    assert seen[0] == wanted()
    shrink_behind_the_counter(model)
    update(1, LocalWeights())
    seen.append(answers())
    assert seen[1] == wanted()
    others = make_model("qwen2", seed=7).state_dict()
    update(2, NamedWeights(tensors=others))
    seen.append(answers())
    assert seen[2] == wanted()
    model.model.layers[0].mlp.up_proj = nn.Linear(64, 128, bias=False)
    update(3, LocalWeights())
    seen.append(answers())
    assert seen[3] == wanted()
    assert len({tuple(map(tuple, one)) for one in seen}) == len(seen), "an update that changes nothing proves nothing"


@pytest.mark.parametrize("packs", [True, False])
def test_a_bfloat16_engine_is_as_near_to_the_exact_model_as_transformers_in_bfloat16(packs: bool) -> None:
    core = make_core(make_model().to(torch.bfloat16), pack_weights=packs)
    prompts = random_prompts(5, 17, 30, 64)
    answers = run(core, [request(str(i), p, 24, temperature=1.0, seed=i) for i, p in enumerate(prompts)])
    exact = make_model(attn_implementation="eager").to(torch.bfloat16).float()  # its weights, all else in 24 bits
    plain = make_model(attn_implementation="eager").to(torch.bfloat16)
    ours, theirs = [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        wanted = logprob_reference(exact, prompt, answer.token_ids)
        ours.append(torch.tensor(answer.logprobs) - wanted)
        theirs.append(logprob_reference(plain, prompt, answer.token_ids).float() - wanted)
    found, usual = torch.cat(ours).abs(), torch.cat(theirs).abs()
    assert float(found.mean()) <= 1.3 * float(usual.mean())
    assert float(found.max()) <= 2 * float(usual.max())


def test_packing_follows_the_option_and_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def packs(**config: Any) -> bool:
        model = make_core(make_model(), **config)._runner._model  # type: ignore[attr-defined]
        return model.packing is not None

    assert packs() and packs(pack_weights=True) and not packs(pack_weights=False)
    monkeypatch.setattr("skyrl_train.engines.embedded.config.PACKED_FRAC", 0.0)
    assert not packs() and packs(pack_weights=True)


def test_halves_of_a_gated_mlp_are_one_product_unless_somebody_listens() -> None:
    model = make_model("qwen2")
    inference = InferenceModel(model, load_native(), packs_weights=True)
    mlp: Any = inference.twin.get_submodule("model.layers.0.mlp")
    assert isinstance(mlp.pair, PackedMatrix)
    seen = []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *args: seen.append(1))
    assert torch.allclose(logits(inference), logits(model), atol=1e-4)
    assert len(seen) == 2
