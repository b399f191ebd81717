"""Guesses from repetition."""

from __future__ import annotations

import numpy as np
import pytest

from skyrl_train.engines.embedded.drafts.base import DraftSource
from skyrl_train.engines.embedded.drafts.ngram import NgramDrafter, NgramSettings
from skyrl_train.engines.embedded.drafts.ngram_tables import NativeTable, PlainTable, Table
from skyrl_train.engines.embedded.native.build import load_native
from tests.engines.embedded.common import make_core, request, run
from tests.tiny import make_model

SHAPE = {"reach": 5, "shortest": 2, "longest": 6}


def both() -> list[Table]:
    return [PlainTable(**SHAPE), NativeTable(load_native(), capacity=4096, **SHAPE)]


def guess(table: Table, *texts: list[int], prompt_len: int, prompts: list[int] | None = None, room: int = 5) -> list:
    """Guesses for requests that are seen for the first time."""
    width = max(map(len, texts))
    words = np.zeros((len(texts), width), dtype=np.int32)
    for row, text in zip(words, texts, strict=True):
        row[: len(text)] = text
    n = len(texts)
    prompt = np.asarray(prompts or [1] * n, dtype=np.uint64)
    begin = np.full(n, prompt_len, dtype=np.int32)
    length = np.asarray([len(text) for text in texts], dtype=np.int32)
    room_of = np.full(n, room, dtype=np.int32)
    tokens, counts = table.guess(words, np.arange(n), length, begin, prompt, begin.copy(), room_of, 5)
    return [row[:count].tolist() for row, count in zip(tokens, counts, strict=True)]


@pytest.mark.parametrize("table", both())
def test_what_followed_the_same_words_is_guessed(table: Table) -> None:
    assert guess(table, [7, 1, 2, 3, 4, 5, 6, 9, 1, 2], prompt_len=8) == [[3, 4, 5, 6, 9]]


@pytest.mark.parametrize("table", both())
def test_the_longer_agreement_wins_and_then_the_more_recent(table: Table) -> None:
    assert guess(table, [8, 1, 2, 30, 0, 1, 2, 40, 0, 8, 1, 2], prompt_len=12, room=1) == [[30]]
    assert guess(table, [0, 1, 2, 30, 0, 1, 2, 40, 9, 1, 2], prompt_len=11, room=1) == [[40]]


@pytest.mark.parametrize("table", both())
def test_a_short_period_goes_on(table: Table) -> None:
    assert guess(table, [5, 6, 5, 6], prompt_len=3) == [[5, 6, 5, 6, 5]]


@pytest.mark.parametrize("table", both())
def test_nothing_is_guessed_where_too_few_words_agree(table: Table) -> None:
    assert guess(table, [1, 2, 3, 4, 9, 2], prompt_len=5) == [[]]


@pytest.mark.parametrize("table", both())
def test_siblings_learn_from_each_other_and_others_do_not(table: Table) -> None:
    done, fresh = [1, 2, 50, 51, 52], [1, 2]
    assert guess(table, done, fresh, prompt_len=2)[1] == [50, 51, 52]
    assert guess(table, fresh, prompt_len=2, prompts=[2]) == [[]]
    assert guess(table, fresh, prompt_len=2) == [[50, 51, 52]], "also when the other one is gone"


def test_the_native_table_guesses_as_the_plain_one() -> None:
    random = np.random.default_rng(0)
    plain, native = both()
    text = random.integers(0, 4, (6, 120)).astype(np.int32)
    length = random.integers(8, 14, 6).astype(np.int32)
    begin = np.full(6, 8, dtype=np.int32)
    prompt = np.asarray([1, 1, 1, 2, 2, 3], dtype=np.uint64)
    learned, num_guesses = [begin.copy(), begin.copy()], 0
    while length.max() < 120:
        chosen = np.nonzero(random.random(6) < 0.8)[0]
        room = random.integers(1, 6, len(chosen)).astype(np.int32)
        answers = []
        for table, done in zip((plain, native), learned, strict=True):
            part = done[chosen]
            answers.append(table.guess(text, chosen, length[chosen], begin[chosen], prompt[chosen], part, room, 5))
            done[chosen] = part
        (tokens, counts), (fast_tokens, fast_counts) = answers
        np.testing.assert_array_equal(counts, fast_counts)
        np.testing.assert_array_equal(tokens, fast_tokens)
        num_guesses += counts.sum()
        length[chosen] += random.integers(1, 4, len(chosen)).astype(np.int32)
        length = np.minimum(length, 120)
    assert num_guesses > 100


def test_a_full_table_forgets_and_goes_on() -> None:
    table = NativeTable(load_native(), capacity=8, **SHAPE)
    random = np.random.default_rng(1)
    for prompt in range(50):
        text = random.integers(0, 99, 20).tolist()
        guess(table, text, prompt_len=2, prompts=[prompt])
    assert guess(table, [*text[:8]], prompt_len=7, prompts=[prompt], room=2)[0] in ([], text[8:10])


def ngram(max_guesses: int = 5, **settings: int) -> DraftSource:
    chosen = NgramSettings(max_guesses=max_guesses, **settings)
    return DraftSource(bytes_per_token=0, make=lambda slots, seats: NgramDrafter(chosen, seats, load_native()))


def test_a_greedy_text_that_repeats_itself_takes_few_steps() -> None:
    model = make_model()
    prompt = [5, 6, 7, 8] * 5
    plain, fast = make_core(model), make_core(model, drafts=ngram())
    wanted = run(plain, [request("a", prompt, 90)])
    assert run(fast, [request("a", prompt, 90)])[0].token_ids == wanted[0].token_ids
    before = fast.stats().num_steps_total
    assert all(answer.token_ids == wanted[0].token_ids for answer in run(fast, [request("b", prompt, 90)]))
    steps = fast.stats().num_steps_total - before
    assert 3 * steps < plain.stats().num_steps_total, "a sibling knows the whole answer"
    accept_len = fast.stats().accept_len
    assert accept_len is not None and accept_len > 3
