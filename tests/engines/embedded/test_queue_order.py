"""Who is admitted, and who makes way. The slow reference looks at every waiting request and every cached token."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from skyrl_train.engines.embedded.core import EngineCore
from skyrl_train.engines.embedded.queue_order import MAX_PASSED, WINDOW, LongestPrefixFirst, make_way
from skyrl_train.engines.embedded.request import RequestState
from skyrl_train.engines.embedded.waiting import WaitingQueue
from skyrl_train.errors import ConfigError
from skyrl_train.types import Completion, GenerateRequest
from tests.engines.embedded.common import make_core, random_prompts, request, run
from tests.tiny import make_model

MODEL = make_model(num_hidden_layers=1)


def state(order: int, *, urgency: int = 0, tokens: tuple[int, ...] = (1, 2)) -> RequestState:
    return RequestState(
        request=request(str(order), tokens),
        order=order,
        seed=0,
        tokens=np.asarray(tokens, dtype=np.int32),
        logprobs=np.zeros(len(tokens), dtype=np.float32),
        urgency=urgency,
    )


def running(core: EngineCore) -> set[str]:
    return {one.request.request_id for one in core.scheduler.running()}


def ended(core: EngineCore, *, limit: int = 5000) -> dict[str, Completion]:
    """Steps until nothing is left, checked after each; the answers in the order in which they came."""
    done: dict[str, Completion] = {}
    for _ in range(limit):
        if not core.has_work:
            return done
        done |= {item.completion.request_id: item.completion for item in core.step()}
        core.check_integrity()
    raise AssertionError(f"{core.stats()} after {limit} steps")


# -- the longest cached prefix first


def reference_next(core: EngineCore, waiting: list[RequestState]) -> RequestState:
    """Of the highest priority the one with most tokens in the cache; of several the oldest."""
    cached = [
        [int(token) for token in np.concatenate([step.tokens for step in path])]
        for path in paths(core.scheduler.cache.root, [])
        if path
    ]

    def length(one: RequestState) -> int:
        own = one.tokens[:-1].tolist()
        best = 0
        for path in cached:
            same = 0
            while same < min(len(path), len(own)) and path[same] == own[same]:
                same += 1
            best = max(best, same)
        return best

    return min(waiting, key=lambda one: (-one.urgency, -length(one), one.order))


def paths(node: Any, above: list[Any]) -> list[list[Any]]:
    below = [path for child in node.children.values() for path in paths(child, [*above, child])]
    return below or [above]


@pytest.mark.parametrize("seed", range(3))
def test_the_longest_cached_prefix_is_admitted_first(seed: int) -> None:
    """One request is admitted a step, so that each choice can be compared with the reference's."""
    rng = random.Random(seed)
    core = make_core(MODEL, scheduling_policy="lpm", max_num_seqs=1, max_num_batched_tokens=64)
    families = random_prompts(20, 14, 9, seed=seed)
    for i in range(30):
        family = rng.choice(families)
        prompt = (*family[: rng.randint(1, len(family))], *(rng.randrange(256) for _ in range(3)))
        core.add(request(f"r{i}", prompt, rng.randint(1, 4), priority=rng.choice([0, 0, 0, 1])))
    num_chosen = num_out_of_order = 0
    while core.has_work:
        before, waiting = running(core), core.scheduler.waiting()
        expected = reference_next(core, waiting) if waiting and not before else None
        core.step()
        core.check_integrity()
        if expected is not None:
            left = {one.request.request_id for one in core.scheduler.waiting()}
            admitted = {one.request.request_id for one in waiting} - left
            assert admitted == {expected.request.request_id}
            num_chosen += 1
            num_out_of_order += expected is not waiting[0]
    assert num_chosen == 30 and num_out_of_order > 5


def test_looking_for_prefixes_changes_nothing_in_the_cache() -> None:
    core = make_core(MODEL, scheduling_policy="lpm")
    run(core, [request("a", range(20), 2)])
    cache = core.scheduler.cache
    before = [(node.serial, len(node.tokens), node.last_used) for node in cache.nodes()]
    assert cache.cached_len(np.asarray([*range(10), 77], dtype=np.int32), cache.root) == (10, 0)
    assert cache.cached_len(np.asarray([99], dtype=np.int32), cache.root) == (0, 0)
    assert [(node.serial, len(node.tokens), node.last_used) for node in cache.nodes()] == before


def test_the_answers_are_those_of_first_come_first_served_and_more_of_them_are_cached() -> None:
    rng = random.Random(5)
    families = random_prompts(30, 30, 30, 30, 30, 30, seed=5)
    prompts = [(*families[i % 6], rng.randrange(256)) for i in range(36)]
    requests = [request(f"r{i}", prompt, 3, temperature=1.0, seed=i) for i, prompt in enumerate(prompts)]
    settings: dict[str, Any] = {"max_num_seqs": 2, "kv_cache_tokens": 110, "max_num_batched_tokens": 32}
    fcfs, lpm = make_core(MODEL, **settings), make_core(MODEL, scheduling_policy="lpm", **settings)
    wanted, found = run(fcfs, requests), run(lpm, requests)
    assert [answer.token_ids for answer in found] == [answer.token_ids for answer in wanted]
    assert lpm.stats().cache_hit_frac > fcfs.stats().cache_hit_frac + 0.2


def test_nobody_is_passed_over_for_ever() -> None:
    """Requests with a longer cached prefix keep coming; the one without is admitted after MAX_PASSED of them."""
    core = make_core(MODEL, scheduling_policy="lpm", max_num_seqs=1)
    popular = tuple(range(12))
    run(core, [request("first", popular, 1)])
    core.add(request("lonely", (200, 201), 1))
    served: list[str] = []
    for i in range(2 * MAX_PASSED):
        core.add(request(f"popular{i}", (*popular, i), 1))
        served += [item.completion.request_id for item in core.step()]
        core.check_integrity()
    assert served.index("lonely") == MAX_PASSED


def test_only_the_oldest_of_a_long_queue_are_looked_at() -> None:
    looked: list[int] = []

    def cached_len(one: RequestState) -> int:
        looked.append(one.order)
        return one.order

    order, queue = LongestPrefixFirst(cached_len), WaitingQueue()
    for i in range(3 * WINDOW):
        queue.push(state(i))
    order.new_step()
    chosen = order.next([WaitingQueue(), queue])
    assert chosen is not None and chosen.order == WINDOW - 1
    assert sorted(looked) == list(range(WINDOW))
    queue.remove(chosen)
    order.admitted(chosen)
    following = order.next([WaitingQueue(), queue])
    assert following is not None and following.order == WINDOW - 2
    assert len(looked) == WINDOW, "a step ranks once"
    assert [one.order for one in queue.in_order()][:2] == [0, 1]


def test_a_longer_prefix_is_no_reason_to_pass_a_higher_priority() -> None:
    order, queue = LongestPrefixFirst(lambda one: len(one.tokens)), WaitingQueue()
    for one in (state(0, tokens=(1,) * 9), state(1, urgency=2), state(2, urgency=2, tokens=(1,) * 5)):
        queue.push(one)
    order.new_step()
    chosen = order.next([queue])
    assert chosen is not None and chosen.order == 2


def test_the_longest_prefix_without_a_cache_is_refused() -> None:
    with pytest.raises(ConfigError, match="scheduling policy lpm looks for cached prefixes, and prefix caching is off"):
        make_core(MODEL, scheduling_policy="lpm", enable_prefix_caching=False)


# -- preemption


def long(name: str, priority: int, max_new: int = 60) -> GenerateRequest:
    prompt = tuple(name.encode() * 3)
    return request(name, prompt, max_new, priority=priority, temperature=1.0, seed=len(name), ignore_eos=True)


def test_a_higher_priority_takes_the_place_of_the_lowest_running_one() -> None:
    core = make_core(MODEL, max_num_seqs=2, preemption_threshold=2)
    first = [long("low", 0), long("middle", 1)]
    for item in first:
        core.add(item)
    for _ in range(9):
        core.step()
    assert running(core) == {"low", "middle"}
    core.add(long("high", 3))
    core.step()
    core.check_integrity()
    assert running(core) == {"middle", "high"}
    core.add(long("higher", 4))
    core.step()
    assert running(core) == {"high", "higher"}
    done = ended(core)
    assert [name for name in done if "high" in name] == list(done)[:2]
    assert core.stats().num_retractions_total == 2
    for item in [*first, long("high", 3), long("higher", 4)]:
        assert done[item.request_id].token_ids == run(make_core(MODEL), [item])[0].token_ids


@pytest.mark.parametrize(("threshold", "preempts"), [(0, True), (3, True), (4, False), (None, False)])
def test_a_priority_must_be_higher_by_the_threshold(threshold: int | None, preempts: bool) -> None:
    core = make_core(MODEL, max_num_seqs=1, preemption_threshold=threshold)
    core.add(long("low", 0))
    for _ in range(5):
        core.step()
    core.add(long("high", 3))
    core.step()
    assert running(core) == ({"high"} if preempts else {"low"})
    assert list(ended(core)) == (["high", "low"] if preempts else ["low", "high"])


def test_equals_never_take_each_others_place() -> None:
    core = make_core(MODEL, max_num_seqs=1, preemption_threshold=0)
    for name in ("a", "b", "c"):
        core.add(long(name, 1, 20))
        core.step()
    assert list(ended(core)) == ["a", "b", "c"]
    assert core.stats().num_retractions_total == 0


def test_slots_are_made_room_for_as_seats_are() -> None:
    """Seats are plenty here, and slots are not: as many make way as the newcomer needs, and no more."""
    core = make_core(MODEL, max_num_seqs=8, kv_cache_tokens=128, max_num_batched_tokens=64, preemption_threshold=1)
    for i in range(4):
        core.add(request(f"low{i}", random_prompts(20, seed=i)[0], 12, ignore_eos=True))
    for _ in range(4):
        core.step()
    before = running(core)
    assert len(before) > 2
    core.add(request("high", random_prompts(50, seed=9)[0], 30, priority=1, ignore_eos=True))
    core.step()
    core.check_integrity()
    assert "high" in running(core)
    assert 0 < len(running(core) - {"high"}) < len(before)
    assert len(ended(core)) == 5


def test_lower_numbers_come_first_where_that_is_asked_for() -> None:
    core = make_core(MODEL, max_num_seqs=1, preemption_threshold=1, low_priority_values_first=True)
    core.add(long("five", 5))
    core.step()
    core.add(long("two", 2))
    core.step()
    assert running(core) == {"two"}
    core.add(long("nine", 9))
    assert list(ended(core)) == ["two", "five", "nine"]


def test_who_gives_way_is_chosen_by_priority_and_then_by_age() -> None:
    seated = [state(0), state(1), state(2, urgency=1), state(3, urgency=5)]
    gone: list[int] = []

    def retract(one: RequestState) -> None:
        seated.remove(one)
        gone.append(one.order)

    def way(waiting: RequestState, *, until: int) -> None:
        make_way(waiting, threshold=1, fits=lambda _: len(gone) >= until, running=lambda: seated, retract=retract)

    way(state(9, urgency=5), until=2)
    assert gone == [1, 0]
    way(state(9, urgency=5), until=99)
    assert gone == [1, 0, 2]


@pytest.mark.parametrize("seed", range(3))
def test_under_a_random_load_every_answer_is_what_it_is_alone(seed: int) -> None:
    rng = random.Random(seed)
    core = make_core(
        MODEL,
        max_num_seqs=rng.choice([1, 3]),
        kv_cache_tokens=110,
        max_context_len=90,
        preemption_threshold=rng.choice([0, 2]),
        scheduling_policy=rng.choice(["fcfs", "lpm"]),
    )
    families = random_prompts(15, 9, 12, seed=seed)
    sent: dict[str, GenerateRequest] = {}
    done: dict[str, Completion] = {}
    for _ in range(120):
        if rng.random() < 0.2:
            name, family = f"r{len(sent)}", rng.choice(families)
            item = request(
                name,
                (*family[: rng.randint(1, len(family))], rng.randrange(256)),
                rng.randint(1, 40),
                priority=rng.randint(0, 4),
                temperature=1.0,
                seed=rng.randrange(100),
            )
            sent[name] = item
            core.add(item)
        if core.has_work:
            done |= {item.completion.request_id: item.completion for item in core.step()}
            core.check_integrity()
    done |= ended(core)
    assert done.keys() == sent.keys()
    assert core.stats().num_retractions_total > 0
    roomy = make_core(MODEL)
    for name, item in sent.items():
        assert done[name].token_ids == run(roomy, [item])[0].token_ids
