"""The fused engine's kernels in bfloat16 on the device that they are for; on the CPU they are tested interpreted."""

import numpy as np
import pytest
import torch
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

from skyrl_train.engines.embedded import triton_elementwise as kernels
from skyrl_train.engines.embedded.prefix_groups import PrefixGroup, lay_out_tiles
from skyrl_train.engines.embedded.request import RequestState, Seats
from skyrl_train.engines.embedded.sampler import Sampler
from skyrl_train.engines.embedded.triton_rules import RowRules, apply_rules
from skyrl_train.engines.embedded.triton_sampler import sample_and_summarise
from skyrl_train.engines.embedded.triton_shared_prefix import PrefixTiles, shared_prefix_attention, tile_rows
from skyrl_train.engines.embedded.uniforms import uniforms
from skyrl_train.types import GenerateRequest, SamplingParams
from tests.gpu_cases import slow_attention

pytestmark = pytest.mark.gpu

TYPES = (torch.bfloat16, torch.float32)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", [896, 3584])
@torch.no_grad()
def test_norms_equal_those_of_transformers_to_the_rounding(dtype: torch.dtype, size: int) -> None:
    torch.manual_seed(0)
    norm = Qwen3RMSNorm(size, eps=1e-6).to("cuda", dtype)
    norm.weight.copy_(torch.randn(size))
    x, residual = torch.randn(2, 300, size, device="cuda").to(dtype)
    normed, total = kernels.add_rms_norm(x, residual, norm.weight, 1e-6)
    assert torch.equal(total, residual + x)
    # Sums in another order may turn a rounding, of few numbers.
    for got, wanted in ((normed, norm(total)), (kernels.rms_norm(x, norm.weight, 1e-6), norm(x))):
        assert relative(got, wanted) < 1e-3
        assert dtype == torch.float32 or float((got != wanted).float().mean()) < 0.01


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(14, 2, 64), (28, 4, 128), (8, 1, 80)])
@pytest.mark.parametrize("has_norm", [False, True])
@torch.no_grad()
def test_heads_are_normed_rotated_and_stored(dtype, heads, kv_heads, head_dim, has_norm) -> None:
    torch.manual_seed(0)
    rows, context = 300, 500
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * head_dim, device="cuda").to(dtype)
    sizes = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
    query, key, value = (x.view(rows, -1, head_dim) for x in torch.split(qkv, sizes, dim=1))
    norms = [Qwen3RMSNorm(head_dim, eps=1e-6).to("cuda", dtype) for _ in range(2)]
    for norm in norms:
        norm.weight.copy_(torch.randn(head_dim))
    angles = torch.randn(context, head_dim // 2, device="cuda")
    cosines, sines = (torch.cat((x, x), -1).to(dtype) for x in (angles.cos(), angles.sin()))
    positions = torch.randint(0, context, (rows,), device="cuda")
    slots = torch.randperm(1000, device="cuda")[:rows]
    normed = (norms[0](query), norms[1](key)) if has_norm else (query, key)
    wanted = apply_rotary_pos_emb(
        *(x.transpose(0, 1)[None] for x in normed), cosines[positions][None], sines[positions][None]
    )
    expected_query, expected_key = (x[0].transpose(0, 1).clone() for x in wanted)
    keys, values = torch.zeros(2, 1001, kv_heads, head_dim, device="cuda", dtype=dtype)
    kernels.rotate_and_store(
        query,
        key,
        value,
        keys=keys,
        values=values,
        row_slots=slots,
        row_positions=positions.int(),
        cosines=cosines,
        sines=sines,
        norms=(norms[0].weight, 1e-6, norms[1].weight, 1e-6) if has_norm else None,
    )
    assert relative(query, expected_query) < 2e-3 and relative(keys[slots], expected_key) < 2e-3
    assert torch.equal(values[slots], value)


@pytest.mark.parametrize("dtype", TYPES)
def test_the_gate_equals_torchs(dtype: torch.dtype) -> None:
    both = (torch.randn(300, 2 * 4864, device="cuda") * 4).to(dtype)
    gate, up = both.chunk(2, dim=1)
    assert relative(kernels.silu_times(gate, up), torch.nn.functional.silu(gate) * up) < 1e-3


@pytest.mark.parametrize(
    ("dtype", "num_heads", "num_kv_heads", "head_dim", "window", "num_splits", "prefix_splits"),
    [
        (torch.bfloat16, 14, 2, 64, None, 1, 1),
        (torch.bfloat16, 14, 2, 64, 100, 2, 8),
        (torch.bfloat16, 28, 4, 128, None, 1, 4),
        (torch.bfloat16, 4, 4, 32, None, 2, 8),
        (torch.float32, 4, 4, 32, 100, 1, 4),
    ],
)
def test_a_prefix_read_once_gives_what_each_row_reads_alone(
    dtype, num_heads, num_kv_heads, head_dim, window, num_splits, prefix_splits
) -> None:
    torch.manual_seed(0)
    rows, context = 40, 700
    slots = torch.randperm(rows * context, device="cuda").view(rows, context).int()
    groups = [PrefixGroup(length=400, rows=tuple(range(0, 38, 2))), PrefixGroup(length=64, rows=(1, 3, 5, 7))]
    for group in groups:
        slots[list(group.rows), : group.length] = slots[group.rows[0], : group.length].clone()
    seats = torch.arange(rows, device="cuda", dtype=torch.int32)
    positions = torch.randint(401, context, (rows,), device="cuda", dtype=torch.int32)
    keys, values = torch.randn(2, rows * context, num_kv_heads, head_dim, device="cuda").to(dtype)
    query = torch.randn(rows, num_heads, head_dim, device="cuda").to(dtype)
    size = tile_rows(num_heads // num_kv_heads)
    lengths, members, starts = (torch.from_numpy(x).cuda() for x in lay_out_tiles(groups, rows, size))
    got = shared_prefix_attention(
        query,
        keys,
        values,
        slots,
        seats,
        positions,
        tiles=PrefixTiles(lengths=lengths, rows=members, row_starts=starts, num_splits=prefix_splits),
        num_splits=num_splits,
        scaling=head_dim**-0.5,
        sliding_window=window,
    )
    expected = slow_attention(query, keys, values, slots, seats, positions, head_dim**-0.5, window)
    assert relative(got, expected) < (1e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    "options",
    [
        {"top_k": (0, 1, 5, 40, 2000)},
        {"top_p": (1.0, 0.9, 0.5, 0.01)},
        {"min_p": (0.0, 0.05, 0.5)},
        {"top_k": (0, 40), "top_p": (1.0, 0.9), "min_p": (0.0, 0.05)},
        {"repetition_penalty": (1.0, 1.3), "presence_penalty": (0.0, 0.5), "frequency_penalty": (0.0, 0.4)},
        {"min_new_tokens": (0, 200), "repetition_penalty": (1.0, 1.3), "top_p": (1.0, 0.9)},
    ],
)
@pytest.mark.parametrize("words", [5000, 151_936])
def test_rules_pick_what_the_hosts_sampler_picks(dtype: torch.dtype, options, words: int) -> None:
    rng = np.random.default_rng(0)
    rows, context = 64, 400
    seats = Seats(rows, context, (3, 5))
    chosen = np.arange(rows)
    for number in range(rows):
        prompt_len = int(rng.integers(1, 150))
        length = int(rng.integers(prompt_len, context - 1))
        sampling = SamplingParams(
            max_new_tokens=context - prompt_len,
            temperature=(0.0, 0.7, 1.3)[rng.integers(3)],
            **{name: values[rng.integers(len(values))] for name, values in options.items()},
        )
        text = rng.integers(0, words, length)
        asked = GenerateRequest(
            request_id=str(number), prompt_token_ids=tuple(text[:prompt_len].tolist()), sampling=sampling
        )
        state = RequestState(
            request=asked, order=number, seed=number, tokens=text.astype(np.int32), logprobs=np.zeros(length, "f4")
        )
        seats.take(state, np.zeros(0, np.int32))
    torch.manual_seed(0)
    logits = (torch.randn(rows, words, device="cuda") * 3).to(dtype)
    wanted_tokens, wanted_logprobs = Sampler(None).sample(logits.float().cpu(), seats, chosen)
    table = seats.sampling
    names = ("top_p", "min_p", "repetition", "presence", "frequency")
    temperature = torch.from_numpy(table.temperature).cuda()
    uniform = torch.from_numpy(uniforms(table.key, seats.length - seats.prompt_len)).cuda()
    tokens, logprobs, block_max, block_sum = sample_and_summarise(logits, temperature, uniform)
    marks = torch.zeros(rows, words, dtype=torch.int32, device="cuda")
    apply_rules(
        logits,
        temperature,
        uniform,
        RowRules(
            top_k=torch.from_numpy(table.top_k).cuda().long(),
            prompt_len=torch.from_numpy(seats.prompt_len).cuda().long(),
            min_len=torch.from_numpy(seats.min_len).cuda().long(),
            **{name: torch.from_numpy(getattr(table, name)).cuda().double() for name in names},
        ),
        row_seats=torch.arange(rows, device="cuda"),
        row_positions=torch.from_numpy(seats.length - 1).cuda(),
        seat_tokens=torch.from_numpy(seats.tokens).cuda(),
        end_ids=torch.from_numpy(seats.stops.ids).cuda(),
        marks=marks,
        block_max=block_max,
        block_sum=block_sum,
        tokens=tokens,
        logprobs=logprobs,
    )
    same = tokens.cpu().numpy() == wanted_tokens
    assert same.mean() >= 1 - 2 / rows, np.nonzero(~same)  # float32 sums may turn one at a boundary
    assert np.allclose(logprobs.cpu().numpy()[same], wanted_logprobs[same], atol=5e-5)
    assert not marks.any()
