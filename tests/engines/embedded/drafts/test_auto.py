"""Guessing is left out where it costs more than it saves."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from skyrl_train.engines.embedded.drafts import speculation
from skyrl_train.engines.embedded.drafts.auto import BLOCK, LONGEST_WAIT, WAIT, Auto
from tests.engines.embedded.common import make_core, request, run
from tests.engines.embedded.drafts.drafters import Knowing, source
from tests.tiny import make_model


def live(auto: Auto, num_steps: int, *, size: int = 1, plain: float = 1.0, guessing: float = 1.0) -> list[bool]:
    """So many steps at these seconds for a token; in which of them there were guesses."""
    ways = []
    for _ in range(num_steps):
        ways.append(auto.guesses(size))
        auto.add(size, guessing * 2 * size if ways[-1] else plain * size, 2 * size if ways[-1] else size)
    return ways


def test_where_guesses_win_they_are_made_nearly_always() -> None:
    ways = live(Auto(), 3000, guessing=0.5)
    assert sum(ways) > 0.97 * len(ways)


def test_where_they_lose_they_are_left_out_and_tried_more_and_more_rarely() -> None:
    auto = Auto()
    ways = live(auto, 50_000, guessing=1.5)
    assert 0 < sum(ways[1000:]) < 0.003 * len(ways)
    assert auto.sizes[0].wait == LONGEST_WAIT


def test_sizes_of_batch_are_told_apart() -> None:
    auto = Auto()
    live(auto, 100, size=1, guessing=0.5)
    live(auto, 100, size=64, guessing=2.0)
    assert auto.guesses(1) and not auto.guesses(64) and not auto.guesses(33)
    assert auto.guesses(17), "not seen yet"


def test_a_small_difference_changes_nothing() -> None:
    auto = Auto()
    live(auto, 100, guessing=0.99)
    assert auto.guesses(1)
    live(auto, 10 * WAIT, guessing=1.2)
    assert not auto.sizes[0].pays
    live(auto, 20 * WAIT, guessing=0.98)
    assert not auto.sizes[0].pays


def test_it_comes_back_when_guesses_have_become_good() -> None:
    auto = Auto()
    live(auto, 10 * WAIT, guessing=2.0)
    assert not auto.guesses(1)
    ways = live(auto, LONGEST_WAIT, guessing=0.3)
    assert all(ways[-BLOCK:])


def test_a_machine_that_is_busy_now_and_then_does_not_switch() -> None:
    auto, random = Auto(), Random(0)
    for _ in range(3000):
        slow = 40.0 if random.random() < 0.1 else 1.0
        live(auto, 1, plain=slow, guessing=0.8 * slow)
    assert auto.sizes[0].pays


def test_the_engine_stops_guessing_and_answers_stay_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock by which rows cost, as on a busy machine."""
    model = make_model()
    items = [request(str(i), [1, 2, 3 + i], 100, temperature=1.0, seed=i, ignore_eos=True) for i in range(4)]
    wanted = run(make_core(model), items)
    answers = {item.request_id: item.token_ids for item in wanted}
    core = make_core(model, drafts=replace(source(Knowing(answers, 3, wrong_each=1)), measures=True))
    assert core.speculation is not None
    now = 0.0

    def clock() -> float:
        nonlocal now
        assert core.speculation is not None
        now += 1.0 + core.speculation.counts.guessed
        core.speculation.counts.guessed = 0
        return now

    monkeypatch.setattr(speculation.time, "thread_time", clock)
    assert [found.token_ids for found in run(core, items)] == [right.token_ids for right in wanted]
    assert core.speculation.auto is not None and not core.speculation.auto.sizes[2].pays
    assert 0 < core.speculation.counts.verifications < 200, "of 400"
