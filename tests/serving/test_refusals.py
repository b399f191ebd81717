from __future__ import annotations

from typing import Any

import httpx
import pytest

USER = [{"role": "user", "content": "a"}]


def refusal(client: httpx.Client, path: str, body: Any) -> dict[str, Any]:
    response = client.post(f"/v1/{path}", json=body)
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    assert error["type"] == "invalid_request_error" and set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"max_tokns": 3}, "max_tokns", "unknown field; did you mean max_tokens?"),
        ({"guided_json": {}}, "guided_json", "unknown field"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage", "unknown field"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream: true"),
        ({"max_tokens": "5"}, "max_tokens", "integer, found '5'"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0, found -1"),
        ({"temperature": 1e-45}, "temperature", "0 (greedy) or at least"),
        ({"temperature": True}, "temperature", "number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"top_k": 2**40}, "top_k", "less than or equal to 2147483647"),
        ({"min_p": 2}, "min_p", "less than or equal to 1"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty", "greater than or equal to 0.01"),
        ({"presence_penalty": 1e300}, "presence_penalty", "less than or equal to 2"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"seed": 2**63}, "seed", "less than"),
        ({"seed": 1.5}, "seed", "integer"),
        ({"stop": ""}, "stop.0", "at least 1 character"),
        ({"stop": [1]}, "stop.0", "string"),
        ({"stop_token_ids": [-1]}, "stop_token_ids.0", "greater than or equal to 0"),
        ({"stop_token_ids": [10**12], "min_tokens": 1}, "stop_token_ids", "outside the vocabulary of 300"),
        ({"min_tokens": 9, "max_tokens": 3}, "min_tokens", "9 is over max_tokens 3"),
        ({"echo": True}, "echo", "not supported"),
        ({"logprobs": 5}, "logprobs", "set logprobs to 0"),
        ({"best_of": 4}, "best_of", "not supported"),
        ({"best_of": True}, "best_of", "integer"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "not supported"),
        ({"user": "me"}, "user", "not supported"),
        ({"prompt": None}, "prompt", "must be a string, a list"),
        ({"prompt": []}, "prompt", "must be a string, a list"),
        ({"prompt": [[]]}, "prompt", "must be a string, a list"),
        ({"prompt": ["a", 1]}, "prompt", "must be a string, a list"),
        ({"prompt": [True]}, "prompt", "must be a string, a list"),
        ({"prompt": ""}, "prompt", "no tokens"),
    ],
)
def test_a_bad_field_is_refused_by_name(client: httpx.Client, body: dict[str, Any], param: str, says: str) -> None:
    error = refusal(client, "completions", {"prompt": "a", **body})
    assert error["param"] == param and says in error["message"] and param in error["message"]


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "required"),
        ({"messages": [{"content": "a"}]}, "messages.0.role", "required"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content", "string"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content", "only text parts"),
        ({"messages": [{"role": "user", "content": "a", "name": "x"}]}, "messages.0.name", "does not use it"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs.enable_thinking", "not use it"),
        ({"tools": [{"type": "function"}]}, "tools", "no tool calls"),
        (
            {"response_format": {"type": "xml"}},
            "response_format",
            'must be {"type": "text"}, {"type": "json_object"} or',
        ),
        ({"response_format": {"type": "json_object", "x": 1}}, "response_format", 'must be {"type": "text"}'),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format", "must have a schema"),
        ({"response_format": {"type": "json_object"}, "regex": "a"}, "response_format", "does not go with regex"),
        ({"ebnf": 'root ::= "a"', "min_tokens": 3}, "min_tokens", "does not go with ebnf"),
        ({"logprobs": True, "top_logprobs": 3}, "top_logprobs", "only the sampled"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens", "4 is not max_tokens 3"),
        ({"echo": True}, "echo", "unknown field"),
        ({"prompt": "a"}, "prompt", "unknown field"),
    ],
)
def test_a_bad_chat_field_is_refused_by_name(client: httpx.Client, body: dict[str, Any], param: str, says: str) -> None:
    error = refusal(client, "chat/completions", {"messages": USER, **body})
    assert error["param"] == param and says in error["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_does_not_fit_is_refused_with_the_numbers(client: httpx.Client, stream: bool) -> None:
    error = refusal(client, "completions", {"prompt": "x" * 3000, "stream": stream})
    assert error["param"] == "prompt" and error["code"] == "context_length_exceeded"
    assert "3000" in error["message"] and "2048" in error["message"]
    error = refusal(client, "completions", {"prompt": "x" * 2000, "max_tokens": 100, "stream": stream})
    assert error["param"] == "max_tokens" and "2100" in error["message"] and "leaves 48" in error["message"]
    error = refusal(client, "chat/completions", {"messages": [{"role": "user", "content": "x" * 3000}]})
    assert error["param"] == "messages"


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_refuses_has_a_status_even_for_a_stream(client: httpx.Client, stream: bool) -> None:
    error = refusal(client, "completions", {"prompt": [1, 99999], "stream": stream})
    assert "token id 99999 is outside the vocabulary of 300" in error["message"]


def test_an_unknown_model_is_not_found(client: httpx.Client) -> None:
    for path, body in (("completions", {"prompt": "a"}), ("chat/completions", {"messages": USER})):
        response = client.post(f"/v1/{path}", json={"model": "gpt-x", **body})
        assert response.status_code == 404
        error = response.json()["error"]
        assert error["code"] == "model_not_found" and error["param"] == "model" and "'tiny'" in error["message"]


def test_a_body_that_is_no_json_object_is_refused(client: httpx.Client) -> None:
    json_type = {"content-type": "application/json"}
    for content, headers, says in (
        (b'{"prompt": "a",}', json_type, "not JSON"),
        (b'{"prompt": "a", "temperature": NaN}', json_type, "temperature"),
        (b"[1]", json_type, "JSON object"),
        (b"", json_type, "required"),
        (b'{"prompt": "a"}', {"content-type": "text/plain"}, "application/json"),
    ):
        response = client.post("/v1/completions", content=content, headers=headers)
        assert response.status_code == 400 and says in response.json()["error"]["message"], response.text


def test_unknown_paths_and_methods_have_openais_error_shape(client: httpx.Client) -> None:
    for response, status in ((client.get("/v1/nothing"), 404), (client.get("/v1/completions"), 405)):
        assert response.status_code == status and response.json()["error"]["message"]


def test_the_server_goes_on_after_refusals(client: httpx.Client) -> None:
    assert client.get("/health").json() == {"status": "ok"}
