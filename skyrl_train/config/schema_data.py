"""data and environment: what the policy is asked, and who scores it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from skyrl_train.config.fields import Fraction, Group, NonNegative, Positive, Strings


class Data(Group):
    """Prompts. Files are jsonl, json, parquet or a `datasets` folder."""

    train_data: Strings = Field((), description="Files to train on; empty with arithmetic or calculator: made here.")
    val_data: Strings = Field((), description="Held-out files; empty with arithmetic or calculator: made here.")
    prompt_key: str = Field("prompt", min_length=1, description="Column with the prompt: text or chat messages.")
    target_key: str = Field(
        "reward_spec.ground_truth", min_length=1, description="Column that the answer is compared to; dots descend."
    )
    shuffle: bool = Field(True, description="A new order each epoch, fixed by trainer.seed.")
    on_bad_row: Literal["error", "skip"] = Field(
        "error", description="A malformed row stops the run, or is left out and counted."
    )


class ArithmeticEnvironment(Group):
    """The built-in task: sums whose answer is checked."""

    num_train_prompts: Positive = Field(description="Problems to train on.")
    num_eval_prompts: Positive = Field(description="Held-out problems.")


class CalculatorEnvironment(Group):
    """The built-in task of several turns: products that want a tool, whose answer is checked."""

    num_train_prompts: Positive = Field(5120, description="Problems to train on.")
    num_eval_prompts: Positive = Field(512, description="Held-out problems.")
    call_reward: float = Field(
        0.0, ge=0, lt=0.5, description="Reward of the first call of the tool that is well formed; a right answer has 1."
    )


class JudgeEnvironment(Group):
    """llm_as_a_judge: a model behind an OpenAI-compatible endpoint scores the answer."""

    base_url: str | None = Field(None, description="The endpoint, up to and with /v1.")
    model: str | None = Field(None, description="The judge's name at that endpoint.")
    api_key_env: str | None = Field(
        None, description="Environment variable that holds the key; null sends none. The key is never printed."
    )
    prompt_template: str = Field(
        "Question:\n{question}\n\nReference answer:\n{target}\n\nAnswer to be scored:\n{answer}\n\n"
        "How good is the answer, from 0 (wrong) to 10 (right and complete)? Think first, then end with a line\n"
        "Score: <number>",
        min_length=1,
        description="What the judge is asked; {question}, {answer} and {target} are filled in.",
    )
    score_pattern: str = Field(
        r"Score:\s*(-?\d+(?:\.\d+)?)",
        min_length=1,
        description="Regular expression whose first group is the score; its last match counts.",
    )
    min_score: float = Field(0.0, description="The judge's lowest score: reward 0.")
    max_score: float = Field(10.0, description="The judge's highest score: reward 1.")
    max_tokens: Positive = Field(512, description="Tokens of the judge's answer at most.")
    temperature: float = Field(0.0, ge=0, description="The judge's temperature.")
    request_timeout_s: float = Field(30.0, gt=0, description="Seconds for one request to the judge.")
    max_retries: NonNegative = Field(
        3, description="Further attempts after a lost connection, a timeout, or an answer 408, 409, 429 or 5xx."
    )
    retry_delay_s: float = Field(
        0.5, ge=0, description="Wait before the first of them; each further one waits twice as long."
    )


class Environment(Group):
    """Who scores the answers."""

    env_class: str = Field(
        "arithmetic",
        min_length=1,
        description="arithmetic or calculator (built in, with data), gsm8k, gsm8k_multi_turn, llm_as_a_judge, an id of "
        "skyrl-gym (aime, lcb, search, searchcode, text2sql) or the dotted path of a class; a row's env_class goes "
        "first.",
    )
    reward: str | None = Field(
        None,
        description="Dotted path of a function of your own, f(response, target) -> number, that scores every row's "
        "answers in the place of an environment (docs/EXTENDING.md).",
    )
    max_failed_frac: Fraction = Field(
        0.1, description="Trajectories of a step that may fail in reward or environment before the run stops."
    )
    num_workers: NonNegative | None = Field(
        None,
        description="Threads for environments that may block; null is 32. 0 runs all on the event loop, without "
        "deadlines. Those that only compute (runs_inline, as arithmetic) are there anyway.",
    )
    step_timeout_s: float = Field(
        120.0, gt=0, description="Seconds for one call of an environment in a thread; then its trajectory fails."
    )
    env_config: dict[str, Any] = Field(
        default_factory=dict,
        description="Settings by environment, handed to it as env_config: {search: {search_url: ..., topk: 3}}.",
    )
    arithmetic: ArithmeticEnvironment
    calculator: CalculatorEnvironment
    llm_as_a_judge: JudgeEnvironment
