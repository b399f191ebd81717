from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from skyrl_train.engines.embedded.native.build import load_native
from skyrl_train.engines.embedded.request import RequestState, Seats
from skyrl_train.engines.embedded.sampler import Sampler, penalised, truncated
from skyrl_train.engines.embedded.uniforms import derived_seed, key_of_seed, mix64, uniforms
from tests.engines.embedded.common import make_core, random_prompts, request, run
from tests.tiny import make_model

VOCAB = 11
LOGITS = torch.tensor([1.2, -0.3, 0.0, 2.1, -4.0, 0.7, 0.7, -1.1, 1.9, 0.1, -0.6])
SAMPLERS = {"native": lambda: Sampler(load_native()), "torch": lambda: Sampler(None)}


def seat_all(count: int, prompt: Sequence[int] = (1,), answer: Sequence[int] = (), **sampling: Any) -> Seats:
    """`count` requests with the same parameters, seeds 0, 1, 2, ..., that have `answer` already."""
    seats = Seats(count, context_len=len(prompt) + len(answer) + 8, eos_ids=(0,))
    for i in range(count):
        item = request(str(i), prompt, 1 + len(answer), **{"temperature": 1.0, **sampling})
        tokens = np.array((*prompt, *answer), dtype=np.int32)
        state = RequestState(
            request=item, order=i, seed=i, tokens=tokens, logprobs=np.zeros(len(tokens), dtype=np.float32)
        )
        seats.take(state, np.empty(0, dtype=np.int32))
    return seats


def expected_probabilities(temperature: float, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """A slow scalar account of what `SamplingParams` promises."""
    probs = (LOGITS.double() / temperature).softmax(-1).tolist()
    ranked = sorted(range(VOCAB), key=lambda i: (-probs[i], i))
    if top_k:
        ranked = ranked[:top_k]
    total, kept, mass = sum(probs[i] for i in ranked), [], 0.0
    for i in ranked:
        if mass < top_p * total:
            kept.append(i)
        mass += probs[i]
    kept = [i for i in kept if probs[i] >= min_p * probs[ranked[0]]]
    result = torch.zeros(VOCAB, dtype=torch.float64)
    for i in kept:
        result[i] = probs[i]
    return result / result.sum()


def assert_distributed_as(tokens: np.ndarray, expected: torch.Tensor) -> None:
    """Pearson's chi-square at a level of about 1e-4 (mean + 5 standard deviations of the statistic)."""
    counts = np.bincount(tokens, minlength=VOCAB).astype(float)
    wanted = expected.numpy() * len(tokens)
    possible = wanted > 0
    assert (counts[~possible] == 0).all()
    statistic = ((counts[possible] - wanted[possible]) ** 2 / wanted[possible]).sum()
    freedom = possible.sum() - 1
    assert statistic <= freedom + 5 * np.sqrt(2 * freedom) + 1e-9, (counts, wanted)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1.0, 0, 1.0, 0.0),
        (0.6, 0, 1.0, 0.0),
        (1.7, 0, 1.0, 0.0),
        (1.0, 4, 1.0, 0.0),
        (1.0, 1, 1.0, 0.0),
        (1.0, 0, 0.8, 0.0),
        (1.3, 0, 0.01, 0.0),
        (1.0, 0, 1.0, 0.15),
        (0.8, 7, 0.9, 0.1),
    ],
)
def test_samples_have_exactly_the_promised_distribution(
    sampler: str, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    n = 20_000
    seats = seat_all(n, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    tokens, logprobs = SAMPLERS[sampler]().sample(LOGITS.expand(n, VOCAB).contiguous(), seats, np.arange(n))
    assert_distributed_as(tokens, expected_probabilities(temperature, top_k, top_p, min_p))
    reference = (LOGITS / temperature).log_softmax(-1)[torch.from_numpy(tokens)]
    assert torch.allclose(torch.from_numpy(logprobs), reference, atol=1e-5)


def test_successive_numbers_of_one_seed_are_independent() -> None:
    """Pairs of neighbours of one stream are spread as the product of the marginals."""
    n = 40_000
    keys = np.full(n, key_of_seed(7), dtype=np.uint64)
    u = uniforms(keys, np.arange(n))
    cells = np.floor(u[:-1] * 8).astype(int) * 8 + np.floor(u[1:] * 8).astype(int)
    counts = np.bincount(cells, minlength=64)
    wanted = (n - 1) / 64
    assert ((counts - wanted) ** 2 / wanted).sum() < 63 + 5 * np.sqrt(2 * 63)


def test_uniforms_agree_with_a_scalar_account_and_neighbouring_seeds_differ() -> None:
    def mix(x: int) -> int:
        mask = 2**64 - 1
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    assert int(mix64(np.array([12345], dtype=np.uint64))[0]) == mix(12345)
    key = mix(3 ^ 0x5851F42D4C957F2D)
    assert key_of_seed(3) == key
    word = mix(key ^ mix((5 * 0x9E3779B97F4A7C15) & (2**64 - 1)))
    assert uniforms(np.array([key], dtype=np.uint64), np.array([4]))[0] == (word >> 11) * 2.0**-53
    assert len({derived_seed(seed, i) for seed in range(30) for i in range(30)}) == 900
    assert key_of_seed(-1) == key_of_seed(2**64 - 1)


@pytest.mark.parametrize("vocab", [1, 15, 16, 17, 63, 64, 65, 1000, 4096])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_native_and_torch_choose_the_same_tokens(vocab: int, scale: float) -> None:
    n = 500
    seats = seat_all(n)
    seats.sampling.temperature[:] = np.random.default_rng(0).choice([0.0, 0.5, 1.0, 2.0], n)
    logits = torch.randn(n, vocab, generator=torch.Generator().manual_seed(vocab)) * scale
    logits[:, ::3] = -torch.inf if vocab > 1 else 0.0
    native, torch_one = (make().sample(logits, seats, np.arange(n)) for make in SAMPLERS.values())
    # A uniform number may fall between the two roundings of one cumulative sum, once in about 1e7 draws.
    assert np.array_equal(native[0], torch_one[0])
    assert np.allclose(native[1], torch_one[1], atol=1e-5)
    assert torch.isfinite(logits[torch.arange(n), torch.from_numpy(native[0])]).all()


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2.0**-53])
def test_extreme_uniforms_never_choose_an_impossible_token(sampler: str, uniform: float) -> None:
    logits = torch.full((1, 200), -torch.inf)
    logits[0, [70, 90, 130]] = torch.tensor([0.0, 3.0, -1.0])
    pick = SAMPLERS[sampler]()._pick
    tokens, _ = pick(logits, logits, np.ones(1, dtype=np.float32), np.array([uniform]))
    assert tokens[0] == (70 if uniform == 0 else 130)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_logits_that_are_not_finite_raise(sampler: str) -> None:
    logits = torch.zeros(2, VOCAB)
    logits[1, 3] = torch.nan
    with pytest.raises(FloatingPointError, match="request 1 are not finite"):
        SAMPLERS[sampler]().sample(logits, seat_all(2), np.arange(2))


@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_the_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    prompt, answer = (3, 5, 5), (8, 0)
    seats = seat_all(1, prompt, answer, repetition_penalty=penalty, temperature=0.0)
    found = penalised(LOGITS[None].clone(), seats, np.array([0]), seats.length[:1])
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    expected = processor(torch.tensor([[*prompt, *answer]]), LOGITS[None].clone())
    assert torch.allclose(found, expected)


def test_presence_and_frequency_count_the_answer_only() -> None:
    seats = seat_all(2, (3, 5, 5), (8, 8, 0), presence_penalty=0.5, frequency_penalty=0.25)
    seats.sampling.penalises[1] = False
    found = penalised(LOGITS.expand(2, VOCAB).clone(), seats, np.arange(2), seats.length[:2])
    expected = LOGITS.clone()
    expected[8] -= 0.5 + 2 * 0.25
    expected[0] -= 0.5 + 0.25
    assert torch.allclose(found[0], expected)
    assert torch.equal(found[1], LOGITS)


@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [(3, 1.0, 0.0), (0, 0.7, 0.0), (0, 1.0, 0.2), (6, 0.85, 0.1)])
def test_truncation_keeps_the_tokens_that_transformers_keeps(top_k: int, top_p: float, min_p: float) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(50, VOCAB, generator=generator) * 2
    seats = seat_all(50, temperature=0.8, top_k=top_k, top_p=top_p, min_p=min_p)
    found = truncated(logits, seats.sampling, np.arange(50))
    warpers = LogitsProcessorList([TemperatureLogitsWarper(0.8)])
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [MinPLogitsWarper(min_p)] if min_p else []
    expected = warpers(torch.zeros(50, 1, dtype=torch.long), logits.clone())
    assert torch.equal(torch.isfinite(found), torch.isfinite(expected))
    assert torch.equal(found[torch.isfinite(found)], logits[torch.isfinite(found)])


@pytest.mark.parametrize("spread", [0.0, 0.001, 1.0, 8.0])
def test_truncation_of_a_large_vocabulary_is_that_of_a_full_sort(spread: float) -> None:
    """Flat rows need more than a few candidates; rows of equal logits have ties everywhere."""
    n, vocab = 24, 5000
    logits = (torch.randn(n, vocab, generator=torch.Generator().manual_seed(2)) * spread).round(decimals=2)
    seats = seat_all(n)
    table, rng = seats.sampling, np.random.default_rng(3)
    table.temperature[:] = rng.choice([0.7, 1.5], n)
    table.top_k[:] = rng.choice([0, 1, 511, 512, 513, 3000], n)
    table.top_p[:] = rng.choice([1.0, 0.2, 0.95], n)
    table.min_p[:] = rng.choice([0.0, 0.05], n)
    table.truncates[:] = True
    found = torch.isfinite(truncated(logits, table, np.arange(n)))
    for row in range(n):
        k, p, min_p = int(table.top_k[row]), float(table.top_p[row]), float(table.min_p[row])
        weight = ((logits[row] - logits[row].max()).double() / float(table.temperature[row])).exp().tolist()
        ranked = sorted(range(vocab), key=lambda i, weight=weight: (-weight[i], i))[: k or vocab]
        total, mass, kept = sum(weight[i] for i in ranked), 0.0, set()
        for i in ranked:
            if (p >= 1 or mass < p * total) and weight[i] >= min_p:
                kept.add(i)
            mass += weight[i]
        # A sum in another order may round differently, at the very edge of top-p.
        assert len(set(found[row].nonzero()[:, 0].tolist()) ^ kept) <= (1 if p < 1 else 0)


def test_equal_logits_are_truncated_to_exactly_k() -> None:
    found = truncated(torch.zeros(1, VOCAB), seat_all(1, top_k=3).sampling, np.array([0]))
    assert torch.isfinite(found)[0].nonzero()[:, 0].tolist() == [0, 1, 2]


def test_a_seed_gives_the_same_answer_in_any_company() -> None:
    prompts = random_prompts(9, 14, 3, 22, 9)
    alone = [
        run(make_core(), [request("x", prompt, 20, temperature=1.0, seed=100 + i, ignore_eos=True)])[0].token_ids
        for i, prompt in enumerate(prompts)
    ]
    crowd = [
        request(str(i), prompt, 20, temperature=1.0, seed=100 + i, ignore_eos=True) for i, prompt in enumerate(prompts)
    ]
    others = [request(f"o{i}", prompt, 7, temperature=1.5, top_k=5) for i, prompt in enumerate(random_prompts(5, 6, 7))]
    assert [answer.token_ids for answer in run(make_core(), [*others, *crowd])[3:]] == alone


def test_requests_without_a_seed_differ_and_the_engine_seed_repeats_them() -> None:
    (prompt,) = random_prompts(6)
    requests = [request(str(i), prompt, 12, temperature=1.0, ignore_eos=True) for i in range(4)]

    def answers(seed: int) -> list[tuple[int, ...]]:
        return [answer.token_ids for answer in run(make_core(make_model(), seed=seed), requests)]

    first = answers(1)
    assert len(set(first)) == 4
    assert answers(1) == first
    assert answers(2) != first


def test_sampled_answers_have_the_distribution_of_the_model() -> None:
    """Two tokens deep, on a vocabulary of 8: the engine as a whole against exact probabilities."""
    model = make_model(vocab_size=8, eos_token_id=None, pad_token_id=None, initializer_range=0.4)
    eager = make_model(
        vocab_size=8, eos_token_id=None, pad_token_id=None, initializer_range=0.4, attn_implementation="eager"
    )
    core = make_core(model, max_num_seqs=256, max_num_batched_tokens=512, kv_cache_tokens=2048, max_context_len=8)
    n = 4000
    answers = run_fast(
        core, [request(str(i), (1, 2, 3), 2, temperature=1.0, seed=i, ignore_eos=True) for i in range(n)]
    )
    counts = np.zeros((8, 8))
    for first, second in answers:
        counts[first, second] += 1
    with torch.no_grad():
        starts = torch.tensor([[1, 2, 3, first] for first in range(8)])
        logits = eager(input_ids=starts).logits.double()
    probs = (logits[0, 2].softmax(-1)[:, None] * logits[:, 3].softmax(-1)).numpy()
    wanted = probs * n
    common = wanted > 5
    statistic = ((counts - wanted) ** 2 / wanted)[common].sum()
    freedom = common.sum() - 1
    assert statistic < freedom + 5 * np.sqrt(2 * freedom)


def run_fast(core: Any, requests: list[Any]) -> list[tuple[int, ...]]:
    """`run` without integrity checks, which would take most of the time here."""
    for item in requests:
        core.add(item)
    done = {}
    while core.has_work:
        done |= {item.completion.request_id: item.completion.token_ids for item in core.step()}
    return [done[item.request_id] for item in requests]
