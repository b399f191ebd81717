"""Sessions of the embedded engine: a turn computes what is new, answers as if all had been sent, and costs no more."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl_train.engines.embedded import EmbeddedConfig, EmbeddedEngine
from skyrl_train.engines.embedded.core import EngineCore
from skyrl_train.errors import RequestRejected
from skyrl_train.types import Completion, GenerateRequest, LocalWeights, SessionRef, WeightUpdate
from tests.engines.embedded.common import Prompt, make_core, random_prompts, request, run
from tests.tiny import make_model, make_tokenizer

MODEL = make_model(num_hidden_layers=1)


def turn(
    name: str, session: str, new: Sequence[int], max_new: int = 6, *, parent: str | None = None, **sampling: object
) -> GenerateRequest:
    """Never ends by itself: a random model's end token would make lengths a matter of luck."""
    ref = SessionRef(session_id=session, parent_request_id=parent)
    return replace(request(name, new, max_new, ignore_eos=True, **sampling), session=ref)


def alone(prompt: Sequence[int], max_new: int = 6) -> Prompt:
    """The greedy answer of an engine that has seen nothing else."""
    return run(make_core(MODEL), [request("alone", prompt, max_new, ignore_eos=True)])[0].token_ids


def count_prefill(core: EngineCore) -> list[int]:
    """Rows that chunks of prompts have in each step from here on, as they are planned."""
    rows: list[int] = []
    plan = core.scheduler.plan

    def counted(policy_version: int, *, admit_new: bool) -> object:
        made = plan(policy_version, admit_new=admit_new)
        if made is not None:
            rows.append(sum(chunk.end - chunk.start for chunk in made.chunks))
        return made

    core.scheduler.plan = counted  # type: ignore[method-assign, assignment]
    return rows


def test_a_turn_prefills_its_new_tokens_and_the_last_sampled_one() -> None:
    core = make_core(MODEL)
    session, whole, parent = core.sessions.open(128), (), None
    rows = count_prefill(core)
    for number, new in enumerate(random_prompts(20, 7, 1, 12)):
        rows.clear()
        (answer,) = run(core, [turn(f"t{number}", session, new, parent=parent)])
        # What was sampled last was never read: it has no keys yet. All others of the path have.
        unread = 0 if parent is None else 1
        assert answer.num_cached_tokens == len(whole) - unread
        assert sum(rows) == len(new) + unread
        assert answer.token_ids == alone((*whole, *new))
        whole, parent = (*whole, *new, *answer.token_ids), f"t{number}"
    assert core.stats().num_sessions == 1


def test_branches_share_the_keys_of_their_path_and_do_not_see_each_other() -> None:
    core = make_core(MODEL)
    session = core.sessions.open(250)
    root, *news = random_prompts(30, 4, 5, 6, 1)
    (first,) = run(core, [turn("root", session, root)])
    whole = root + first.token_ids
    rows = count_prefill(core)
    held = core.scheduler.pool.num_slots - core.scheduler.pool.num_free
    answers = run(core, [turn(str(i), session, new, parent="root") for i, new in enumerate(news)])
    assert [answer.token_ids for answer in answers] == [alone(whole + new) for new in news]
    assert all(answer.num_cached_tokens == len(whole) - (i == 0) for i, answer in enumerate(answers))
    # The first one computes the last token of the path, and the others find it: its keys are there once.
    assert sum(rows) == sum(map(len, news)) + 1
    taken = core.scheduler.pool.num_slots - core.scheduler.pool.num_free - held
    assert taken == 1 + sum(len(new) + 6 - 1 for new in news), "each branch holds its own tokens, the path is shared"


def test_what_a_session_holds_is_evicted_after_everything_else() -> None:
    core = make_core(MODEL, kv_cache_tokens=130)
    session = core.sessions.open(200)
    (mine,) = random_prompts(40)
    run(core, [turn("a", session, mine)])
    strangers = [request(f"s{i}", p, 5, ignore_eos=True) for i, p in enumerate(random_prompts(*[60] * 4, seed=1))]
    for stranger in strangers:
        run(core, [stranger])
    assert core.stats().num_evicted_tokens_total > 100
    (second,) = run(core, [turn("b", session, (1, 2), parent="a")])
    assert second.num_cached_tokens == 45, "though it is the least recently used of all"
    core.sessions.close(session)
    for stranger in strangers:
        run(core, [stranger])
    (again,) = run(core, [request("c", mine, 5)])
    assert again.num_cached_tokens == 0, "closed, it is evicted in its turn"
    assert core.scheduler.cache.num_pinned == core.scheduler.cache.num_pins == 0


def test_a_pinned_path_makes_room_when_nothing_else_is_left_and_is_computed_again() -> None:
    core = make_core(MODEL, kv_cache_tokens=100)
    session = core.sessions.open(200)
    (mine,) = random_prompts(40)
    (first,) = run(core, [turn("a", session, mine)])
    (big,) = run(core, [request("big", random_prompts(80, seed=2)[0], 15, ignore_eos=True)])
    assert len(big.token_ids) == 15
    assert core.scheduler.cache.num_pinned < 10
    (second,) = run(core, [turn("b", session, (1, 2), parent="a")])
    assert second.num_cached_tokens < 10
    assert second.token_ids == alone((*mine, *first.token_ids, 1, 2))
    (third,) = run(core, [turn("c", session, (9,), parent="a")])
    assert third.num_cached_tokens == 46, "what the second turn computed is there for its sibling"


def test_more_sessions_than_the_cache_can_hold_are_served_all_the_same() -> None:
    core = make_core(MODEL, kv_cache_tokens=120)
    sessions = [core.sessions.open(100) for _ in range(5)]
    prompts = random_prompts(*[30] * 5)
    wholes: list[Prompt] = [()] * 5
    for number in range(2):
        asked = [
            turn(
                f"{i}/{number}", session, prompts[i][:20] if number else prompts[i], parent=f"{i}/0" if number else None
            )
            for i, session in enumerate(sessions)
        ]
        for i, answer in enumerate(run(core, asked)):
            new = asked[i].prompt_token_ids
            assert answer.token_ids == alone(wholes[i] + new)
            wholes[i] += new + answer.token_ids
    assert core.stats().num_evicted_tokens_total > 0


def test_a_session_goes_on_over_updates_of_the_weights_and_its_keys_are_pinned_anew() -> None:
    core = make_core(MODEL)
    session = core.sessions.open(128)
    (mine,) = random_prompts(30)
    (first,) = run(core, [turn("a", session, mine)])
    core.pause("keep")
    core.update_weights(WeightUpdate(version=1, source=LocalWeights()))
    core.check_integrity()
    assert core.scheduler.cache.num_pinned == 0 and core.scheduler.pool.num_free == 256
    core.resume()
    (second,) = run(core, [turn("b", session, (7, 8), parent="a")])
    assert second.num_cached_tokens == 0 and second.versions[0].version == 1
    assert second.token_ids == alone((*mine, *first.token_ids, 7, 8))
    assert core.scheduler.cache.num_pinned == 30 + 6 + 2 + 5
    core.flush_cache()
    core.check_integrity()
    (third,) = run(core, [turn("c", session, (7,), parent="b")])
    assert third.token_ids == alone((*mine, *first.token_ids, 7, 8, *second.token_ids, 7))


def test_an_aborted_turn_goes_on_in_its_session_from_what_it_had() -> None:
    core = make_core(MODEL)
    session = core.sessions.open(60)
    (mine,) = random_prompts(20)
    (first,) = run(core, [turn("a", session, mine)])
    asked = turn("b", session, (3, 4, 5), 20, parent="a")
    core.add(asked)
    for _ in range(8):
        core.step()
    (cut,) = core.abort(["b"])
    core.check_integrity()
    part = cut.completion
    assert 3 < len(part.token_ids) < 20 and part.finish_reason == "abort"
    # It counts with what it has, and can be gone on from; made again it gives way to the whole answer.
    (whole,) = run(core, [replace(asked, partial=part)])
    assert whole.token_ids == alone((*mine, *first.token_ids, 3, 4, 5), 20)
    assert core.sessions.book.path(SessionRef(session_id=session, parent_request_id="b"))[-20:] == whole.token_ids
    run(core, [turn("c", session, (1,), 10, parent="b")])
    with pytest.raises(RequestRejected, match="can't be made again"):
        core.add(asked)
    core.check_integrity()


def test_capacity_is_of_prompts_and_answers_together_and_a_refusal_leaves_no_trace() -> None:
    core = make_core(MODEL)
    session = core.sessions.open(40)
    (mine,) = random_prompts(20)
    run(core, [turn("a", session, mine, 10)])
    with pytest.raises(RequestRejected, match=r"holds 30 of 40 tokens, 5 new ones with max_new_tokens=6 need 11"):
        core.add(turn("b", session, (1,) * 5, 6, parent="a"))
    with pytest.raises(RequestRejected, match="outside the vocabulary"):
        core.add(turn("b", session, (10**6,), 6, parent="a"))
    long = core.sessions.open(1000)
    with pytest.raises(RequestRejected, match="context of 128"):
        core.add(turn("b", long, (1,) * 100, 60))
    core.check_integrity()
    assert not core.has_work
    run(core, [turn("b", session, (1,) * 5, 5, parent="a")])


def test_without_a_prefix_cache_sessions_still_mean_the_same() -> None:
    core = make_core(MODEL, enable_prefix_caching=False)
    session = core.sessions.open(100)
    (mine,) = random_prompts(20)
    (first,) = run(core, [turn("a", session, mine)])
    (second,) = run(core, [turn("b", session, (4, 5), parent="a")])
    assert second.token_ids == alone((*mine, *first.token_ids, 4, 5)) and second.num_cached_tokens == 0
    core.sessions.close(session)
    assert core.scheduler.pool.num_free == 256


@pytest.mark.parametrize("driver", ["inline", "thread"])
async def test_a_caller_who_leaves_takes_its_turn_out_of_the_session(driver: str) -> None:
    config = EmbeddedConfig(max_num_seqs=4, kv_cache_tokens=2048, max_context_len=512)
    engine = EmbeddedEngine(MODEL, make_tokenizer(), config=config, driver=driver)  # type: ignore[arg-type]
    try:
        session = await engine.open_session(450)
        task = asyncio.create_task(engine.generate(turn("a", session, (1, 2, 3), 400)))
        while not (await engine.stats()).num_generated_tokens_total:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await engine.generate(turn("b", session, (1, 2, 3), 440))  # there would be no room beside what it had
        other = await engine.open_session(450)
        running = asyncio.create_task(engine.generate(turn("c", other, (1,), 440)))
        while not (await engine.stats()).num_running:
            await asyncio.sleep(0.001)
        await engine.close_session(other)
        assert (await running).finish_reason == "abort"
        await engine.close_session(session)
        assert (await engine.stats()).num_sessions == 0
        engine.core.check_integrity()
    finally:
        await engine.close()


trees = st.lists(
    st.tuples(
        st.sampled_from(["ask", "ask", "ask", "ask", "abort", "update", "clear", "stranger", "close"]),
        st.integers(0, 10**6),
    ),
    min_size=1,
    max_size=14,
)


@settings(max_examples=40, deadline=None)
@given(trees, st.integers(0, 3))
def test_random_trees_answer_as_the_whole_prompt_would(script: list[tuple[str, int]], seed: int) -> None:
    """On a pool that is too small for all of it: eviction, retraction and updates change nothing but the time."""
    core = make_core(MODEL, kv_cache_tokens=100, max_context_len=90, max_num_seqs=3)
    sessions = [core.sessions.open(10_000) for _ in range(2)]
    known: dict[str, dict[str, Prompt]] = {session: {} for session in sessions}
    references = make_core(MODEL, kv_cache_tokens=2000)
    number = 0

    def finish(asked: dict[str, tuple[str, Prompt]], completions: Sequence[Completion]) -> None:
        core.check_integrity()
        for completion in completions:
            if completion.request_id not in asked:
                continue
            session, prompt = asked.pop(completion.request_id)
            max_new = len(completion.token_ids)
            if max_new:
                reference = request("r", prompt, max_new, ignore_eos=True)
                assert run(references, [reference])[0].token_ids == completion.token_ids
            if session in known:
                known[session][completion.request_id] = prompt + completion.token_ids

    asked: dict[str, tuple[str, Prompt]] = {}
    for verb, dice in script:
        rng = random.Random(dice + seed)
        if not known:
            break
        session = rng.choice(list(known))
        if verb in ("ask", "stranger"):
            number += 1
            parents = [None, *known[session]] if verb == "ask" else [None]
            parent = rng.choice(parents)
            before = () if parent is None else known[session][parent]
            new = tuple(rng.randrange(3) for _ in range(rng.randint(1, 8)))
            max_new = rng.randint(1, 12)
            if len(before) + len(new) + max_new > 90:
                continue
            name = str(number)
            if verb == "ask":
                core.add(turn(name, session, new, max_new, parent=parent))
                asked[name] = (session, before + new)
            else:
                core.add(request(name, tuple(rng.randrange(256) for _ in range(60)), 10, ignore_eos=True))
        elif verb == "abort" and asked:
            finish(asked, [item.completion for item in core.abort([rng.choice(list(asked))])])
        elif verb == "update":
            finish(asked, [item.completion for item in core.pause("keep")])
            core.update_weights(WeightUpdate(version=core.policy_version + 1, source=LocalWeights()))
            core.resume()
        elif verb == "clear" and session not in {where for where, _ in asked.values()}:
            core.sessions.clear(session)
            known[session] = {}
        elif verb == "close":
            del known[session]
            finish(asked, [item.completion for item in core.close_session(session)])
        for _ in range(rng.randint(0, 9)):
            if core.has_work:
                finish(asked, [item.completion for item in core.step()])
        core.check_integrity()
    while core.has_work:
        finish(asked, [item.completion for item in core.step()])
    for session in sessions:
        core.close_session(session)
    core.check_integrity()
    assert not asked and core.scheduler.cache.num_pins == 0
