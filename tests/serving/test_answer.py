from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

import pytest

from skyrl_train.serving.answer import AnswerReader, num_held_back, read_whole
from skyrl_train.types import Completion, FinishReason, VersionSpan
from tests.tiny import EOS_ID, make_tokenizer

TOKENIZER = make_tokenizer()


class Piece:
    def __init__(self, ids: Sequence[int], first: int, completion: Completion | None) -> None:
        self.token_ids = tuple(ids)
        self.logprobs = tuple(-0.5 - i for i in range(first, first + len(ids)))
        self.completion = completion


def completed(ids: Sequence[int], reason: FinishReason, stop_reason: str | int | None = None) -> Completion:
    return Completion(
        request_id="r",
        token_ids=tuple(ids),
        logprobs=tuple(-0.5 - i for i in range(len(ids))),
        finish_reason=reason,
        versions=(VersionSpan(version=0, start=0, end=len(ids)),),
        stop_reason=stop_reason,
    )


def streamed(completion: Completion, stop: tuple[str, ...], cuts: Sequence[int]) -> list[str]:
    """The text pieces when the tokens come as [0, cuts[0]), [cuts[0], cuts[1]), ..."""
    reader = AnswerReader(TOKENIZER, stop=stop)
    ids = completion.token_ids
    bounds = [0, *cuts, len(ids)]
    return [reader.read(Piece(ids[a:b], a, completion if b == len(ids) else None)).text for a, b in pairwise(bounds)]


def test_the_text_ends_before_the_stop_string_and_the_ids_after_it() -> None:
    completion = completed(b"12 END", "stop", "END")
    whole = read_whole(TOKENIZER, completion, stop=("END",))
    assert whole.text == "12 " and bytes(whole.token_ids) == b"12 END"


def test_what_may_begin_a_stop_string_is_held_back_until_it_does_not() -> None:
    completion = completed(b"1 EN 2 END", "stop", "END")
    assert streamed(completion, ("END",), range(1, 10)) == ["1", " ", "", "", "EN ", "2", " ", "", "", ""]


def test_held_back_text_comes_when_the_answer_ends_for_another_reason() -> None:
    assert streamed(completed(b"1 EN", "length"), ("END",), [1, 2, 3]) == ["1", " ", "", "EN"]


def test_a_stop_string_before_min_tokens_stays_in_the_text() -> None:
    completion = completed(b"END END", "stop", "END")
    assert read_whole(TOKENIZER, completion, stop=("END",)).text == "END "
    assert "".join(streamed(completion, ("END",), range(1, 7))) == "END "


@pytest.mark.parametrize("stop_reason", [None, 120])
def test_a_token_that_ends_the_answer_has_no_text(stop_reason: int | None) -> None:
    completion = completed([*b"ab", 120 if stop_reason else EOS_ID], "stop", stop_reason)
    assert read_whole(TOKENIZER, completion).text == "ab"
    assert streamed(completion, (), [1, 2]) == ["a", "b", ""]


def test_each_sampled_token_has_its_logprob_and_its_place_in_the_text() -> None:
    answer = read_whole(TOKENIZER, completed([*"a€b".encode(), EOS_ID], "stop"), with_logprobs=True)
    assert answer.logprobs is not None
    assert [entry.logprob for entry in answer.logprobs] == [-0.5, -1.5, -2.5, -3.5, -4.5, -5.5]
    assert [entry.text_offset for entry in answer.logprobs] == [0, 1, 1, 1, 2, 3]
    assert answer.logprobs[-1].token == "<|im_end|>" and answer.text == "a€b"


@pytest.mark.parametrize("seed", range(30))
def test_a_stream_adds_up_to_the_whole_answer_however_it_is_cut(seed: int) -> None:
    draw = random.Random(seed)
    stop = ("ab", "é", "\n\n")
    ids = [draw.choice([*b"aab\nab", 0xC3, 0xA9, 0xFF, 270]) for _ in range(draw.randrange(1, 40))]
    reason, stop_reason, ids = draw.choice(
        [
            ("length", None, ids),
            ("stop", None, [*ids, EOS_ID]),
            ("stop", "ab", [*ids, *b"ab"]),
            ("stop", "é", [*ids, 0xC3, 0xA9]),
        ]
    )
    completion = completed(ids, reason, stop_reason)
    whole = read_whole(TOKENIZER, completion, stop=stop).text
    assert read_whole(TOKENIZER, completion, stop=stop, with_logprobs=True).text == whole
    for _ in range(5):
        cuts = sorted(draw.sample(range(1, len(ids)), draw.randrange(len(ids)))) if len(ids) > 1 else []
        assert "".join(streamed(completion, stop, cuts)) == whole


def test_held_back_is_the_longest_beginning_of_any_stop_string() -> None:
    assert num_held_back("12 EN", ("END",)) == 2
    assert num_held_back("12 END", ("END",)) == 0
    assert num_held_back("aab", ("abx", "aabb")) == 3
    assert num_held_back("", ("a",)) == 0
