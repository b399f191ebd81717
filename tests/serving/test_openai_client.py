"""What people's programs use: the client package of OpenAI, unchanged."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from tests.serving.running import Served

MESSAGES: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "12+7="}]


@pytest.fixture
def api(server: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def test_completions(api: openai.OpenAI) -> None:
    answer = api.completions.create(model="tiny", prompt="12+7=", max_tokens=5, seed=1, logprobs=0, n=2)
    assert [choice.index for choice in answer.choices] == [0, 1]
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.token_logprobs is not None and len(logprobs.token_logprobs) == 5
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None


def test_chat_and_its_stream_agree(api: openai.OpenAI) -> None:
    whole = api.chat.completions.create(model="tiny", messages=MESSAGES, max_completion_tokens=30, seed=4)
    assert whole.choices[0].message.role == "assistant" and whole.usage is not None
    text, usage, reason = "", None, None
    stream = api.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        max_completion_tokens=30,
        seed=4,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reason = choice.finish_reason or reason
    assert text == whole.choices[0].message.content and reason == whole.choices[0].finish_reason
    assert usage is not None and usage.completion_tokens == whole.usage.completion_tokens


def test_chat_logprobs_and_extensions(api: openai.OpenAI) -> None:
    answer = api.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        max_tokens=6,
        logprobs=True,
        extra_body={"top_k": 5, "min_p": 0.01, "repetition_penalty": 1.1, "ignore_eos": True, "return_token_ids": True},
    )
    [choice] = answer.choices
    assert choice.logprobs is not None and choice.logprobs.content is not None
    assert len(choice.logprobs.content) == 6 == len(choice.model_extra["token_ids"])  # type: ignore[index]


def test_models(api: openai.OpenAI) -> None:
    assert [model.id for model in api.models.list()] == ["tiny"]
    assert api.models.retrieve("tiny").object == "model"


def test_errors_are_the_clients_own(api: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        api.chat.completions.create(model="other", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        api.completions.create(model="tiny", prompt="a", temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        api.completions.create(model="tiny", prompt="x" * 5000, stream=True)
    assert long.value.code == "context_length_exceeded"
