"""The GPU's kernels on the CPU, under Triton's interpreter, against the slow references; a whole engine too.

test_triton_interpreted runs this file in a process of its own: what Triton itself defines is interpreted only where
that was asked for before Triton was imported.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

import tests.engines.embedded.interpreted  # before anything that imports Triton
from skyrl_train.engines.embedded import fused_runner, prefix_groups
from skyrl_train.engines.embedded import triton_elementwise as kernels
from skyrl_train.engines.embedded.prefix_groups import PrefixGroup, lay_out_tiles
from skyrl_train.engines.embedded.request import RequestState, Seats
from skyrl_train.engines.embedded.sampler import Sampler
from skyrl_train.engines.embedded.triton_attention import ragged_paged_attention
from skyrl_train.engines.embedded.triton_rules import RowRules, apply_rules
from skyrl_train.engines.embedded.triton_sampler import sample_and_summarise
from skyrl_train.engines.embedded.triton_shared_prefix import PrefixTiles, shared_prefix_attention, tile_rows
from skyrl_train.engines.embedded.uniforms import uniforms
from skyrl_train.types import Completion, GenerateRequest, LocalWeights, SamplingParams, WeightUpdate
from tests.engines.embedded.common import make_core, random_prompts, request, run
from tests.engines.embedded.test_twin import with_random_norms
from tests.gpu_cases import slow_attention
from tests.tiny import make_model

assert tests.engines.embedded.interpreted.IS_ON

slow = pytest.mark.slow


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [64, 96, 896])
@torch.no_grad()
def test_a_norm_and_a_norm_of_a_sum_equal_those_of_transformers(size: int) -> None:
    norm = Qwen3RMSNorm(size, eps=1e-5)
    norm.weight.copy_(random(size))
    x, residual = random(2, 5, size, seed=1)
    assert torch.allclose(kernels.rms_norm(x, norm.weight, 1e-5), norm(x), atol=2e-6)
    normed, total = kernels.add_rms_norm(x, residual, norm.weight, 1e-5)
    assert torch.equal(total, residual + x) and torch.allclose(normed, norm(total), atol=2e-6)


@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize("has_norm", [False, True])
@torch.no_grad()
def test_heads_are_normed_rotated_and_stored_as_transformers_does(head_dim: int, has_norm: bool) -> None:
    rows, heads, kv_heads = 5, 6, 2
    qkv = random(rows, (heads + 2 * kv_heads) * head_dim)
    sizes = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
    query, key, value = (x.view(rows, -1, head_dim) for x in torch.split(qkv, sizes, dim=1))
    norms = [Qwen3RMSNorm(head_dim, eps=1e-5) for _ in range(2)]
    for number, norm in enumerate(norms):
        norm.weight.copy_(random(head_dim, seed=number))
    cosines, sines = random(2, 40, head_dim, seed=3)
    positions, slots = torch.tensor([3, 39, 0, 7, 21]), torch.tensor([9, 1, 4, 3, 0])
    normed = (norms[0](query), norms[1](key)) if has_norm else (query, key)
    wanted = apply_rotary_pos_emb(
        *(x.transpose(0, 1)[None] for x in normed), cosines[positions][None], sines[positions][None]
    )
    expected_query, expected_key = (x[0].transpose(0, 1).clone() for x in wanted)
    keys, values = torch.zeros(2, 11, kv_heads, head_dim)
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
        norms=(norms[0].weight, 1e-5, norms[1].weight, 1e-5) if has_norm else None,
    )
    assert torch.allclose(query, expected_query, atol=2e-6)
    assert torch.allclose(keys[slots], expected_key, atol=2e-6) and torch.equal(values[slots], value)
    others = [slot for slot in range(11) if slot not in slots.tolist()]
    assert not keys[others].any() and not values[others].any()


def test_the_gate_takes_halves_of_one_product() -> None:
    both = random(3, 200) * 5
    out = kernels.silu_times(both[:, :100], both[:, 100:])
    assert torch.allclose(out, torch.nn.functional.silu(both[:, :100]) * both[:, 100:], atol=1e-6)


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "window", "num_splits", "prefix_splits"),
    [
        (8, 2, 16, 100, 2, 2),
        *(
            pytest.param(heads, kv_heads, size, window, *splits, marks=slow)
            for heads, kv_heads, size in ((14, 2, 64), (4, 4, 32))
            for window in (None, 100, 30)
            for splits in ((1, 1), (2, 4))
        ),
    ],
)
def test_a_prefix_read_once_gives_what_each_row_reads_alone(
    num_heads: int, num_kv_heads: int, head_dim: int, window: int | None, num_splits: int, prefix_splits: int
) -> None:
    rows, context = 13, 300
    generator = torch.Generator().manual_seed(0)
    slots = torch.randperm(rows * context, generator=generator).view(rows, context).int()
    groups = [PrefixGroup(length=130, rows=(0, 3, 4, 7, 8, 9, 10, 11, 12)), PrefixGroup(length=64, rows=(1, 2, 5, 6))]
    size = tile_rows(num_heads // num_kv_heads)
    for group in groups:
        slots[list(group.rows), : group.length] = slots[group.rows[0], : group.length].clone()
    seats = torch.randperm(rows, generator=generator).int()
    table = torch.empty_like(slots)
    table[seats.long()] = slots
    positions = torch.randint(131, context, (rows,), generator=generator).int()
    positions[1] = 64  # the first one behind its prefix
    keys, values = random(2, rows * context, num_kv_heads, head_dim, seed=1)
    query = random(num_heads, rows, head_dim, seed=2).transpose(0, 1)
    lengths, members, starts = (torch.from_numpy(x) for x in lay_out_tiles(groups, rows, size))
    got = shared_prefix_attention(
        query,
        keys,
        values,
        table,
        seats,
        positions,
        tiles=PrefixTiles(lengths=lengths, rows=members, row_starts=starts, num_splits=prefix_splits),
        num_splits=num_splits,
        scaling=head_dim**-0.5,
        sliding_window=window,
    )
    expected = slow_attention(query, keys, values, table, seats, positions, head_dim**-0.5, window)
    assert torch.allclose(got.double(), expected, atol=2e-6)
    alone = ragged_paged_attention(
        query,
        keys,
        values,
        table,
        seats,
        positions,
        blocks=None,
        num_splits=num_splits,
        scaling=head_dim**-0.5,
        sliding_window=window,
    )
    assert torch.allclose(alone.double(), expected, atol=2e-6)


TEMPERATURES = (0.0, 0.7, 1.5)
RULES: dict[str, dict[str, tuple[Any, ...]]] = {
    "top_k": {"top_k": (0, 1, 5, 40, 400)},
    "top_p": {"top_p": (1.0, 0.9, 0.5, 0.01)},
    "min_p": {"min_p": (0.0, 0.05, 0.5, 1.0)},
    "all three": {"top_k": (0, 1, 5, 40), "top_p": (1.0, 0.9, 0.5), "min_p": (0.0, 0.05, 0.3)},
    "penalties": {
        "repetition_penalty": (1.0, 1.3, 0.8),
        "presence_penalty": (0.0, 0.5),
        "frequency_penalty": (0.0, -0.4, 1.0),
    },
    "everything": {
        "min_new_tokens": (0, 20, 28),
        "repetition_penalty": (1.0, 1.5),
        "top_k": (0, 20),
        "top_p": (1.0, 0.8),
    },
}


@pytest.mark.parametrize(
    ("case", "ties"),
    [
        ("all three", True),
        ("everything", True),
        *(pytest.param(case, ties, marks=slow) for case in RULES for ties in (False, True)),
    ],
)
def test_rules_on_the_device_pick_what_the_host_picks(case: str, ties: bool) -> None:
    words, context, rows = 300, 60, 12
    rng = np.random.default_rng(len(case))
    seats = Seats(rows + 1, context, (3, 5))
    chosen = rng.permutation(rows + 1)[:rows]
    for number in range(rows + 1):
        prompt_len = int(rng.integers(1, context // 2))
        length = int(rng.integers(prompt_len, context - 1))
        options = {name: values[rng.integers(len(values))] for name, values in RULES[case].items()}
        sampling = SamplingParams(
            max_new_tokens=context - prompt_len,
            stop_token_ids=(7,),
            temperature=TEMPERATURES[rng.integers(len(TEMPERATURES))],
            **options,
        )
        text = rng.integers(0, words, length)
        asked = GenerateRequest(
            request_id=str(number), prompt_token_ids=tuple(text[:prompt_len].tolist()), sampling=sampling
        )
        state = RequestState(
            request=asked,
            order=number,
            seed=7 * number,
            tokens=text.astype(np.int32),
            logprobs=np.zeros(length, np.float32),
        )
        seats.take(state, np.zeros(0, np.int32))
    logits = random(rows, words, seed=len(case)) * 3
    if ties:
        logits = (logits * 2).round() / 2
    expected_tokens, expected_logprobs = Sampler(None).sample(logits, seats, chosen)

    table = seats.sampling

    def numbers(array: Any) -> torch.Tensor:
        return torch.from_numpy(array[chosen].astype(np.float64))

    def integers(array: Any) -> torch.Tensor:
        return torch.from_numpy(array[chosen].astype(np.int64))

    temperature = torch.from_numpy(table.temperature[chosen])
    uniform = torch.from_numpy(uniforms(table.key[chosen], (seats.length - seats.prompt_len)[chosen]))
    tokens, logprobs, block_max, block_sum = sample_and_summarise(logits, temperature, uniform)
    marks = torch.zeros(rows, words, dtype=torch.int32)
    apply_rules(
        logits,
        temperature,
        uniform,
        RowRules(
            top_k=integers(table.top_k),
            prompt_len=integers(seats.prompt_len),
            min_len=integers(seats.min_len),
            top_p=numbers(table.top_p),
            min_p=numbers(table.min_p),
            repetition=numbers(table.repetition),
            presence=numbers(table.presence),
            frequency=numbers(table.frequency),
        ),
        row_seats=torch.from_numpy(chosen),
        row_positions=integers(seats.length) - 1,
        seat_tokens=torch.from_numpy(seats.tokens),
        end_ids=torch.from_numpy(seats.stops.ids),
        marks=marks,
        block_max=block_max,
        block_sum=block_sum,
        tokens=tokens,
        logprobs=logprobs,
    )
    assert tokens.tolist() == expected_tokens.tolist()
    assert np.allclose(logprobs.numpy(), expected_logprobs, atol=2e-6)
    assert not marks.any()


def answers(prompts: Any, *, arch: str = "qwen2", max_new: int = 4, model: Any = None, **options: Any) -> Any:
    """Of an engine on the host's kernels and of the fused one, and the fused one's core."""
    kernel_options = {"cuda_kernels": "fused"}
    results: list[list[Completion]] = []
    for config in ({}, kernel_options):
        core = make_core(make_model(arch) if model is None else model, **config)
        requests = [
            request(f"r{i}", prompt, max_new, **{"seed": i, "temperature": 1.0, **options})
            for i, prompt in enumerate(prompts)
        ]
        results.append(run(core, requests))
    return *results, core


def assert_same(ours: list[Completion], theirs: list[Completion]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert (a.token_ids, a.finish_reason, a.stop_reason) == (b.token_ids, b.finish_reason, b.stop_reason)
        assert all(math.isclose(x, y, abs_tol=2e-5) for x, y in zip(a.logprobs, b.logprobs, strict=True))


PROMPTS = random_prompts(3, 17)


@pytest.mark.parametrize("arch", ["qwen3", pytest.param("qwen2", marks=slow)])
def test_a_fused_engine_answers_as_the_host_does_one_step_ahead(arch: str) -> None:
    plain, fused, core = answers(PROMPTS, model=with_random_norms(arch))
    assert_same(plain, fused)
    assert core._runner.lags and all(not form.has_rules for form in core._runner._steps)


@slow
@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 0.8, "repetition_penalty": 1.3, "frequency_penalty": 0.2},
        {"min_new_tokens": 3, "top_k": 20, "stop_token_ids": tuple(range(50))},
    ],
)
def test_sampling_rules_wait_for_nobody(options: Any) -> None:
    plain, fused, core = answers(PROMPTS, arch="llama", **options)
    assert_same(plain, fused)
    assert any(form.has_rules for form in core._runner._steps)
    assert not core._runner.must_settle()


@slow
def test_more_end_tokens_than_the_device_holds_are_drawn_by_the_host_beside_rows_one_step_ahead() -> None:
    plain, fused, _ = answers(PROMPTS, min_new_tokens=3, stop_token_ids=tuple(range(80)), top_k=20)
    assert_same(plain, fused)


@slow
@pytest.mark.parametrize("arch", ["mistral", "qwen2"])
def test_samples_of_one_prompt_read_it_together(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_runner, "MIN_SAVED_BYTES", 0)
    monkeypatch.setattr(prefix_groups, "MIN_LENGTH", 8)
    plain, fused, core = answers([random_prompts(20)[0]] * 5, arch=arch)
    assert_same(plain, fused)
    assert any(form.shares for form in core._runner._steps)


@slow
def test_new_weights_are_served_wherever_they_lie() -> None:
    model, prompts = make_model(), [(1, 2, 3)]
    core = make_core(model, cuda_kernels="fused")
    before = run(core, [request("a", prompts[0], 4)])
    for replace in (False, True):
        core.pause("keep")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if replace and name.endswith("k_proj.weight"):
                    owner = model.get_submodule(name.removesuffix(".weight"))
                    owner.weight = torch.nn.Parameter(-2 * parameter)
                else:
                    parameter.mul_(-0.5)
        core.update_weights(WeightUpdate(version=1, source=LocalWeights()))
        core.resume()
        after = run(core, [request("b", prompts[0], 4)])
        fresh = run(make_core(model), [request("c", prompts[0], 4)])
        assert_same(after, fresh)
        assert after[0].logprobs != before[0].logprobs
    assert core._runner.decoder.num_packed == 2


@slow
def test_a_bfloat16_engine_stays_within_its_rounding() -> None:
    model = make_model("qwen3").to(torch.bfloat16)
    done = run(make_core(model, cuda_kernels="fused"), [request("a", PROMPTS[1], 4, temperature=1.0, seed=1)])[0]
    reference = make_model("qwen3", attn_implementation="eager").to(torch.bfloat16)
    whole = torch.tensor([[*PROMPTS[1], *done.token_ids]])
    with torch.no_grad():
        logprobs = reference(whole).logits[0, len(PROMPTS[1]) - 1 : -1].float().log_softmax(-1)
    wanted = logprobs.gather(1, torch.tensor(done.token_ids)[:, None])[:, 0]
    assert torch.allclose(torch.tensor(done.logprobs), wanted, atol=0.25)
