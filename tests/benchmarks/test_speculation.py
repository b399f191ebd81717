"""The benchmark of speculation: its texts are what they are called, and what it serves is the same in every way."""

from __future__ import annotations

import random
from itertools import pairwise

from benchmarks.speculation import LINE_LEN, NUM_LINES, TEXTS, Language, requests_of, serve
from skyrl_train.engines.embedded.drafts.build import ngram_source
from skyrl_train.engines.embedded.drafts.ngram import NgramSettings
from tests.engines.embedded.common import make_core
from tests.tiny import make_model


def test_repetitive_text_has_few_lines_and_plain_text_many_successors() -> None:
    language, draw = Language(seed=0), random.Random(1)
    kinds = {}
    for kind in TEXTS:
        words = language.text(kind, 2000, draw)
        pairs = set(pairwise(words))
        kinds[kind] = len(pairs)
    assert kinds["repetitive"] <= NUM_LINES * (LINE_LEN[1] + NUM_LINES) < kinds["plain"]


def test_a_round_counts_what_was_sampled_and_how_much_was_guessed() -> None:
    requests = requests_of("repetitive", 3, Language(seed=0), prompt_len=30, num_new=20, seed=1)
    model = make_model(vocab_size=512)
    off, drafting = make_core(model), make_core(model, drafts=ngram_source(NgramSettings(max_guesses=3)))
    plain, guessed, again = serve(off, requests), serve(drafting, requests), serve(drafting, requests)
    assert plain.answers == guessed.answers == again.answers
    assert plain.accept_len is None and again.accept_len is not None and again.accept_len > 2
    assert plain.tokens_per_s > 0
