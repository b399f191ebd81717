"""Each operation by itself: a row's bits are the same alone and among others, on one thread and on two.

Values and gradients are right: torch is the judge of both, and finite differences of the latter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from skyrl_train.data.pack import pack
from skyrl_train.engines.embedded.invariant import operations
from skyrl_train.engines.embedded.invariant.attention import PackedInvariantAttention, SequenceTable
from skyrl_train.engines.embedded.invariant.kernels import invariant_kernels, inverse_of
from skyrl_train.engines.embedded.invariant.sampling import kept
from skyrl_train.engines.embedded.invariant.view import InvariantModel
from skyrl_train.engines.embedded.sampler import truncated
from skyrl_train.engines.embedded.sampling_table import SamplingTable
from skyrl_train.errors import ConfigError
from skyrl_train.training.attention import ReferenceAttention
from skyrl_train.types import SamplingParams
from tests.tiny import make_model
from tests.training.batches import make_samples

CPU = torch.device("cpu")
MANY = 300
"""Rows: more than a block of the kernel, and enough numbers that threads share them."""


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def assert_rows_stand_alone(operation: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> None:
    """`operation` on all rows [T, ...] of x, on each alone and on runs of them."""
    together = operation(x)
    for row in (0, 1, len(x) // 2, len(x) - 1):
        assert torch.equal(operation(x[row : row + 1].clone()), together[row : row + 1])
    for begin, end in ((0, 2), (1, 4), (3, 10), (5, 70), (64, len(x))):
        assert torch.equal(operation(x[begin:end].clone()), together[begin:end])


@pytest.mark.parametrize(("depth", "outputs"), [(64, 300), (100, 7), (896, 130), (5, 1), (16, 33)])
def test_a_row_of_a_linear_map(depth: int, outputs: int, threads: int) -> None:
    x, weight, bias = randn(MANY, depth), randn(outputs, depth), randn(outputs)
    assert_rows_stand_alone(lambda rows: operations.linear(rows, weight, bias), x)
    assert torch.allclose(operations.linear(x, weight, bias), F.linear(x, weight, bias), atol=1e-4)
    assert torch.allclose(operations.linear(x, weight, None), F.linear(x, weight), atol=1e-4)
    # An output depends on its own weights alone, too: a head cut in two gives the same logits.
    assert torch.equal(
        operations.linear(x, weight[: outputs // 2 + 1], None),
        operations.linear(x, weight, None)[:, : outputs // 2 + 1],
    )


@pytest.mark.parametrize(("depth", "outputs"), [(64, 300), (100, 7), (200, 130)])
def test_a_packed_copy_gives_the_bits_of_the_weight_itself(depth: int, outputs: int, threads: int) -> None:
    weight, bias = randn(outputs, depth), randn(outputs)
    packed = torch.empty(-(-outputs // 32) * 32 * depth)
    invariant_kernels().pack(weight, packed)
    for rows in (1, 2, 3, 5, 6, 7, 12, 13, 30, MANY):
        x = randn(rows, depth)
        assert torch.equal(operations.linear(x, weight, bias, packed), operations.linear(x, weight, bias))


@pytest.mark.parametrize("dim", [64, 896, 40, 3])
def test_a_row_of_a_norm(dim: int, threads: int) -> None:
    x, weight = randn(MANY, dim) * torch.logspace(-4, 3, MANY)[:, None], randn(dim)
    assert_rows_stand_alone(lambda rows: operations.rms_norm(rows, weight, 1e-6, 0.0), x)
    assert torch.allclose(
        operations.rms_norm(x, weight, 1e-6, 1.0), F.rms_norm(x, (dim,), weight + 1, 1e-6), rtol=1e-5, atol=1e-6
    )


def test_a_number_of_an_activation(threads: int) -> None:
    x = torch.cat((randn(MANY, 37) * 20, torch.tensor([0.0, -0.0, 1e30, -1e30, 1e-20]).repeat(1, 8)[:, :37]))
    for mine, theirs in ((operations.silu, F.silu), (operations.gelu_tanh, partial(F.gelu, approximate="tanh"))):
        assert_rows_stand_alone(mine, x)
        assert torch.allclose(mine(x), theirs(x), rtol=1e-5, atol=2e-6)


def test_rotation_has_the_bits_of_transformers_own(threads: int) -> None:
    for dim in (32, 24, 2):
        q, k = (randn(1, MANY, heads, dim).transpose(1, 2) for heads in (4, 2))
        cos, sin = randn(1, MANY, dim), randn(1, MANY, dim, seed=1)
        expected = apply_rotary_pos_emb(q, k, cos, sin)
        assert torch.equal(operations.rotate(q, cos, sin), expected[0])
        assert torch.equal(operations.rotate(k, cos, sin), expected[1])


@pytest.mark.parametrize("vocab", [300, 1000, 17, 64])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_row_of_log_probabilities(vocab: int, temperature: float, threads: int) -> None:
    logits, targets = 5 * randn(MANY, vocab), torch.arange(MANY) % vocab
    inverse = torch.full((MANY,), inverse_of(temperature))
    kernels = invariant_kernels()
    together, normalisers = kernels.logprobs(logits, inverse, targets)
    for row in range(0, MANY, 37):
        alone = kernels.logprobs(logits[row : row + 1].clone(), inverse[:1], targets[row : row + 1].clone())
        assert (float(alone[0]), float(alone[1])) == (float(together[row]), float(normalisers[row]))
    exact = (logits.double() / temperature).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert torch.allclose(together.double(), exact, atol=2e-6)
    assert torch.allclose(normalisers.double(), (logits.double() / temperature).logsumexp(-1), atol=5e-6)


def test_log_probabilities_of_what_is_no_number_are_none() -> None:
    for bad in (float("nan"), float("inf")):
        logits = torch.zeros(1, 40)
        logits[0, 33] = bad
        logprobs, _ = invariant_kernels().logprobs(logits, torch.ones(1), torch.tensor([2]))
        assert not logprobs.isfinite().any()


@pytest.mark.parametrize("window", [None, 7, 64, 100])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 16), (6, 2, 32), (3, 3, 64), (4, 1, 48)])
def test_a_row_of_attention(window: int | None, heads: int, kv_heads: int, dim: int, threads: int) -> None:
    """One sequence of 200 positions in scattered slots: asked for at once, in chunks, and position by position."""
    length, slots = 200, 400
    place = np.random.default_rng(0).permutation(slots)[:length].astype(np.int32)
    keys, values, query = (
        randn(slots, kv_heads, dim),
        randn(slots, kv_heads, dim, seed=1),
        3 * randn(length, heads, dim),
    )

    def attend(*spans: tuple[int, int]) -> list[torch.Tensor]:
        """Rows of these spans of positions, each span a sequence of its own in one call."""
        rows = np.concatenate([np.arange(begin, end) for begin, end in spans])
        table = SequenceTable(
            positions=rows,
            cu_rows=np.cumsum([0, *(end - begin for begin, end in spans)]).astype(np.int32),
            table=np.tile(place, (len(spans), 1)),
            table_start=np.arange(len(spans)) * length,
        )
        out = table.attend(query[torch.from_numpy(rows)], keys, values, scaling=dim**-0.5, window=window)
        return list(out.split([end - begin for begin, end in spans]))

    (whole,) = attend((0, length))
    for begin, end in ((0, 1), (63, 64), (64, 65), (5, 130), (199, 200)):
        assert torch.equal(attend((begin, end))[0], whole[begin:end])
    spans = [(0, 10), (150, 200), (64, 128), (77, 78), (3, 4)]
    for (begin, end), part in zip(spans, attend(*spans), strict=True):
        assert torch.equal(part, whole[begin:end])
    k, v = (
        x[torch.from_numpy(place).long()].repeat_interleave(heads // kv_heads, 1).transpose(0, 1)
        for x in (keys, values)
    )
    distance = torch.arange(length)[:, None] - torch.arange(length)[None]
    visible = (distance >= 0) & (distance < (window or length))
    expected = F.scaled_dot_product_attention(query.transpose(0, 1)[None], k[None], v[None], attn_mask=visible)
    assert torch.allclose(whole, expected[0].transpose(0, 1), atol=1e-5)


def gradients(
    f: Callable[..., torch.Tensor], inputs: list[torch.Tensor], direction: torch.Tensor
) -> list[torch.Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    return list(torch.autograd.grad((f(*leaves) * direction).sum(), leaves))


def assert_gradients(
    mine: Callable[..., torch.Tensor], theirs: Callable[..., torch.Tensor], inputs: list[torch.Tensor]
) -> None:
    """Equal to torch's for the same function, and to central differences along a random direction, each in turn."""
    direction = randn(*mine(*inputs).shape, seed=5)
    found = gradients(mine, inputs, direction)
    for gradient, expected in zip(found, gradients(theirs, inputs, direction), strict=True):
        assert torch.allclose(gradient, expected, rtol=1e-4, atol=1e-4)
    step = 1e-2
    for i, (x, gradient) in enumerate(zip(inputs, found, strict=True)):
        along = randn(*x.shape, seed=9)
        sides = [
            (mine(*inputs[:i], x + sign * step * along, *inputs[i + 1 :]).double() * direction).sum()
            for sign in (1, -1)
        ]
        slope = float((gradient.double() * along).sum())
        assert abs(float(sides[0] - sides[1]) / (2 * step) - slope) < 0.02 * max(1.0, abs(slope))


def test_gradients_of_the_linear_map() -> None:
    assert_gradients(operations.linear, F.linear, [randn(1, 9, 20), randn(6, 20), randn(6)])


def test_gradients_of_the_norm() -> None:
    for offset in (0.0, 1.0):
        assert_gradients(
            lambda x, w, offset=offset: operations.rms_norm(x, w, 1e-5, offset),
            lambda x, w, offset=offset: F.rms_norm(x, (24,), w + offset, 1e-5),
            [randn(2, 3, 24), randn(24)],
        )


def test_gradients_of_activations() -> None:
    assert_gradients(operations.silu, F.silu, [3 * randn(4, 10)])
    assert_gradients(operations.gelu_tanh, partial(F.gelu, approximate="tanh"), [3 * randn(4, 10)])


def test_gradients_of_the_rotation() -> None:
    cos, sin = randn(1, 5, 12), randn(1, 5, 12, seed=1)
    assert_gradients(
        lambda x: operations.rotate(x, cos, sin),
        lambda x: apply_rotary_pos_emb(x, x, cos, sin)[0],
        [randn(1, 3, 5, 12)],
    )


@pytest.mark.parametrize("window", [None, 4])
def test_gradients_of_packed_attention(window: int | None) -> None:
    (micro_batch,) = pack(make_samples(num_prompts=2), max_tokens_per_micro_batch=10_000).micro_batches[0]
    reference = ReferenceAttention(micro_batch, device=CPU)
    mine = PackedInvariantAttention(micro_batch, reference)
    rows = len(micro_batch.token_ids)
    options = {"scaling": 0.3, "sliding_window": window}
    assert_gradients(
        lambda q, k, v: mine.attend(0, q, k, v, **options),  # type: ignore[arg-type]
        lambda q, k, v: reference.attend(0, q, k, v, **options),  # type: ignore[arg-type]
        [randn(rows, 4, 16), randn(rows, 2, 16), randn(rows, 2, 16, seed=1)],
    )


class Clamped(nn.SiLU):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).clamp(max=1)


@pytest.mark.parametrize("kind", [nn.GELU, Clamped, lambda: nn.LayerNorm(128)])
def test_a_model_with_an_unknown_part_is_refused_by_the_parts_name(kind: Callable[[], nn.Module]) -> None:
    model = make_model("qwen2")
    model.model.layers[1].mlp.act_fn = kind()
    with pytest.raises(ConfigError, match=r"does not know \w+ \(model.layers.1.mlp.act_fn of Qwen2ForCausalLM\)"):
        InvariantModel(model)


def test_a_model_whose_layers_look_at_their_batch_is_refused() -> None:
    model = make_model("qwen2")
    mlp = model.model.layers[1].mlp

    class Sociable(type(mlp)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = super().forward(x)
            return out + 1e-3 * x.mean(1, keepdim=True)

    mlp.__class__ = Sociable
    with pytest.raises(ConfigError, match="was tried and failed: what Qwen2ForCausalLM computes"):
        InvariantModel(model)


def test_other_types_of_weights_are_refused() -> None:
    with pytest.raises(ConfigError, match="built for float32 weights on the CPU"):
        InvariantModel(make_model("qwen2").to(torch.bfloat16))


@pytest.mark.parametrize("vocab", [60, 3000])
def test_truncation_keeps_what_the_samplers_does(vocab: int) -> None:
    logits = 4 * randn(1, vocab)
    logits[0, 5:9] = logits.max()  # equal logits
    for sampling in (
        SamplingParams(max_new_tokens=1, top_k=6),
        SamplingParams(max_new_tokens=1, top_p=0.3, temperature=0.7),
        SamplingParams(max_new_tokens=1, top_p=0.9999, temperature=2.0),
        SamplingParams(max_new_tokens=1, min_p=0.05),
        SamplingParams(max_new_tokens=1, top_k=50, top_p=0.8, min_p=0.01),
    ):
        table = SamplingTable(1)
        table.set(0, sampling, 0)
        expected = truncated(logits, table, np.array([0]))[0].isfinite().numpy()
        mine = kept(
            logits[0].numpy(),
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
        )
        assert np.array_equal(mine, expected)
