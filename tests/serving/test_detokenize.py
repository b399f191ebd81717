from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from skyrl_train.serving.detokenize import REPLACEMENT, Detokenizer, decode
from tests.tiny import make_tokenizer

TEXT = "naïve 1 €uro, 😀😀🇨🇭 日本語 x"


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Llama-2's kind: a space is ▁, the first one is dropped, unknown characters fall back to <0xNN> bytes."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += ["▁", *"abcdefghijklmnopqrstuvwxyz1,", "▁e", "ur", "▁x"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={word: i for i, word in enumerate(words)},
            merges=[("▁", "e"), ("u", "r"), ("▁", "x")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push(i) for i in ids), detokenizer.flush()]


@pytest.mark.parametrize("make", [make_tokenizer, sentencepiece_like])
@pytest.mark.parametrize("text", [TEXT, TEXT * 5, "", "a  b", "€"])
def test_pieces_of_a_text_are_whole_characters_and_add_up_to_it(make: Any, text: str) -> None:
    tokenizer = make()
    ids = tokenizer.encode(text, add_special_tokens=False)
    found = pieces(tokenizer, ids)
    assert "".join(found) == text == decode(tokenizer, ids)
    assert not any(REPLACEMENT in piece for piece in found)


def test_a_character_comes_with_its_last_byte() -> None:
    tokenizer = make_tokenizer()
    assert pieces(tokenizer, list("a€b".encode())) == ["a", "", "", "€", "b", ""]


def test_half_a_character_at_the_end_is_shown_when_the_answer_is_over() -> None:
    assert pieces(make_tokenizer(), [97, 0xE2, 0x82]) == ["a", "", "", REPLACEMENT]


def test_special_tokens_have_no_text_and_split_no_character() -> None:
    assert "".join(pieces(make_tokenizer(), [257, 0xE2, 258, 0x82, 0xAC, 256])) == "€"


@pytest.mark.parametrize("seed", range(40))
def test_any_ids_of_a_byte_level_tokenizer_add_up_to_their_decoding(seed: int) -> None:
    tokenizer = make_tokenizer()
    draw = random.Random(seed)
    garbage = draw.random()
    ids: list[int] = []
    while len(ids) < 120:
        ids += (
            [draw.randrange(128, 300)] * draw.choice([1, 1, 6]) if draw.random() < garbage else list("é€😀 a".encode())
        )
    found = pieces(tokenizer, ids)
    assert "".join(found) == decode(tokenizer, ids)


def test_text_goes_on_after_bytes_that_are_no_character() -> None:
    tokenizer = sentencepiece_like()
    byte_ids = [3 + byte for byte in "é".encode() + b"\xff" * 30]
    tail = tokenizer.encode(" eur x", add_special_tokens=False)
    text = "".join(pieces(tokenizer, byte_ids + tail))
    assert text.startswith("é" + REPLACEMENT) and text.endswith(" eur x")
