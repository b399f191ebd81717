from __future__ import annotations

from typing import Any

import pytest
import torch

from skyrl_train.engines.embedded.stops import completed_stop
from skyrl_train.errors import RequestRejected
from tests.engines.embedded.common import make_core, request, run
from tests.tiny import EOS_ID, make_model, make_tokenizer

TOKENIZER = make_tokenizer()


def script_model(answer: bytes | list[int], prompt_len: int) -> Any:
    """A model whose answer to any prompt of `prompt_len` tokens is this script: position p says script[p + 1 - len].

    Learned positions do the work: hidden state p is the p-th unit vector, the head maps it to the scripted token.
    """
    ids = list(answer)
    model = make_model("gpt2", num_hidden_layers=1, max_position_embeddings=64, activation_function="relu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.transformer.ln_f.weight.fill_(1.0)
        model.transformer.wpe.weight.copy_(torch.eye(64) * 8)
        head = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
        for i, token in enumerate(ids):
            head[token, prompt_len - 1 + i] += 10.0
        model.lm_head.weight = head
    return model


def answer_of(script: bytes | list[int], max_new: int = 30, **sampling: Any) -> Any:
    core = make_core(script_model(script, prompt_len=3), max_context_len=64)
    return run(core, [request("a", (1, 2, 3), max_new, **sampling)])[0]


def test_the_scripted_model_says_its_script() -> None:
    assert bytes(answer_of(b"hello world", 11).token_ids) == b"hello world"


def test_a_stop_string_over_many_tokens_is_kept_in_full() -> None:
    answer = answer_of(b"so 42 END and more", stop=("END",))
    assert bytes(answer.token_ids) == b"so 42 END"
    assert (answer.finish_reason, answer.stop_reason) == ("stop", "END")
    assert len(answer.logprobs) == 9


def test_a_false_start_of_a_stop_string_goes_on() -> None:
    assert bytes(answer_of(b"EEN ENEND!", stop=("END",)).token_ids) == b"EEN ENEND"


def test_the_first_stop_string_to_be_complete_ends_the_answer() -> None:
    answer = answer_of(b"a</s>b", stop=("never", "</s>b", "</s>"))
    assert answer.stop_reason == "</s>"


def test_two_strings_completed_by_one_token_name_the_one_that_begins_first() -> None:
    assert answer_of(b"xyz", stop=("z", "yz")).stop_reason == "yz"


def test_a_stop_string_of_multibyte_characters_is_found_at_its_last_byte() -> None:
    script = "naïve 🙂 ok".encode()
    answer = answer_of(script, stop=("🙂",))
    assert bytes(answer.token_ids).decode() == "naïve 🙂"
    assert answer.stop_reason == "🙂"


def test_broken_bytes_do_not_hide_a_stop_string() -> None:
    answer = answer_of(b"\xff\xe2\x82END", stop=("END",))
    assert bytes(answer.token_ids) == b"\xff\xe2\x82END"


def test_a_stop_string_before_half_a_character_is_found_at_once() -> None:
    answer = answer_of("a!é".encode(), stop=("!",))
    assert bytes(answer.token_ids) == b"a!"


def test_a_special_token_can_be_a_stop_string() -> None:
    answer = answer_of([*b"hi", 257, *b"no"], stop=("<|im_start|>",))
    assert answer.token_ids == (*b"hi", 257)


def test_a_stop_string_longer_than_what_was_said_is_not_found() -> None:
    assert completed_stop(TOKENIZER, list(b"EN"), ("END",)) is None


@pytest.mark.parametrize("length", [0, 1, 5, 40, 200])
def test_a_stop_string_is_found_wherever_it_ends(length: int) -> None:
    ids = list(b"x" * length + b"STOP")
    assert [completed_stop(TOKENIZER, ids[:n], ("STOP",)) for n in range(1, len(ids))] == [None] * (len(ids) - 1)
    assert completed_stop(TOKENIZER, ids, ("STOP",)) == "STOP"


def test_tokens_without_text_do_not_push_the_string_out_of_the_window() -> None:
    half_characters = [0xE2] * 50  # each is replaced by one character at most, and none at the end
    ids = [*b"ST", *half_characters, *b"OP"]
    assert completed_stop(TOKENIZER, ids, ("OP",)) == "OP"


def test_stop_ids_end_the_answer_and_are_named() -> None:
    answer = answer_of(b"one.two", stop_token_ids=(ord("."),))
    assert bytes(answer.token_ids) == b"one."
    assert (answer.finish_reason, answer.stop_reason) == ("stop", ord("."))


def test_many_stop_ids_of_one_request_leave_the_others_alone() -> None:
    core = make_core(script_model(b"abc.def", prompt_len=3), max_context_len=64)
    first, second = run(
        core,
        [
            request("many", (1, 2, 3), 7, stop_token_ids=tuple(range(40, 60))),
            request("none", (4, 5, 6), 7),
        ],
    )
    assert bytes(first.token_ids) == b"abc."
    assert bytes(second.token_ids) == b"abc.def"


def test_the_length_is_the_last_reason() -> None:
    answer = answer_of(b"abcd", 4, stop=("d",))
    assert answer.finish_reason == "stop"
    assert answer_of(b"abcd", 4).finish_reason == "length"


def test_min_new_tokens_forbids_end_tokens_and_ignores_strings_until_then() -> None:
    script = [*b"a", EOS_ID, *b"b", EOS_ID, *b"cd"]
    answer = answer_of(script, min_new_tokens=3)
    assert answer.token_ids[3] == EOS_ID and len(answer.token_ids) == 4
    assert answer.token_ids[0] == ord("a") and answer.token_ids[1] != EOS_ID
    assert bytes(answer_of(b"!a!b!c", min_new_tokens=3, stop=("!",)).token_ids) == b"!a!b!"


def test_min_new_tokens_forbids_stop_ids_in_sampling_too() -> None:
    model = make_model()
    core = make_core(model)
    stops = tuple(range(0, 300, 2))
    answers = run(
        core,
        [
            request(str(i), (1, 2, 3), 12, temperature=2.0, seed=i, min_new_tokens=6, stop_token_ids=stops)
            for i in range(8)
        ],
    )
    for answer in answers:
        assert all(token % 2 for token in answer.token_ids[:6])
        assert len(answer.token_ids) >= 7


def test_stop_strings_without_a_tokenizer_are_rejected() -> None:
    from skyrl_train.engines.embedded import EmbeddedConfig
    from skyrl_train.engines.embedded.core import EngineCore

    core = EngineCore(make_model(), None, config=EmbeddedConfig(kv_cache_tokens=64, max_context_len=64))
    with pytest.raises(RequestRejected, match="stop strings need a tokenizer"):
        core.add(request("a", (1,), stop=("x",)))
