"""Whoever guesses, and however well: answers, log-probabilities and reasons are those without guesses."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from skyrl_train.engines.embedded.core import EngineCore
from skyrl_train.engines.embedded.drafts.base import Drafter, Drafts, FollowedRows, Indices, Ints
from skyrl_train.engines.embedded.request import Seats
from skyrl_train.errors import ConfigError
from skyrl_train.types import Completion, GenerateRequest
from tests.engines.embedded.common import logits_reference, make_core, request, run
from tests.engines.embedded.drafts.drafters import Knowing, RandomTrees, source
from tests.tiny import make_model

Answers = Mapping[str, Sequence[int]]
DRAFTERS: dict[str, Callable[[Answers], Drafter]] = {
    "right": lambda answers: Knowing(answers, 5),
    "often right": lambda answers: Knowing(answers, 5, wrong_each=3),
    "wrong": lambda answers: Knowing(answers, 3, wrong_each=1),
    "trees": lambda answers: RandomTrees(answers, 7, seed=0),
    "trees at random": lambda answers: RandomTrees({}, 6, seed=1),
}
CONTEXT = 90


def random_requests(seed: int, count: int) -> list[GenerateRequest]:
    rng = random.Random(seed)
    prompts = [[rng.randrange(256) for _ in range(rng.randint(3, 25))] for _ in range(3)]
    requests = []
    for number in range(count):
        shared = rng.choice(prompts)
        prompt = shared[: rng.randint(1, len(shared))] + [rng.randrange(256) for _ in range(rng.randint(0, 5))]
        max_new = rng.randint(1, CONTEXT - len(prompt))
        requests.append(
            request(
                str(number),
                prompt,
                max_new,
                priority=rng.randint(-1, 1),
                temperature=rng.choice([0.0, 1.0, 0.7]),
                seed=rng.randrange(100),
                top_k=rng.choice([0, 0, 5]),
                top_p=rng.choice([1.0, 0.9]),
                repetition_penalty=rng.choice([1.0, 1.0, 1.2]),
                frequency_penalty=rng.choice([0.0, 0.0, 0.3]),
                min_new_tokens=rng.choice([0, 0, min(6, max_new)]),
                stop_token_ids=tuple(rng.sample(range(256), rng.choice([0, 3, 12]))),
                stop=rng.choice([(), (), ("a", "Z", "7"), ("e",)]),
                ignore_eos=rng.random() < 0.5,
            )
        )
    return requests


def assert_same(found: Completion, wanted: Completion) -> None:
    """But for the id and the cached tokens."""
    assert found.token_ids == wanted.token_ids
    assert (found.finish_reason, found.stop_reason) == (wanted.finish_reason, wanted.stop_reason)
    assert found.versions == wanted.versions
    np.testing.assert_allclose(found.logprobs, wanted.logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize("attention", ["auto", "reference"])
def test_answers_are_those_without_guesses(name: str, attention: str) -> None:
    model = make_model()
    requests = random_requests(3, 14)
    wanted = run(make_core(model, attention_backend=attention), requests)
    answers = {item.request_id: item.token_ids for item in wanted}
    core = make_core(
        model, drafts=source(DRAFTERS[name](answers)), attention_backend=attention, max_num_batched_tokens=48
    )
    for found, right in zip(run(core, requests), wanted, strict=True):
        assert_same(found, right)
    assert core.speculation is not None
    accept_len = core.stats().accept_len
    assert accept_len is not None and core.speculation.counts.verifications > 0
    if name == "right":
        assert accept_len > 3
    elif name == "wrong":
        assert accept_len == 1
    elif name != "trees at random":
        assert 1.3 < accept_len < 6


def test_sampled_answers_have_the_models_odds() -> None:
    """Three tokens of a vocabulary of few words, guessed right and wrong: all that can be said, as often as it should.

    No seeds: each request draws its own numbers.
    """
    words = 6
    model = make_model(vocab_size=words, eos_token_id=None, pad_token_id=None, initializer_range=0.3)
    prompt = (1, 2, 3)
    odds: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        longer = {}
        for answer, chance in odds.items():
            row = logits_reference(make_reference(words), (*prompt, *answer))[-1].softmax(-1)
            longer |= {(*answer, word): chance * float(row[word]) for word in range(words)}
        odds = longer
    core = make_core(
        model,
        drafts=source(RandomTrees({}, 6, seed=4, num_words=words)),
        max_num_seqs=64,
        max_num_batched_tokens=512,
        kv_cache_tokens=4096,
    )
    items = [request(str(i), prompt, 3, temperature=1.0) for i in range(3000)]
    counts = Counter(item.token_ids for item in run_fast(core, items))
    expected = {answer: chance * len(items) for answer, chance in odds.items()}
    common = [answer for answer, number in expected.items() if number >= 8]
    chi_square = sum((counts[answer] - expected[answer]) ** 2 / expected[answer] for answer in common)
    freedom = len(common)
    assert freedom > 30 and abs(chi_square - freedom) < 5 * (2 * freedom) ** 0.5
    accept_len = core.stats().accept_len
    assert accept_len is not None and 1.1 < accept_len < 3


def make_reference(words: int) -> PreTrainedModel:
    return make_model(
        vocab_size=words, eos_token_id=None, pad_token_id=None, initializer_range=0.3, attn_implementation="eager"
    )


def run_fast(core: EngineCore, items: Sequence[GenerateRequest]) -> list[Completion]:
    """Without a look at the owners of slots in each step."""
    for item in items:
        core.add(item)
    done = []
    while core.has_work:
        done += [finished.completion for finished in core.step()]
    return done


def test_deterministic_answers_have_the_same_bits_with_guesses() -> None:
    model = make_model()
    requests = random_requests(5, 8)
    wanted = run(make_core(model, deterministic=True), requests)
    answers = {item.request_id: item.token_ids for item in wanted}
    drafts = source(RandomTrees(answers, 5, seed=6))
    core = make_core(model, drafts=drafts, deterministic=True, max_num_batched_tokens=48)
    for found, right in zip(run(core, requests), wanted, strict=True):
        assert (found.token_ids, found.logprobs) == (right.token_ids, right.logprobs)


@pytest.mark.parametrize("arch", ["gemma3_text", "qwen3"])
def test_layers_with_windows_see_their_own_branch(arch: str) -> None:
    model = make_model(arch, sliding_window=8) if arch == "gemma3_text" else make_model(arch)
    requests = random_requests(6, 8)
    wanted = run(make_core(model), requests)
    answers = {item.request_id: item.token_ids for item in wanted}
    core = make_core(model, drafts=source(RandomTrees(answers, 6, seed=7)), max_num_batched_tokens=48)
    for found, right in zip(run(core, requests), wanted, strict=True):
        assert_same(found, right)


class Tapping(Knowing):
    """Keeps what it is shown of the layers, by position of one request's tokens."""

    def __init__(self, taps: tuple[int, ...]) -> None:
        super().__init__({}, 2)
        self.taps = taps
        self.seen: dict[int, torch.Tensor] = {}

    def propose(self, seats: Seats, chosen: Indices, room: Ints) -> Drafts:
        nothing = np.zeros((len(chosen), 1), dtype=np.int32)
        return Drafts(tokens=nothing, parents=nothing - 1, counts=np.zeros(len(chosen), dtype=np.int32))

    def follow(self, rows: FollowedRows) -> None:
        assert rows.hidden is not None
        for position, row in zip(rows.batch.row_positions.tolist(), rows.hidden, strict=True):
            self.seen[position] = row.clone()


def test_tapped_layers_are_those_of_the_model_which_knows_nothing_of_it() -> None:
    model = make_model()
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    drafter = Tapping((-1, 0, 2))
    core = make_core(model, drafts=source(drafter))
    prompt = (5, 6, 7, 8, 9)
    answer = run(core, [request("a", prompt, 4)])[0].token_ids
    tokens = torch.tensor([[*prompt, *answer[:-1]]])
    with torch.no_grad():
        states = make_model(attn_implementation="eager")(input_ids=tokens, output_hidden_states=True).hidden_states
    wanted = torch.cat([states[0], states[1], states[2]], dim=-1)[0]
    torch.testing.assert_close(
        torch.stack([drafter.seen[i] for i in range(tokens.shape[1])]), wanted, atol=1e-4, rtol=0
    )
    for name, module in model.named_modules():
        assert module.__dict__.keys() == before[name].keys() and not module._forward_hooks


def test_taps_of_layers_that_are_not_there_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"reads layers \[9\] of a model that has 2"):
        make_core(drafts=source(Tapping((0, 9))))
