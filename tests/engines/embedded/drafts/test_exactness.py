"""Whoever guesses, and however well: answers, log-probabilities and reasons are those without guesses."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest

from skyrl_train.engines.embedded.drafts.base import Drafter
from skyrl_train.types import Completion, GenerateRequest
from tests.engines.embedded.common import make_core, request, run
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
