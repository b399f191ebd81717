"""Deterministic inference: a request's tokens and log-probabilities are the same bits whatever happens around it.

The judge is the same request alone on an engine with room for it, its prompt computed at once, on one thread.
Everything is compared with ==.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from skyrl_train.engines.embedded.core import EngineCore
from skyrl_train.engines.embedded.drafts.base import DraftSource
from skyrl_train.engines.embedded.drafts.build import ngram_source
from skyrl_train.engines.embedded.drafts.eagle.drafter import EagleSettings
from skyrl_train.engines.embedded.drafts.eagle.source import eagle_source
from skyrl_train.engines.embedded.drafts.ngram import NgramSettings
from skyrl_train.errors import ConfigError
from skyrl_train.types import Completion, GenerateRequest, LocalWeights, SessionRef, WeightUpdate
from tests.engines.embedded.common import make_core, random_prompts, request, run
from tests.engines.embedded.drafts.drafters import Knowing, RandomTrees, source
from tests.engines.embedded.test_eagle import make_head
from tests.engines.embedded.test_partial import first_tokens
from tests.tiny import make_model

MODEL = make_model("qwen3", head_dim=32, vocab_size=2100)
"""A vocabulary in which top-p looks at a part first."""
WINDOWED = make_model("mistral", sliding_window=21, num_hidden_layers=1)

Answer = tuple[tuple[int, ...], tuple[float, ...]]


@pytest.fixture(autouse=True)
def _same_threads_afterwards() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def roomy(model: torch.nn.Module, **config: object) -> EngineCore:
    settings = {"deterministic": True, "kv_cache_tokens": 4096, "max_num_batched_tokens": 512}
    return make_core(model, **{**settings, **config})


def bits(answer: Completion) -> Answer:
    return answer.token_ids, answer.logprobs


def alone(model: torch.nn.Module, item: GenerateRequest) -> Answer:
    """Nothing cached, nobody else, one chunk, one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return bits(run(roomy(model), [item])[0])
    finally:
        torch.set_num_threads(before)


def random_requests(rng: random.Random, count: int) -> list[GenerateRequest]:
    """Prompts of 1 to 70 tokens that share their beginnings; all kinds of sampling; answers of up to 24 tokens."""
    shared = [[rng.randrange(256) for _ in range(60)] for _ in range(2)]
    return [
        request(
            str(i),
            [*rng.choice(shared)[: rng.randint(0, 60)], *(rng.randrange(256) for _ in range(rng.randint(1, 10)))],
            rng.randint(1, 24),
            priority=rng.randint(-1, 1),
            temperature=rng.choice([0.0, 0.7, 1.0]),
            seed=rng.randrange(100),
            top_k=rng.choice([0, 0, 5]),
            top_p=rng.choice([1.0, 1.0, 0.8]),
            repetition_penalty=rng.choice([1.0, 1.0, 1.2]),
            ignore_eos=True,
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_the_same_request_gives_the_same_bits_alone_or_in_any_batch(seed: int, num_threads: int) -> None:
    rng = random.Random(seed)
    model = WINDOWED if seed == 3 else MODEL
    requests = random_requests(rng, 12)
    expected = {item.request_id: alone(model, item) for item in requests}
    torch.set_num_threads(num_threads)
    for trial in range(3):
        core = make_core(
            model,
            deterministic=True,
            # Room for all, and so little that requests are retracted and prefixes evicted.
            kv_cache_tokens=rng.choice([1000, 130]),
            max_num_seqs=rng.choice([2, 5, 12]),
            max_num_batched_tokens=rng.choice([12, 17, 64, 300]),
            enable_prefix_caching=trial < 2,
            pack_weights=rng.random() < 0.6,
            chunked_prefill=rng.random() < 0.8,
        )
        rng.shuffle(requests)
        for _ in range(2):  # the second time on what the first one cached
            found = {answer.request_id: bits(answer) for answer in run(core, requests)}
            assert found == expected


def test_requests_that_are_retracted_while_they_decode() -> None:
    requests = [
        request(str(i), prompt, 60, temperature=1.0, seed=i, ignore_eos=True)
        for i, prompt in enumerate(random_prompts(3, 4, 5, 6, 7))
    ]
    core = make_core(MODEL, deterministic=True, kv_cache_tokens=130, max_num_seqs=5)
    assert [bits(answer) for answer in run(core, requests)] == [alone(MODEL, item) for item in requests]
    assert core.stats().num_retractions_total > 0 and core.stats().num_evicted_tokens_total > 0


@pytest.mark.parametrize("arch", ["qwen2", "llama", "mistral", "olmo2", "phi3", "gemma3_text"])
def test_other_architectures(arch: str) -> None:
    model = make_model(arch)
    requests = random_requests(random.Random(5), 6)
    answers = run(make_core(model, deterministic=True, max_num_batched_tokens=9, kv_cache_tokens=600), requests)
    assert [bits(answer) for answer in answers] == [alone(model, item) for item in requests]


def test_a_turn_of_a_session_has_the_bits_of_the_whole_prompt() -> None:
    core = roomy(MODEL, max_num_batched_tokens=16)
    session, whole, parent = core.sessions.open(128), (), None
    for number, new in enumerate(random_prompts(20, 7, 1, 30)):
        item = request(f"t{number}", new, 8, temperature=1.0, seed=number, ignore_eos=True)
        ref = SessionRef(session_id=session, parent_request_id=parent)
        (answer,) = run(core, [replace(item, session=ref)])
        whole += new
        assert bits(answer) == alone(MODEL, request("alone", whole, 8, temperature=1.0, seed=number, ignore_eos=True))
        whole, parent = whole + answer.token_ids, item.request_id


def test_a_request_that_weights_were_updated_under_goes_on_to_the_same_bits() -> None:
    """The update is none: its keys are gone, its tokens stay, and are computed again as one prompt."""
    item = request("a", range(30), 40, temperature=1.0, seed=3, ignore_eos=True)
    core = roomy(MODEL)
    core.add(item)
    done = []
    for step in range(60):
        if step in (1, 13, 30):
            core.pause("keep")
            core.update_weights(WeightUpdate(version=core.policy_version + 1, source=LocalWeights()))
            core.resume()
        done += core.step() if core.has_work else []
    assert bits(done[0].completion) == alone(MODEL, item)


def test_an_answer_that_was_begun_elsewhere_goes_on_to_the_same_bits() -> None:
    item = request("a", range(30), 20, temperature=1.0, seed=3, ignore_eos=True)
    (whole,) = run(roomy(MODEL), [item])
    for count in (1, 13):
        begun = replace(item, partial=first_tokens(whole, count))
        assert bits(run(roomy(MODEL, max_num_batched_tokens=7), [begun])[0]) == bits(whole)


def test_keys_that_were_in_host_memory_and_an_engine_that_slept() -> None:
    """Copies of keys are the keys; packed copies of the weights are made again."""
    prompts = random_prompts(100, 70, 5)
    requests = [
        request(str(i), prompt, 12, temperature=1.0, seed=i, ignore_eos=True) for i, prompt in enumerate(prompts)
    ]
    expected = [alone(MODEL, item) for item in requests]
    core = roomy(MODEL, host_cache_ratio=2.0, kv_cache_tokens=300, pack_weights=True)
    assert [bits(answer) for answer in run(core, requests)] == expected
    core.scheduler.cache.evict(core.scheduler.cache.num_evictable)
    assert [bits(answer) for answer in run(core, requests)] == expected
    assert core.stats().num_host_cached_tokens_total > 0
    core.pause("keep")
    core.sleep(("kv_cache",))
    core.rest.end(("kv_cache",))
    core.resume()
    assert [bits(answer) for answer in run(core, requests)] == expected


DRAFTS: dict[str, Callable[[PreTrainedModel, dict[str, tuple[int, ...]]], DraftSource]] = {
    "n-grams": lambda model, answers: ngram_source(NgramSettings(max_guesses=5, shortest=1)),
    "often right": lambda model, answers: source(Knowing(answers, 5, wrong_each=3)),
    "trees": lambda model, answers: source(RandomTrees(answers, 7, seed=0)),
    "an EAGLE head": lambda model, answers: eagle_source(
        model, make_head(model, "eagle3"), EagleSettings(num_steps=3, topk=3, max_guesses=6)
    ),
}


@pytest.mark.parametrize("name", DRAFTS)
@pytest.mark.parametrize("model", [MODEL, WINDOWED], ids=["full", "windowed"])
def test_drafts_change_no_bit(model: PreTrainedModel, name: str) -> None:
    requests = random_requests(random.Random(4), 10)
    # The same prompt several times: its answers are guessed from each other.
    requests += [replace(requests[0], request_id=f"again {i}") for i in range(3)]
    expected = {item.request_id: alone(model, item) for item in requests}
    answers = {rid: tokens for rid, (tokens, _) in expected.items()}
    core = make_core(
        model,
        deterministic=True,
        drafts=DRAFTS[name](model, answers),
        max_num_batched_tokens=64,
        kv_cache_tokens=600,
        max_num_seqs=5,
    )
    for _ in range(2):
        found = {answer.request_id: bits(answer) for answer in run(core, requests)}
        assert found == expected
    assert core.speculation is not None and core.speculation.counts.verifications > 10


def test_the_answer_is_that_of_plain_inference_up_to_rounding() -> None:
    for item in random_requests(random.Random(9), 5):
        plain = run(make_core(MODEL, kv_cache_tokens=1000), [item])[0]
        tokens, logprobs = alone(MODEL, item)
        assert tokens == plain.token_ids
        assert logprobs == pytest.approx(plain.logprobs, abs=1e-5)


def test_what_it_is_not_built_for_is_refused_when_the_engine_is_made() -> None:
    with pytest.raises(ConfigError, match="does not know GELUActivation"):
        make_core(make_model("llama", hidden_act="gelu"), deterministic=True)
    with pytest.raises(ConfigError, match="head size that 16 divides, up to 256; layer 0 has head size 8"):
        make_core(make_model("qwen3", head_dim=8), deterministic=True)
    with pytest.raises(ConfigError, match="has an attention of its own"):
        make_core(deterministic=True, attention_backend="reference")
    with pytest.raises(ConfigError, match="built for float32"):
        make_core(make_model().to(torch.bfloat16), deterministic=True)


def differing(model: torch.nn.Module, requests: Sequence[GenerateRequest]) -> int:
    """Requests whose bits in a batch, in small chunks, are not those alone; plain inference."""
    core = make_core(model, max_num_batched_tokens=17, kv_cache_tokens=1000, max_num_seqs=12, pack_weights=False)
    together = run(core, requests)
    single = [run(make_core(model, kv_cache_tokens=1000, pack_weights=False), [item])[0] for item in requests]
    return sum(bits(a) != bits(b) for a, b in zip(together, single, strict=True))


def test_plain_inference_is_no_judge_of_bits(capsys: pytest.CaptureFixture[str]) -> None:
    """Not a promise of plain inference, in either direction: how many differ is printed, and depends on the machine."""
    requests = random_requests(random.Random(1), 12)
    count = differing(make_model("qwen3", head_dim=32, hidden_size=320, num_hidden_layers=1), requests)
    with capsys.disabled():
        print(f"\nplain inference: {count} of {len(requests)} requests have other bits in a batch than alone")
    assert count <= len(requests)
