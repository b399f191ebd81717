"""data and environment: what the policy is asked, and who scores it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from skyrl_train.config.fields import Fraction, Group, Positive, Strings


class Data(Group):
    """Prompts. Files are jsonl, json, parquet or a `datasets` folder."""

    train_data: Strings = Field((), description="Files to train on; empty with environment arithmetic: made here.")
    val_data: Strings = Field((), description="Held-out files; empty with environment arithmetic: made here.")
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


class Environment(Group):
    """Who scores the answers."""

    env_class: str = Field(
        "arithmetic", min_length=1, description="arithmetic (built in), gsm8k, or a name that the data's rows override."
    )
    reward: str | None = Field(
        None,
        description="Dotted path of a function of your own, f(response, target) -> number, that scores every row's "
        "answers in the place of an environment (docs/EXTENDING.md).",
    )
    max_failed_frac: Fraction = Field(
        0.1, description="Trajectories of a step that may fail in reward or environment before the run stops."
    )
    arithmetic: ArithmeticEnvironment
