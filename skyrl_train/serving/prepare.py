"""From a request's body to engine requests: prompts to ids, limits, seeds, sampling parameters."""

from __future__ import annotations

import hashlib
import re
import uuid
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError

from skyrl_train.data.chat import render_prompt
from skyrl_train.engines.base import Capability, EngineInfo
from skyrl_train.serving.bodies import ChatBody, CompletionBody, SamplingBody
from skyrl_train.serving.errors import ApiError
from skyrl_train.serving.shapes import ChatShape, CompletionShape, Shape
from skyrl_train.types import GenerateRequest, SamplingParams

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default for /v1/completions; a chat answer may fill the context."""

TokenIds = tuple[int, ...]

_NEEDS: tuple[tuple[str, tuple[object, ...], Capability], ...] = (
    ("min_p", (None, 0), "min_p"),
    ("repetition_penalty", (None, 1), "penalties"),
    ("presence_penalty", (None, 0), "penalties"),
    ("frequency_penalty", (None, 0), "penalties"),
    ("seed", (None,), "seed"),
    ("stop", (None, []), "stop_strings"),
)
"""(field, values that ask for nothing, what the engine must be able to do for others)."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One HTTP request. `requests[p * n + k]` is answer k to prompt p."""

    call_id: str
    shape: Shape
    prompts: tuple[TokenIds, ...]
    requests: tuple[GenerateRequest, ...]
    choices_per_prompt: int
    stop: tuple[str, ...]
    with_logprobs: bool
    with_token_ids: bool
    streams: bool
    streams_usage: bool

    def prompt_of(self, index: int) -> TokenIds:
        return self.prompts[index // self.choices_per_prompt]

    def is_first_of_prompt(self, index: int) -> bool:
        return index % self.choices_per_prompt == 0

    @property
    def num_prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))


def prepare_completion(body: CompletionBody, tokenizer: Any, info: EngineInfo) -> Call:
    """Raises ApiError for what can't be served."""
    prompts = []
    for prompt in body.prompt:
        ids = tuple(prompt) if isinstance(prompt, list) else tuple(tokenizer(prompt)["input_ids"])
        if not ids:
            raise ApiError(400, "prompt: the text has no tokens; at least one is needed", param="prompt")
        prompts.append(ids)
    return _call(
        body,
        CompletionShape(),
        tuple(prompts),
        tokenizer,
        info,
        prompt_field="prompt",
        max_tokens=body.max_tokens,
        default_tokens=DEFAULT_COMPLETION_TOKENS,
        with_logprobs=body.logprobs is not None,
    )


def prepare_chat(body: ChatBody, tokenizer: Any, info: EngineInfo) -> Call:
    """Raises ApiError for what can't be served, messages that the chat template refuses among it."""
    return _call(
        body,
        ChatShape(),
        (_render(body, tokenizer),),
        tokenizer,
        info,
        prompt_field="messages",
        max_tokens=body.max_completion_tokens or body.max_tokens,
        default_tokens=info.max_context_len,
        with_logprobs=bool(body.logprobs),
    )


def _render(body: ChatBody, tokenizer: Any) -> TokenIds:
    template = tokenizer.chat_template
    if not template:
        raise ApiError(400, "this model's tokenizer has no chat template; use /v1/completions", param="messages")
    for index, message in enumerate(body.messages):
        extras = message.model_extra or {}
        if message.content is None and not extras:
            raise ApiError(400, f"messages.{index}.content is required", param=f"messages.{index}.content")
        _template_reads(template, extras, f"messages.{index}")
    variables = body.chat_template_kwargs or {}
    _template_reads(template, variables, "chat_template_kwargs")
    messages = [message.model_dump(exclude_unset=True) for message in body.messages]
    try:
        return render_prompt(tokenizer, messages, template_kwargs=variables)
    except (TemplateError, TypeError, ValueError) as exc:  # the template is a program over the client's data
        raise ApiError(400, f"messages: the chat template refused them: {exc}", param="messages") from exc


def _template_reads(template: str | dict[str, str], names: dict[str, Any], owner: str) -> None:
    """Refuse what the template never mentions: it would be dropped in silence."""
    source = "".join(template.values()) if isinstance(template, dict) else template
    for name in names:
        if not re.search(rf"\b{re.escape(name)}\b", source):
            raise ApiError(400, f"{owner}.{name}: this model's chat template does not use it", param=f"{owner}.{name}")


def _call(
    body: SamplingBody,
    shape: Shape,
    prompts: tuple[TokenIds, ...],
    tokenizer: Any,
    info: EngineInfo,
    *,
    prompt_field: str,
    max_tokens: int | None,
    default_tokens: int,
    with_logprobs: bool,
) -> Call:
    _check(body, tokenizer, info)
    call_id = f"{shape.id_prefix}-{uuid.uuid4().hex}"
    n = body.n or 1
    requests = []
    for first, prompt in zip(range(0, n * len(prompts), n), prompts, strict=True):
        room = _room(prompt, info, prompt_field, max_tokens)
        limit = max_tokens or min(default_tokens, room)
        requests += [
            GenerateRequest(
                request_id=f"{call_id}-{first + sample}",
                prompt_token_ids=prompt,
                sampling=_sampling(body, limit, sample_seed(body.seed, sample)),
            )
            for sample in range(n)
        ]
    return Call(
        call_id=call_id,
        shape=shape,
        prompts=prompts,
        requests=tuple(requests),
        choices_per_prompt=n,
        stop=tuple(body.stop or ()),
        with_logprobs=with_logprobs,
        with_token_ids=bool(body.return_token_ids),
        streams=bool(body.stream),
        streams_usage=bool(body.stream_options and body.stream_options.include_usage),
    )


def sample_seed(seed: int | None, sample: int) -> int | None:
    """The seed of answer `sample` to a prompt: the first has the request's own, so that n changes no answer."""
    if seed is None or sample == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _check(body: SamplingBody, tokenizer: Any, info: EngineInfo) -> None:
    """What the fields' own types and ranges don't say."""
    for name, off, capability in _NEEDS:
        if getattr(body, name) not in off and capability not in info.capabilities:
            raise ApiError(400, f"{name}: engine {info.name} can't do it", param=name)
    for token_id in body.stop_token_ids or ():
        if token_id >= len(tokenizer):
            raise ApiError(
                400,
                f"stop_token_ids: id {token_id} is outside the vocabulary of {len(tokenizer)}",
                param="stop_token_ids",
            )


def _room(prompt: TokenIds, info: EngineInfo, prompt_field: str, max_tokens: int | None) -> int:
    """Tokens that an answer can have. Raises ApiError if that is none, or less than asked for."""
    room = info.max_context_len - len(prompt)
    code = "context_length_exceeded"
    if room < 1:
        raise ApiError(
            400,
            f"{prompt_field}: {len(prompt)} tokens leave no room for an answer; prompt and answer together have "
            f"{info.max_context_len} tokens",
            param=prompt_field,
            code=code,
        )
    if max_tokens is not None and max_tokens > room:
        raise ApiError(
            400,
            f"max_tokens: a prompt of {len(prompt)} tokens and an answer of {max_tokens} need "
            f"{len(prompt) + max_tokens}; the model has {info.max_context_len}, which leaves {room} for the answer",
            param="max_tokens",
            code=code,
        )
    return room


def _sampling(body: SamplingBody, max_new_tokens: int, seed: int | None) -> SamplingParams:
    min_tokens = body.min_tokens or 0
    if min_tokens > max_new_tokens:
        raise ApiError(400, f"min_tokens: {min_tokens} is over max_tokens {max_new_tokens}", param="min_tokens")
    return SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(body.top_k or 0, 0),
        min_p=body.min_p or 0.0,
        repetition_penalty=body.repetition_penalty or 1.0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        min_new_tokens=min_tokens,
        stop=tuple(body.stop or ()),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
        seed=seed,
        grammar=body.grammar,
    )
