"""For tests of several turns: chat templates of the field, a scripted policy and a scripted environment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerFast

from skyrl_train.rollout.agent import Agent, with_seed
from skyrl_train.types import (
    Completion,
    GenerateRequest,
    Message,
    Prompt,
    SamplingParams,
    Trajectory,
    TrajectoryId,
    VersionSpan,
)
from tests.tiny import make_tokenizer

TEMPLATES: Mapping[str, tuple[str, str]] = {
    # name: (the token that ends a turn, template)
    "chatml": (
        "<|im_end|>",
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    ),
    "chatml with a default system prompt": (
        "<|im_end|>",
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    ),
    "llama 3": (
        "<|eot_id|>",
        "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
        "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    ),
    "no newline": (
        "</s>",
        "<s>{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] }}</s>{% else %}"
        "[INST]{{ m['content'] }}[/INST]{% endif %}{% endfor %}",
    ),
    "space and newline before the end token": (
        "</s>",
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s> \n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    ),
}
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{{ m['content'].split('</think>')[-1] }}{% else %}{{ m['content'] }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Drops the reasoning of all earlier answers, as Qwen3's does."""


def tokenizer_with(name: str) -> PreTrainedTokenizerFast:
    """The byte-level tokenizer with a template's special tokens, and its end token as the model's."""
    end, template = TEMPLATES[name]
    tokenizer = make_tokenizer()
    markers = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<s>", "</s>", "[INST]"]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *markers, "[/INST]"]})
    tokenizer.eos_token = end
    tokenizer.chat_template = template
    return tokenizer


class ScriptedEnv:
    """Answers by `extras["script"]`: a list of what each step returns, an exception among it is raised."""

    runs_inline = True
    log: list[str]

    def __init__(self, *, env_config: Any, extras: dict[str, Any]) -> None:
        self.script = list(extras["script"])
        self.log = extras.setdefault("log", [])
        self.max_turns = extras["max_turns"]

    def init(self, prompt: list[Message]) -> tuple[Sequence[Message], Mapping[str, Any]]:
        return prompt, {}

    def step(self, action: str) -> Any:
        self.log.append(action)
        output = self.script.pop(0)
        if isinstance(output, Exception):
            raise output
        return {"observations": [], "reward": 0.0, "done": not self.script, "metadata": {}, **output}

    def close(self) -> None:
        self.log.append("closed")


class ScriptedPolicy:
    """A GenerateFn that answers with these token ids in turn; token k of all has the log-probability -k / 100."""

    def __init__(self, answers: Sequence[Sequence[int]], finish: Sequence[str] = ()) -> None:
        self.answers = [tuple(answer) for answer in answers]
        self.finish = [*finish, *["stop"] * (len(answers) - len(finish))]
        self.requests: list[GenerateRequest] = []
        self.num_tokens = 0

    async def __call__(self, request: GenerateRequest) -> Completion:
        ids = self.answers[len(self.requests)]
        finish: Any = self.finish[len(self.requests)]
        self.requests.append(request)
        begin = self.num_tokens
        self.num_tokens += len(ids)
        return Completion(
            request_id=request.request_id,
            token_ids=ids,
            logprobs=tuple(-k / 100 for k in range(begin, self.num_tokens)),
            finish_reason=finish,
            versions=(VersionSpan(version=3, start=0, end=len(ids)),) if ids else (),
        )


ASKED: tuple[Message, ...] = ({"role": "user", "content": "What is 2 + 3?"},)


async def converse(policy: Any, script: Sequence[Any], *, log: list[str] | None = None, **options: Any) -> Trajectory:
    """One trajectory of at most 10 turns from ASKED, if not said otherwise."""
    options = {"max_turns": 10, "tokenizer": make_tokenizer(), "environments": {"scripted": ScriptedEnv}, **options}
    agent = Agent(generate=policy, **options)
    extras: dict[str, Any] = {"script": script} if log is None else {"script": script, "log": log}
    prompt = Prompt(prompt_id="p", messages=ASKED, environment="scripted", extras=extras)
    trajectory_id = TrajectoryId(prompt_id="p", sample=0)
    sampling = with_seed(SamplingParams(max_new_tokens=8), 7, trajectory_id)
    return await agent.run(trajectory_id, prompt, agent.render(prompt), sampling)


def says(text: str, role: str = "user", **more: Any) -> dict[str, Any]:
    """A step's output with one observation."""
    return {"observations": [{"role": role, "content": text}], **more}
