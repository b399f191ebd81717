"""What of a conversation is learned: the assistant's tokens and the token that ends them."""

from __future__ import annotations

from typing import Any

import pytest

from skyrl_train.data.conversations import check_conversation, encode_conversation
from skyrl_train.errors import ConfigError, DataError
from tests.tiny import EOS_ID, make_tokenizer


def say(*texts: str) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def test_two_answers_are_one_sequence_with_two_runs_of_loss() -> None:
    tokenizer = make_tokenizer()
    (sample,) = encode_conversation(tokenizer, say("2+3", "5", "and 1", "6"), name="row")
    text = tokenizer.decode(sample.token_ids)
    assert text == (
        "<|im_start|>user\n2+3<|im_end|>\n<|im_start|>assistant\n5<|im_end|>\n"
        "<|im_start|>user\nand 1<|im_end|>\n<|im_start|>assistant\n6<|im_end|>"
    )
    assert sample.token_ids[sample.loss_mask].tolist() == [ord("5"), EOS_ID, ord("6"), EOS_ID]
    assert sample.advantages.tolist() == sample.loss_mask.float().tolist()


def test_a_template_that_edits_the_history_gives_a_sequence_for_each_answer() -> None:
    """As templates do that drop earlier reasoning: only the last assistant message keeps its brackets."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{% if m['role'] == 'assistant' and not loop.last %}"
        "{{ m['content'].split(')')[-1] }}{% else %}{{ m['content'] }}{% endif %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    first, second = encode_conversation(tokenizer, say("a", "(hm)b", "c", "(so)d"), name="row")
    assert tokenizer.decode(first.token_ids) == "<|im_start|>a<|im_end|><|im_start|>(hm)b<|im_end|>"
    assert tokenizer.decode(second.token_ids).startswith("<|im_start|>a<|im_end|><|im_start|>b<|im_end|>")
    assert tokenizer.decode(second.token_ids[second.loss_mask]) == "(so)d<|im_end|>"


def test_a_template_that_hides_where_the_answer_begins_is_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}[answer]{% endif %}"
    )
    with pytest.raises(ConfigError, match=r"can't be told from the rest \(message 1 of row\)"):
        encode_conversation(tokenizer, say("a", "b"), name="row")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (say("a"), "needs an assistant message"),
        ([{"role": "assistant", "content": "a"}], "needs an assistant message"),
        ([*say("a"), {"role": "assistant", "content": None}], "must be text, found None"),
    ],
)
def test_what_teaches_nothing_is_refused(messages: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_conversation(messages)
