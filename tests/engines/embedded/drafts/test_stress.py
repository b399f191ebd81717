"""The random life of tests.engines.embedded.test_stress with guesses: nothing that happens changes an answer."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from transformers import PreTrainedModel

from skyrl_train.engines.embedded.drafts.base import DraftSource
from skyrl_train.engines.embedded.drafts.build import ngram_source, standalone_source
from skyrl_train.engines.embedded.drafts.ngram import NgramSettings
from skyrl_train.types import SessionRef, VersionSpan
from tests.engines.embedded.common import make_core, request, run
from tests.engines.embedded.drafts.drafters import RandomTrees, source
from tests.engines.embedded.test_stress import CONTEXT, POOL, assert_answers_as_alone, random_life
from tests.tiny import make_model

SOURCES: dict[str, Callable[[], DraftSource]] = {
    "trees": lambda: source(RandomTrees({}, 5, seed=2, num_words=260)),
    "ngram": lambda: ngram_source(NgramSettings(max_guesses=4, shortest=1)),
    "standalone": lambda: standalone_source(one_layer(), one_layer(), max_guesses=3),
}


def one_layer() -> PreTrainedModel:
    return make_model(num_hidden_layers=1)


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("seed", range(2))
def test_nothing_that_happens_around_a_request_changes_its_answer(name: str, seed: int) -> None:
    rng = random.Random(seed)
    model = one_layer()
    core = make_core(
        model,
        drafts=SOURCES[name](),
        kv_cache_tokens=POOL,
        max_context_len=CONTEXT,
        max_num_seqs=rng.choice([2, 5]),
        max_num_batched_tokens=rng.choice([11, 31, 64]),
        enable_prefix_caching=rng.random() < 0.8,
        chunked_prefill=rng.random() < 0.8,
    )
    sent, done = random_life(core, rng, num_events=150)

    assert done.keys() == sent.keys()
    core.scheduler.cache.flush()
    assert core.scheduler.pool.num_free == POOL, "a guess kept a slot"
    assert_answers_as_alone(make_core(model, max_context_len=CONTEXT, max_num_batched_tokens=64), sent, done)
    assert core.speculation is not None and core.speculation.counts.verifications > 20


def test_a_pool_that_is_full_leaves_no_room_for_guesses_and_goes_on() -> None:
    model = one_layer()
    items = [request(str(i), [7, 7, 7 + i], 90, temperature=1.0, seed=i, ignore_eos=True) for i in range(4)]
    wanted = run(make_core(model), items)
    answers = {item.request_id: item.token_ids for item in wanted}
    core = make_core(model, drafts=source(RandomTrees(answers, 8, seed=3)), kv_cache_tokens=140)
    assert [item.token_ids for item in run(core, items)] == [item.token_ids for item in wanted]
    assert core.stats().num_retractions_total > 0


def test_nobody_is_retracted_for_a_guess() -> None:
    model = one_layer()
    items = [request(str(i), [7, 7, 7 + i], 30, temperature=1.0, seed=i, ignore_eos=True) for i in range(4)]
    room = 4 * 33
    answers = {item.request_id: item.token_ids for item in run(make_core(model), items)}
    core = make_core(model, drafts=source(RandomTrees(answers, 8, seed=3)), kv_cache_tokens=room)
    run(core, items)
    assert core.stats().num_retractions_total == 0


def test_rows_of_a_step_stay_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    core = make_core(one_layer(), drafts=source(RandomTrees({}, 8, seed=3)), max_num_batched_tokens=10)
    seen: list[int] = []
    launch = core._runner.launch
    monkeypatch.setattr(core._runner, "launch", lambda plan: (seen.append(plan.num_rows), launch(plan))[1])
    run(core, [request(str(i), [7, 7, 7 + i], 30, temperature=1.0, seed=i) for i in range(4)])
    assert max(seen) <= 10 and core.speculation is not None and core.speculation.counts.verifications


def test_streams_gain_several_tokens_a_step() -> None:
    model = one_layer()
    item = request("a", [5, 6, 7], 30, temperature=1.0, seed=1, ignore_eos=True)
    answer = run(make_core(model), [item])[0].token_ids
    core = make_core(model, drafts=source(RandomTrees({"a": answer}, 8, seed=3)))
    state = core.add(item)
    gained: list[int] = []
    while core.has_work:
        core.step()
        if core.has_work:
            tokens, logprobs = core.answer_so_far(state, sum(gained))
            assert len(tokens) == len(logprobs) and tokens == answer[sum(gained) : sum(gained) + len(tokens)]
            gained.append(len(tokens))
    assert max(gained) > 1


def test_an_answer_that_was_begun_elsewhere_goes_on_with_guesses() -> None:
    model = one_layer()
    item = request("a", [5, 6, 7], 30, temperature=1.0, seed=1, ignore_eos=True)
    plain = run(make_core(model), [item])[0]
    spans = (VersionSpan(version=0, start=0, end=11),)
    begun = replace(plain, token_ids=plain.token_ids[:11], logprobs=plain.logprobs[:11], versions=spans)
    core = make_core(model, drafts=ngram_source(NgramSettings(max_guesses=4, shortest=1)))
    assert run(core, [replace(item, partial=begun)])[0].token_ids == plain.token_ids


def test_sessions_go_on_after_guesses() -> None:
    model = one_layer()

    def turns(drafts: DraftSource | None) -> list[tuple[int, ...]]:
        core = make_core(model, drafts=drafts)
        session, answers, parent = core.sessions.open(100), [], None
        for turn in range(3):
            ref = SessionRef(session_id=session, parent_request_id=parent)
            item = request(f"t{turn}", [turn + 1, 9], 15, temperature=1.0, seed=turn, ignore_eos=True)
            answers.append(run(core, [replace(item, session=ref)])[0].token_ids)
            parent = f"t{turn}"
        core.close_session(session)
        core.check_integrity()
        return answers

    assert turns(ngram_source(NgramSettings(max_guesses=4, shortest=1))) == turns(None)
