"""The bodies of requests: every field is read, refused by name, or unknown. Null is as good as absent."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from skyrl_train.serving.formats import asked_grammar, usable_format
from skyrl_train.types import Grammar

MAX_CHOICES = 128
MAX_INT32 = 2**31 - 1
MIN_TEMPERATURE = 1e-4
"""Below it, logits over temperature leave float32's range. 0 is greedy."""

Prompt = str | list[int]


class Body(BaseModel):
    """JSON types are taken as they are: "5" is no number, true is no 1."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid", frozen=True)
    passes_on_unknown: ClassVar[bool] = False

    @model_validator(mode="before")
    @classmethod
    def _names_are_known(cls, data: Any) -> Any:
        if isinstance(data, dict) and not cls.passes_on_unknown:
            for name in data:
                if name not in cls.model_fields:
                    near = difflib.get_close_matches(str(name), cls.model_fields, n=1)
                    hint = f"; did you mean {near[0]}?" if near else ""
                    raise PydanticCustomError("named_field", "unknown field{hint}", {"field": name, "hint": hint})
        return data


def only(*values: Any, why: str) -> AfterValidator:
    """A field of OpenAI's that we can't honour: accepted where it asks for nothing."""

    def check(found: Any) -> Any:
        if found is None or any(found == value and type(found) is type(value) for value in values):
            return found
        raise PydanticCustomError("refused", "not supported: {why}", {"why": why})

    return AfterValidator(check)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _usable_temperature(value: float | None) -> float | None:
    if value is not None and 0 < value < MIN_TEMPERATURE:
        raise PydanticCustomError("refused", "must be 0 (greedy) or at least {limit}", {"limit": MIN_TEMPERATURE})
    return value


class StreamOptions(Body):
    """`include_usage`: one more piece before the end of the stream, without choices, with the usage."""

    include_usage: bool | None = None


class SamplingBody(Body):
    """What both endpoints take. Defaults are OpenAI's; extensions are named as in vLLM and SGLang."""

    model: str | None = Field(None, description="The served model; may be left out.")
    n: int | None = Field(None, ge=1, le=MAX_CHOICES, description="Answers to each prompt; 1.")
    max_tokens: int | None = Field(None, ge=1)
    temperature: Annotated[float | None, AfterValidator(_usable_temperature)] = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=MAX_INT32, description="Extension. 0 and -1 are off.")
    min_p: float | None = Field(None, ge=0, le=1, description="Extension. 0 is off.")
    repetition_penalty: float | None = Field(None, ge=0.01, le=100, description="Extension. 1 is off.")
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[list[Annotated[str, Field(min_length=1)]] | None, BeforeValidator(_as_list)] = Field(
        None, description="A string or several; the text ends before it."
    )
    stop_token_ids: list[Annotated[int, Field(ge=0)]] | None = Field(None, description="Extension.")
    ignore_eos: bool | None = Field(None, description="Extension. Go on after the end token.")
    min_tokens: int | None = Field(None, ge=0, description="Extension. No end before so many tokens.")
    regex: str | None = Field(None, description="Extension. The answer follows this regular expression.")
    ebnf: str | None = Field(None, description="Extension. The answer follows this grammar, from its rule root on.")
    return_token_ids: bool | None = Field(None, description="Extension. Ids of prompt and answer, policy versions.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: Annotated[dict[str, Any] | None, only({}, why="logits are changed by penalties only")] = None
    user: Annotated[str | None, only(why="nothing is recorded by user")] = None

    @property
    def grammar(self) -> Grammar | None:
        """What the answer must follow."""
        return asked_grammar(response_format=None, regex=self.regex, ebnf=self.ebnf)

    @model_validator(mode="after")
    def _one_grammar(self) -> SamplingBody:
        names = ("regex", "ebnf", "response_format")
        given = [name for name in names if getattr(self, name, None) not in (None, {"type": "text"})]
        beside = [*given[1:], *(["min_tokens"] if given and self.min_tokens else [])]
        if beside:
            raise PydanticCustomError(
                "named_field",
                "does not go with {other}; leave one of them out",
                {"field": beside[0], "other": given[0]},
            )
        return self

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> SamplingBody:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError(
                "named_field", "is only for stream: true", {"field": "stream_options", "hint": ""}
            )
        return self


def read_prompts(value: Any) -> list[Prompt]:
    """A string, token ids, or a list of either kind -> a list of prompts."""
    if isinstance(value, str) or _is_token_ids(value):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return list(value)
        if all(_is_token_ids(item) for item in value):
            return list(value)
    raise PydanticCustomError(
        "prompt", "must be a string, a list of strings, a list of token ids or a list of lists of token ids"
    )


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


class CompletionBody(SamplingBody):
    """POST /v1/completions."""

    prompt: Annotated[
        list[Prompt], PlainValidator(read_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]])
    ]
    logprobs: Annotated[
        int | None, only(0, why="only the sampled token's own log-probability is known; set logprobs to 0")
    ] = None
    echo: Annotated[bool | None, only(False, why="a prompt has no log-probabilities here; send it to yourself")] = None
    best_of: Annotated[int | None, only(1, why="ask for n answers and choose")] = None
    suffix: Annotated[str | None, only("", why="there is no insertion")] = None


def _join_parts(value: Any) -> Any:
    """Content in parts, all of them text -> one string, a line for each part."""
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        if not isinstance(part, dict) or set(part) != {"type", "text"} or part["type"] != "text":
            raise PydanticCustomError("refused", "only text parts ({form}) are supported", {"form": _TEXT_PART})
        if not isinstance(part["text"], str):
            raise PydanticCustomError("refused", "the text of a part must be a string")
        texts.append(part["text"])
    return "\n".join(texts)


_TEXT_PART = '{"type": "text", "text": ...}'


class ChatMessage(Body):
    """One message. Other keys than these are for the chat template, and refused if it doesn't mention them."""

    model_config = ConfigDict(extra="allow")
    passes_on_unknown = True

    role: Annotated[str, Field(min_length=1)]
    content: Annotated[str | None, BeforeValidator(_join_parts)] = None


_NO_TOOLS = "there are no tool calls"


class ChatBody(SamplingBody):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, description="OpenAI's newer name of max_tokens.")
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, only(0, why="only the sampled token's own log-probability is known")] = None
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Extension. Variables for the template.")
    tools: Annotated[list[Any] | None, only([], why=_NO_TOOLS)] = None
    tool_choice: Annotated[Any, only("none", "auto", why=_NO_TOOLS)] = None
    parallel_tool_calls: Annotated[bool | None, only(True, False, why=_NO_TOOLS)] = None
    response_format: Annotated[dict[str, Any] | None, AfterValidator(usable_format)] = Field(
        None, description="JSON, after a schema or any object; text is off."
    )
    modalities: Annotated[list[Any] | None, only(["text"], why="answers are plain text")] = None
    reasoning_effort: Annotated[Any, only(why="use chat_template_kwargs")] = None
    store: Annotated[bool | None, only(False, why="nothing is stored")] = None
    metadata: Annotated[dict[str, Any] | None, only({}, why="nothing is stored")] = None

    @property
    def grammar(self) -> Grammar | None:
        return asked_grammar(response_format=self.response_format, regex=self.regex, ebnf=self.ebnf)

    @model_validator(mode="after")
    def _one_limit(self) -> ChatBody:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise PydanticCustomError(
                "named_field",
                "{limit} is not max_tokens {other}; set one of them",
                {"field": "max_completion_tokens", "limit": self.max_completion_tokens, "other": self.max_tokens},
            )
        return self
