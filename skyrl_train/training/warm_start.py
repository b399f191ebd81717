"""A short supervised phase: enough to know the form of an answer, not enough to be right.

It stops as soon as about a quarter of a sample of *training* problems are solved. What is held out is never looked at;
the rest of the way is reinforcement learning's.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from skyrl_train.data.chat import render_prompt
from skyrl_train.data.conversations import encode_conversation
from skyrl_train.environments import calculator
from skyrl_train.environments.arithmetic import pairs, question

OnProgress = Callable[[int, int, Mapping[str, float]], None]
"""(step, most steps, {"loss", "accuracy"}): called whenever the accuracy was measured."""

BATCH_SIZE = 64
MAX_STEPS = 600
LEARNING_RATE = 2e-3
NUM_WARMUP_STEPS = 50
ADAM_BETAS = (0.9, 0.98)
STOP_AT_ACCURACY = 0.25
MEASURE_EVERY = 5
NUM_MEASURED = 256
IGNORED = -100


Problems = Sequence[tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """Training problems, and how some of them become token_ids and labels [n, L]."""

    problems: Callable[[], Problems]
    encode: Callable[[PreTrainedTokenizerFast, Problems], tuple[torch.Tensor, torch.Tensor]]


def teach_form(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    lesson: Lesson | None = None,
    *,
    seed: int,
    on_progress: OnProgress,
) -> float:
    """Train in place on question and answer texts; returns the accuracy reached on training problems.

    Equal arguments give equal weights on the same machine. No lesson is arithmetic's.
    """
    lesson = lesson or ARITHMETIC
    problems = lesson.problems()
    measured = lesson.encode(tokenizer, problems[:NUM_MEASURED])
    draw = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=ADAM_BETAS, weight_decay=0.0)
    model.train()
    accuracy = 0.0
    for step in range(1, MAX_STEPS + 1):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1.0, step / NUM_WARMUP_STEPS)
        token_ids, labels = lesson.encode(tokenizer, draw.choices(problems, k=BATCH_SIZE))
        logits = model(input_ids=token_ids[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % MEASURE_EVERY == 0:
            accuracy = _accuracy(model, *measured)
            done = accuracy >= STOP_AT_ACCURACY
            on_progress(step, step if done else MAX_STEPS, {"loss": loss.item(), "accuracy": accuracy})
            if done:
                break
    model.eval()  # type: ignore[no-untyped-call]
    return accuracy


def _encode(tokenizer: PreTrainedTokenizerFast, problems: Problems) -> tuple[torch.Tensor, torch.Tensor]:
    """Question and answer; the labels are the answer and its end token."""
    prompts = [render_prompt(tokenizer, [{"role": "user", "content": question(a, b)}]) for a, b in problems]
    answers = [(*tokenizer(str(a + b)).input_ids, tokenizer.eos_token_id) for a, b in problems]
    return _padded(
        tokenizer,
        [
            (torch.tensor((*prompt, *answer)), torch.arange(len(prompt) + len(answer)) >= len(prompt))
            for prompt, answer in zip(prompts, answers, strict=True)
        ],
    )


def _encode_calls(tokenizer: PreTrainedTokenizerFast, problems: Problems) -> tuple[torch.Tensor, torch.Tensor]:
    """Question, call of the tool, what it says, answer; the labels are the call, the answer and their end tokens."""
    rows = []
    for a, b in problems:
        (sample,) = encode_conversation(tokenizer, calculator.demonstration(a, b), name=f"{a}*{b}")
        rows.append((sample.token_ids, sample.loss_mask))
    return _padded(tokenizer, rows)


def _padded(tokenizer: Any, rows: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(token_ids [L], learned [L]) of each row to token_ids and labels [n, L], padded at the end."""
    length = max(len(ids) for ids, _ in rows)
    token_ids = torch.full((len(rows), length), tokenizer.pad_token_id)
    labels = torch.full_like(token_ids, IGNORED)
    for number, (ids, learned) in enumerate(rows):
        token_ids[number, : len(ids)] = ids
        labels[number, : len(ids)] = torch.where(learned, ids, IGNORED)
    return token_ids, labels


@torch.no_grad()
def _accuracy(model: PreTrainedModel, token_ids: torch.Tensor, labels: torch.Tensor) -> float:
    """The fraction that greedy decoding would get right: it does exactly when each token of the right answer is the
    likeliest one after those before it, so one forward pass tells."""
    predicted = model(input_ids=token_ids[:, :-1], use_cache=False).logits.argmax(-1)
    wanted = labels[:, 1:]
    right = (predicted == wanted) | (wanted == IGNORED)
    return float(right.all(dim=1).float().mean())


ARITHMETIC = Lesson(problems=lambda: pairs("train"), encode=lambda *arguments: _encode(*arguments))
CALCULATOR = Lesson(problems=lambda: calculator.problems("train"), encode=lambda *arguments: _encode_calls(*arguments))
