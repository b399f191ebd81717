"""The two endpoints over HTTP, against the same model in this process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from skyrl_train.data.chat import render_prompt
from skyrl_train.engines.embedded import EmbeddedConfig, EmbeddedEngine
from skyrl_train.training.model import load_model
from skyrl_train.types import Completion, GenerateRequest, SamplingParams
from tests.tiny import make_tokenizer

TOKENIZER = make_tokenizer()
PROMPT = "12+7="
LONG = {"max_tokens": 60, "ignore_eos": True}


def post(client: httpx.Client, path: str, **body: Any) -> dict[str, Any]:
    response = client.post(f"/v1/{path}", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def complete(client: httpx.Client, **body: Any) -> dict[str, Any]:
    return post(client, "completions", **body)


def events(client: httpx.Client, path: str, **body: Any) -> list[dict[str, Any]]:
    """The stream's objects; it must end with [DONE]."""
    with client.stream("POST", f"/v1/{path}", json={**body, "stream": True}) as response:
        assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def generate(folder: Path, prompt: tuple[int, ...], **sampling: Any) -> Completion:
    async def run() -> Completion:
        config = EmbeddedConfig(max_num_seqs=4, kv_cache_tokens=4096)
        engine = EmbeddedEngine(load_model(folder), TOKENIZER, config=config)
        try:
            params = SamplingParams(**sampling)
            return await engine.generate(GenerateRequest(request_id="r", prompt_token_ids=prompt, sampling=params))
        finally:
            await engine.close()

    return asyncio.run(run())


def test_a_completion_has_openais_shape_and_the_engines_tokens(client: httpx.Client, model_folder: Path) -> None:
    expected = generate(model_folder, tuple(PROMPT.encode()), max_new_tokens=12, seed=5, ignore_eos=True)
    answer = complete(
        client, model="tiny", prompt=PROMPT, max_tokens=12, seed=5, ignore_eos=True, logprobs=0, return_token_ids=True
    )
    assert answer["id"].startswith("cmpl-") and answer["object"] == "text_completion" and answer["model"] == "tiny"
    assert isinstance(answer["created"], int) and answer["system_fingerprint"] == "policy-0"
    [choice] = answer["choices"]
    assert choice["index"] == 0 and choice["finish_reason"] == "length"
    assert choice["text"] == TOKENIZER.decode(expected.token_ids, skip_special_tokens=True)
    assert choice["token_ids"] == list(expected.token_ids) and choice["prompt_token_ids"] == list(PROMPT.encode())
    assert choice["policy_versions"] == [{"version": 0, "start": 0, "end": 12}]
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(expected.logprobs, abs=1e-5)
    assert len(choice["logprobs"]["tokens"]) == len(choice["logprobs"]["text_offset"]) == 12
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (5, 12, 17)


def test_chat_goes_through_the_chat_template(client: httpx.Client) -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hé"}]
    answer = post(
        client, "chat/completions", messages=messages, max_tokens=9, seed=1, logprobs=True, return_token_ids=True
    )
    assert answer["id"].startswith("chatcmpl-") and answer["object"] == "chat.completion"
    [choice] = answer["choices"]
    assert choice["prompt_token_ids"] == list(render_prompt(TOKENIZER, messages))
    assert choice["message"]["role"] == "assistant"
    entries = choice["logprobs"]["content"]
    assert len(entries) == answer["usage"]["completion_tokens"] == len(choice["token_ids"])
    for token_id, entry in zip(choice["token_ids"], entries, strict=True):
        assert entry["bytes"] == ([token_id] if token_id < 128 else entry["bytes"])
        assert entry["top_logprobs"] == [] and entry["logprob"] <= 0
    raw = complete(client, prompt=choice["prompt_token_ids"], max_tokens=9, seed=1)
    assert raw["choices"][0]["text"] == choice["message"]["content"]


def test_content_in_parts_is_joined_by_lines(client: httpx.Client) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    answers = [
        post(
            client,
            "chat/completions",
            messages=[{"role": "user", "content": content}],
            max_tokens=1,
            return_token_ids=True,
        )
        for content in (parts, "a\nb")
    ]
    assert answers[0]["choices"][0]["prompt_token_ids"] == answers[1]["choices"][0]["prompt_token_ids"]


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_stream_adds_up_to_the_answer(client: httpx.Client, path: str, seed: int) -> None:
    chat = path.startswith("chat")
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "€"}]} if chat else {"prompt": "€"}
    body |= {"seed": seed, "return_token_ids": True, "logprobs": True if chat else 0, **LONG}
    whole = post(client, path, **body)
    streamed = events(client, path, **body, stream_options={"include_usage": True})

    assert len({event["id"] for event in streamed}) == 1
    assert {event["object"] for event in streamed} == {"chat.completion.chunk" if chat else "text_completion"}
    last = streamed.pop()
    assert last["choices"] == [] and all(event["usage"] is None for event in streamed)
    assert {**last["usage"], "prompt_tokens_details": 0} == {**whole["usage"], "prompt_tokens_details": 0}
    assert len(streamed) > 2, "the answer came in one piece"

    choices = [event["choices"][0] for event in streamed]
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["length"]
    expected = whole["choices"][0]
    text = "".join((choice["delta"].get("content", "") if chat else choice["text"]) for choice in choices)
    assert text == (expected["message"]["content"] if chat else expected["text"])
    assert [token_id for choice in choices for token_id in choice["token_ids"]] == expected["token_ids"]
    assert [("prompt_token_ids" in choice) for choice in choices] == [True] + [False] * (len(choices) - 1)
    part = "content" if chat else "token_logprobs"
    logprobs = [entry for choice in choices for entry in choice["logprobs"][part]]
    values = [entry["logprob"] if chat else entry for entry in logprobs]
    wanted = [entry["logprob"] if chat else entry for entry in expected["logprobs"][part]]
    assert values == pytest.approx(wanted, abs=1e-5)
    if chat:
        assert [choice["delta"].get("role") for choice in choices] == ["assistant"] + [None] * (len(choices) - 1)


def test_sixteen_requests_at_once_give_the_text_that_each_gives_alone(client: httpx.Client) -> None:
    bodies = [{"prompt": f"{i}+{i * i}=", "max_tokens": 5 + 3 * i, "temperature": 0} for i in range(16)]
    alone = [complete(client, **body)["choices"][0]["text"] for body in bodies]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda body: complete(client, **body)["choices"][0]["text"], bodies))
    assert together == alone


def test_a_seed_gives_the_same_answer_again_and_another_seed_another(client: httpx.Client) -> None:
    texts = [complete(client, prompt=PROMPT, seed=seed, **LONG)["choices"][0]["text"] for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]


def test_n_answers_are_reproducible_different_and_the_first_is_that_of_n_1(client: httpx.Client) -> None:
    def texts(n: int) -> list[str]:
        answer = complete(client, prompt=PROMPT, seed=3, n=n, **LONG)
        assert [choice["index"] for choice in answer["choices"]] == list(range(n))
        assert answer["usage"]["prompt_tokens"] == 5 and answer["usage"]["completion_tokens"] == 60 * n
        return [choice["text"] for choice in answer["choices"]]

    assert texts(3) == texts(3) and len(set(texts(3))) == 3
    assert texts(3)[:1] == texts(1)


def test_several_prompts_of_either_kind_are_answered_as_each_alone(client: httpx.Client) -> None:
    prompts = ["1+1=", "22+3=", "4"]
    alone = [complete(client, prompt=prompt, max_tokens=6, seed=2)["choices"][0]["text"] for prompt in prompts]
    for form in (prompts, [list(prompt.encode()) for prompt in prompts]):
        answer = complete(client, prompt=form, max_tokens=6, seed=2)
        assert [choice["text"] for choice in answer["choices"]] == alone
        assert answer["usage"]["prompt_tokens"] == 4 + 5 + 1
    twice = complete(client, prompt=prompts, max_tokens=6, seed=2, n=2)["choices"]
    assert [choice["index"] for choice in twice] == list(range(6))
    assert [choice["text"] for choice in twice[::2]] == alone


def test_several_answers_stream_side_by_side(client: httpx.Client) -> None:
    body = {"prompt": ["a", "b"], "n": 2, "seed": 9, "max_tokens": 100, "ignore_eos": True}
    expected = [choice["text"] for choice in complete(client, **body)["choices"]]
    texts = [""] * 4
    order = []
    for event in events(client, "completions", **body):
        [choice] = event["choices"]
        texts[choice["index"]] += choice["text"]
        order.append(choice["index"])
    assert texts == expected
    assert order != sorted(order), "one after the other"


def test_a_stop_string_ends_the_text_before_it(client: httpx.Client) -> None:
    whole = complete(client, prompt=PROMPT, seed=0, return_token_ids=True, **LONG)["choices"][0]
    ids = whole["token_ids"]
    at = next(i for i in range(3, 50) if all(32 < token < 127 for token in ids[i : i + 2]))
    stop = bytes(ids[at : at + 2]).decode()
    expected = whole["text"][: whole["text"].index(stop)]
    body = {"prompt": PROMPT, "seed": 0, "stop": ["never this", stop], "return_token_ids": True, **LONG}
    choice = complete(client, **body)["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (expected, "stop")
    assert choice["token_ids"] == ids[: len(choice["token_ids"])] and stop.encode() == bytes(choice["token_ids"][-2:])
    assert "".join(event["choices"][0]["text"] for event in events(client, "completions", **body)) == expected
    assert complete(client, **{**body, "stop": stop})["choices"][0]["text"] == expected


def test_stop_token_ids_end_the_text_and_min_tokens_delays_the_end(client: httpx.Client) -> None:
    ids = complete(client, prompt=PROMPT, seed=0, return_token_ids=True, **LONG)["choices"][0]["token_ids"]
    body = {"prompt": PROMPT, "seed": 0, "stop_token_ids": [ids[4]], "return_token_ids": True, **LONG}
    choice = complete(client, **body)["choices"][0]
    assert choice["finish_reason"] == "stop" and choice["token_ids"] == ids[: ids.index(ids[4]) + 1]
    later = complete(client, **body, min_tokens=30)["choices"][0]
    assert len(later["token_ids"]) > 30 or later["finish_reason"] == "length"


SCHEMA = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}


@pytest.mark.parametrize(
    ("response_format", "is_wanted"),
    [
        ({"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}, lambda x: x in ({"n": 1}, {"n": 2})),
        ({"type": "json_object"}, lambda x: isinstance(x, dict)),
    ],
)
def test_a_chat_answer_follows_its_response_format(
    client: httpx.Client, response_format: dict[str, Any], is_wanted: Callable[[Any], bool]
) -> None:
    answers = post(
        client,
        "chat/completions",
        messages=[{"role": "user", "content": "hi"}],
        response_format=response_format,
        n=4,
        max_tokens=400,
    )["choices"]
    ended = [answer for answer in answers if answer["finish_reason"] == "stop"]
    assert ended and all(is_wanted(json.loads(answer["message"]["content"])) for answer in ended)


def test_a_completion_follows_a_regular_expression_or_a_grammar_streamed_or_not(client: httpx.Client) -> None:
    for grammar in ({"regex": "(yes|no)!"}, {"ebnf": 'root ::= ("yes" | "no") "!"'}):
        answer = complete(client, prompt=PROMPT, seed=3, **grammar)["choices"][0]
        pieces = events(client, "completions", prompt=PROMPT, seed=3, **grammar)
        assert answer["text"] in ("yes!", "no!") and answer["finish_reason"] == "stop"
        assert "".join(piece["choices"][0]["text"] for piece in pieces) == answer["text"]


def test_a_grammar_that_is_wrong_is_the_clients_error(client: httpx.Client) -> None:
    response = client.post("/v1/completions", json={"prompt": PROMPT, "regex": "(a"})
    assert response.status_code == 400
    assert "its grammar (regex) can't be used" in response.json()["error"]["message"]


def test_nulls_are_as_good_as_absent(client: httpx.Client) -> None:
    names = ["model", "n", "max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stop"]
    names += ["presence_penalty", "frequency_penalty", "stop_token_ids", "ignore_eos", "min_tokens", "logprobs", "echo"]
    names += [
        "stream",
        "stream_options",
        "return_token_ids",
        "best_of",
        "logit_bias",
        "user",
        "suffix",
        "regex",
        "ebnf",
    ]
    answer = complete(client, prompt=PROMPT, seed=1, **dict.fromkeys(names))
    expected = complete(client, prompt=PROMPT, seed=1, max_tokens=16)
    assert answer["choices"][0]["text"] == expected["choices"][0]["text"]


def test_values_that_ask_for_nothing_are_accepted(client: httpx.Client) -> None:
    off = {"echo": False, "best_of": 1, "logit_bias": {}, "suffix": "", "top_k": -1, "top_p": 1, "min_p": 0, "stop": []}
    plain = complete(client, prompt=PROMPT, seed=1)
    assert complete(client, prompt=PROMPT, seed=1, **off)["choices"][0]["text"] == plain["choices"][0]["text"]


def test_cached_tokens_of_a_prompt_are_counted(client: httpx.Client) -> None:
    prompt = "Nobody else sends a prompt with this beginning"
    first, second = (complete(client, prompt=prompt, max_tokens=2, n=2)["usage"] for _ in range(2))
    assert first["prompt_tokens_details"]["cached_tokens"] == 0
    assert second["prompt_tokens_details"]["cached_tokens"] == len(prompt) - 1


def test_a_chat_answer_may_fill_the_context(client: httpx.Client) -> None:
    content = "x" * 2000
    used = len(render_prompt(TOKENIZER, [{"role": "user", "content": content}]))
    answer = post(client, "chat/completions", messages=[{"role": "user", "content": content}], ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 2048 - used


def test_models_lists_the_one_that_is_served(client: httpx.Client) -> None:
    [card] = client.get("/v1/models").json()["data"]
    assert (card["id"], card["object"], card["max_model_len"]) == ("tiny", "model", 2048)
    assert client.get("/v1/models/tiny").json() == card
    assert client.get("/v1/models/some/other").status_code == 404
