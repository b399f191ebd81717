"""A model behind any OpenAI-compatible endpoint scores the answer: one turn, reward from 0 to 1.

    question, answer, target ──► prompt ──► POST <base_url>/chat/completions ──► text ──► last "Score: 7" ──► 0.7

A judge that can't be reached is asked again after a growing pause; one that says no (bad key, unknown model), or whose
answer holds no score, fails the trajectory. Nothing is made up: there is no score that stands for "don't know".
"""

from __future__ import annotations

import functools
import os
import re
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import httpx

from skyrl_train.config.schema_data import JudgeEnvironment
from skyrl_train.environments.base import StepOutput
from skyrl_train.errors import EnvironmentFailure
from skyrl_train.types import Message

_lock = threading.Lock()

MAX_SHOWN = 120
RETRIED_STATUS = frozenset({408, 409, 429, 500, 502, 503, 504})


class LLMJudgeEnv:
    """Reads its keys from `env_config.llm_as_a_judge`; the row gives `reward_spec.ground_truth`, if there is one."""

    def __init__(self, *, env_config: Any, extras: Mapping[str, Any]) -> None:
        self._keys: JudgeEnvironment = env_config.llm_as_a_judge
        specification = extras.get("reward_spec")
        self._target = specification.get("ground_truth", "") if isinstance(specification, Mapping) else ""
        self._question = ""

    def init(self, prompt: list[Message]) -> tuple[Sequence[Message], Mapping[str, Any]]:
        asked = [message["content"] for message in prompt if message["role"] == "user"]
        self._question = str(asked[-1]) if asked else ""
        return prompt, {}

    def step(self, action: str) -> StepOutput:
        keys = self._keys
        asked = fill(keys.prompt_template, question=self._question, answer=action, target=str(self._target))
        score = read_score(ask(keys, asked), keys)
        reward = (score - keys.min_score) / (keys.max_score - keys.min_score)
        return StepOutput(observations=[], reward=reward, done=True, metadata={"judge_score": score})

    def close(self) -> None:
        pass


def fill(template: str, **values: str) -> str:
    """`{name}` becomes the value, in one pass: braces in an answer stay what they are."""
    return re.sub("|".join(rf"\{{{name}\}}" for name in values), lambda match: values[match[0][1:-1]], template)


def read_score(text: str, keys: JudgeEnvironment) -> float:
    """The last score in the judge's answer. Raises EnvironmentFailure when there is none within the scale."""
    found = [match[1] for match in re.finditer(keys.score_pattern, text)]
    if not found:
        raise EnvironmentFailure(
            f"judge {keys.model} answered {text[-MAX_SHOWN:]!r}: no score (environment.llm_as_a_judge.score_pattern)"
        )
    try:
        score = float(found[-1])
    except (TypeError, ValueError):
        raise EnvironmentFailure(f"judge {keys.model} answered score {found[-1]!r}, which is no number") from None
    if not keys.min_score <= score <= keys.max_score:
        raise EnvironmentFailure(
            f"judge {keys.model} answered score {score:g}; its scale is {keys.min_score:g} to {keys.max_score:g}"
        )
    return score


def ask(keys: JudgeEnvironment, text: str) -> str:
    """The judge's answer. Raises EnvironmentFailure when it refuses, or can't be reached in all attempts."""
    delay_s = keys.retry_delay_s
    for attempt in range(keys.max_retries + 1):
        if attempt:
            time.sleep(delay_s)
            delay_s *= 2
        try:
            answer = _post(keys, text)
        except httpx.TransportError as exc:
            problem = f"{type(exc).__name__}: {exc}"
            continue
        if answer.status_code in RETRIED_STATUS:
            problem = f"status {answer.status_code}: {answer.text[:MAX_SHOWN]!r}"
            continue
        if answer.status_code != httpx.codes.OK:
            raise EnvironmentFailure(
                f"judge {keys.model} at {keys.base_url} refused: status {answer.status_code}: "
                f"{answer.text[:MAX_SHOWN]!r}"
            )
        return _content(answer, keys)
    raise EnvironmentFailure(
        f"judge {keys.model} at {keys.base_url} can't be reached, {keys.max_retries + 1} attempts; last: {problem}"
    )


def _post(keys: JudgeEnvironment, text: str) -> httpx.Response:
    headers = {}
    if keys.api_key_env is not None:
        key = os.environ.get(keys.api_key_env)
        if not key:
            raise EnvironmentFailure(f"environment.llm_as_a_judge.api_key_env: variable {keys.api_key_env} is not set")
        headers["Authorization"] = f"Bearer {key}"
    return _client().post(
        f"{str(keys.base_url).rstrip('/')}/chat/completions",
        headers=headers,
        json={
            "model": keys.model,
            "messages": [{"role": "user", "content": text}],
            "temperature": keys.temperature,
            "max_tokens": keys.max_tokens,
        },
        timeout=keys.request_timeout_s,
    )


def _content(answer: httpx.Response, keys: JudgeEnvironment) -> str:
    try:
        content = answer.json()["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        content = None
    if not isinstance(content, str):
        raise EnvironmentFailure(
            f"judge {keys.model} at {keys.base_url} sent no chat completion: {answer.text[:MAX_SHOWN]!r}"
        )
    return content


def _client() -> httpx.Client:
    """One pool of connections for all threads."""
    with _lock:  # threads that come at once would each make one
        return _shared_client()


@functools.cache
def _shared_client() -> httpx.Client:
    return httpx.Client(limits=httpx.Limits(max_connections=256))
