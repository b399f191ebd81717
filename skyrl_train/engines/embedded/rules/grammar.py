"""Answers that follow a grammar, through xgrammar (Dong et al., arXiv:2411.15100).

    Grammar (text) -> compiled, once for all requests -> state of one answer -> mask of the next token

A mask is one bit a word. It is made when the token before it is known, for all answers at once; the sampler sets the
logits of what it forbids to -inf. End tokens are allowed where the grammar may end and nowhere else. Special tokens
that end nothing are no text and never allowed, nor are rows of the logits that the tokenizer has no token for.

xgrammar is imported when the first grammar comes.

Shapes: n rows, V words, W = ceil(V / 32) words of 32 bits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch

from skyrl_train.engines.embedded.rules.json_schema import unheld, with_lengths_as_patterns
from skyrl_train.errors import RequestRejected
from skyrl_train.types import Grammar, SamplingParams

CACHE_BYTES = 256 * 2**20
"""Of compiled grammars; the least recently used are forgotten."""


def is_installed() -> bool:
    """Whether grammars can be compiled here."""
    return find_spec("xgrammar") is not None


class GrammarState:
    """One answer's place in its grammar. `mask` [W] int32: a bit for each token that may come next.

    `is_over`: it took the token that ends it. `is_stuck`: no token may come next.
    """

    __slots__ = ("_matcher", "compiler", "is_stuck", "mask")

    def __init__(self, compiler: GrammarCompiler, matcher: Any) -> None:
        self.compiler = compiler
        self._matcher = matcher
        self.mask = compiler.everything
        self.is_stuck = False

    @property
    def is_over(self) -> bool:
        return bool(self._matcher.is_terminated())

    @property
    def matcher(self) -> Any:
        return self._matcher

    def take(self, token: int) -> bool:
        return bool(self._matcher.accept_token(token))


class GrammarCompiler:
    """Of one engine: its tokenizer, logits of width `vocab_size`, its end tokens.

    `any_whitespace`: JSON may have white space wherever JSON allows it; else it is compact, as json.dumps writes it.
    """

    def __init__(
        self, tokenizer: Any, vocab_size: int, end_token_ids: Sequence[int], *, any_whitespace: bool = True
    ) -> None:
        import xgrammar

        self.vocab_size = vocab_size
        self._end_token_ids = [token for token in end_token_ids if token < vocab_size]
        self._any_whitespace = any_whitespace
        found = xgrammar.TokenizerInfo.from_huggingface(
            tokenizer, vocab_size=vocab_size, stop_token_ids=self._end_token_ids
        )
        self._special = special_ids(tokenizer)
        # xgrammar takes a token without text for a special one, and "<|im_start|>" for text.
        words = [b"" if token in self._special else word for token, word in enumerate(found.decoded_vocab)]
        info = xgrammar.TokenizerInfo(
            words,
            vocab_type=xgrammar.VocabType.RAW,
            vocab_size=vocab_size,
            stop_token_ids=self._end_token_ids,
            add_prefix_space=found.add_prefix_space,
        )
        num_threads = torch.get_num_threads()
        self._library = xgrammar
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=num_threads, cache_limit_bytes=CACHE_BYTES)
        self._batch = xgrammar.BatchGrammarMatcher(max_threads=num_threads)
        self.everything: torch.Tensor = xgrammar.allocate_token_bitmask(1, vocab_size)[0]

    def start(self, request_id: str, grammar: Grammar, sampling: SamplingParams) -> GrammarState:
        """The state before the first token. Raises RequestRejected, saying what is wrong with the grammar."""
        ends = dict.fromkeys([*self._end_token_ids, *(i for i in sampling.stop_token_ids if i in self._special)])
        try:
            matcher = self._library.GrammarMatcher(
                self._compiled(request_id, grammar),
                override_stop_tokens=list(ends),
                terminate_without_stop_token=not ends,
            )
        # xgrammar raises RuntimeError, its own subclasses of it, and ValueError for JSON that is none.
        except (RuntimeError, ValueError) as exc:
            raise RequestRejected(
                f"request {request_id}: its grammar ({grammar.kind}) can't be used: {_said(exc)}"
            ) from exc
        return GrammarState(self, matcher)

    def fill(self, states: Sequence[GrammarState]) -> None:
        """The masks of these answers, all at once."""
        masks = self._library.allocate_token_bitmask(len(states), self.vocab_size)
        if len(states) == 1:
            states[0].matcher.fill_next_token_bitmask(masks)
        else:
            self._batch.batch_fill_next_token_bitmask([state.matcher for state in states], masks)
        stuck = (masks == 0).all(dim=1).tolist()
        for state, mask, is_stuck in zip(states, masks, stuck, strict=True):
            state.mask, state.is_stuck = mask, is_stuck

    def apply(self, logits: torch.Tensor, states: Mapping[int, GrammarState]) -> None:
        """-inf, in place, for all that the states of these rows of `logits` [n, V] forbid."""
        rows = list(states)
        masks = self.everything.expand(len(logits), -1).clone()
        masks[rows] = torch.stack([state.mask for state in states.values()])
        self._library.apply_token_bitmask_inplace(logits, masks, vocab_size=self.vocab_size, indices=rows)

    def _compiled(self, request_id: str, grammar: Grammar) -> Any:
        """From the compiler's cache, if it is there."""
        if grammar.kind == "regex":
            return self._compiler.compile_regex(grammar.text)
        if grammar.kind == "ebnf":
            return self._compiler.compile_grammar(grammar.text)
        # What is no JSON raises ValueError, with the place.
        schema = json.loads(grammar.text)
        if what := unheld(schema):
            raise RequestRejected(
                f"request {request_id}: its JSON schema has {what}, which an answer can't be held to; write the schema "
                "without it, and check the answer"
            )
        text = json.dumps(with_lengths_as_patterns(schema))
        return self._compiler.compile_json_schema(text, any_whitespace=self._any_whitespace)


def fill_masks(states: Sequence[GrammarState]) -> None:
    """For states of one engine."""
    if states:
        states[0].compiler.fill(states)


def apply_masks(logits: torch.Tensor, states: Mapping[int, GrammarState]) -> None:
    """For states of one engine, by their row of `logits` [n, V]."""
    next(iter(states.values())).compiler.apply(logits, states)


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Tokens that are no text: those that the tokenizer leaves out when it skips special tokens."""
    added: dict[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
    marked = (token for token, entry in added.items() if getattr(entry, "special", False))
    return frozenset([*tokenizer.all_special_ids, *marked])


def _said(exc: Exception) -> str:
    """xgrammar's message without the time and the line of its own source."""
    text = str(exc).strip()
    head, separator, message = text.partition(".cc:")
    if separator and head.startswith("["):
        text = message.partition(": ")[2]
    return " ".join(text.split())
