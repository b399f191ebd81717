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
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch

from skyrl_train.engines.embedded.rules.json_schema import unheld
from skyrl_train.errors import RequestRejected
from skyrl_train.types import Grammar, SamplingParams

CACHE_BYTES = 256 * 2**20
"""Of compiled grammars; the least recently used are forgotten."""
_CONTROL = re.compile(rb"[\x00-\x09\x0b\x0c\x0e-\x1f]")
"""All but the two ends of a line, which are white space between JSON's tokens and never in its strings."""


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
    """Of one engine: its tokenizer, logits of width `vocab_size`, its end tokens. `prepare` may run in any thread.

    `any_whitespace`: JSON may have white space between its tokens; else it is compact, as json.dumps writes it.
    """

    def __init__(
        self, tokenizer: Any, vocab_size: int, end_token_ids: Sequence[int], *, any_whitespace: bool = True
    ) -> None:
        import xgrammar

        self.vocab_size = vocab_size
        self._library = xgrammar
        self._end_token_ids = [token for token in end_token_ids if token < vocab_size]
        self._any_whitespace = any_whitespace
        self._special = special_ids(tokenizer)
        self._vocabulary = xgrammar.TokenizerInfo.from_huggingface(
            tokenizer, vocab_size=vocab_size, stop_token_ids=self._end_token_ids
        )
        self._compilers: dict[bool, Any] = {}
        self._compiled: OrderedDict[Grammar, Any] = OrderedDict()
        self._lock = threading.Lock()
        self._batch = xgrammar.BatchGrammarMatcher(max_threads=torch.get_num_threads())
        self.everything: torch.Tensor = xgrammar.allocate_token_bitmask(1, vocab_size)[0]

    def prepare(self, request_id: str, grammar: Grammar) -> Any:
        """Compile it, unless it is there already. Raises RequestRejected, saying what is wrong with the grammar.

        The first one of a kind takes a second or so with a large vocabulary; a long `maxLength` takes several.
        """
        with self._lock:
            found = self._compiled.pop(grammar, None)
            if found is None:
                try:
                    found = self._compile(request_id, grammar)
                # xgrammar raises RuntimeError and subclasses of it; json raises ValueError.
                except (RuntimeError, ValueError) as exc:
                    raise RequestRejected(
                        f"request {request_id}: its grammar ({grammar.kind}) can't be used: {_said(exc)}"
                    ) from exc
            self._compiled[grammar] = found
            while len(self._compiled) > 1 and self.num_cached_bytes > CACHE_BYTES:
                self._compiled.popitem(last=False)
        return found

    @property
    def num_cached_bytes(self) -> int:
        return sum(compiled.memory_size_bytes for compiled in self._compiled.values())

    def start(self, request_id: str, grammar: Grammar, sampling: SamplingParams) -> GrammarState:
        """The state before the first token. Raises as `prepare`."""
        ends = dict.fromkeys([*self._end_token_ids, *(i for i in sampling.stop_token_ids if i in self._special)])
        matcher = self._library.GrammarMatcher(
            self.prepare(request_id, grammar),
            override_stop_tokens=list(ends),
            terminate_without_stop_token=not ends,
        )
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

    def _compile(self, request_id: str, grammar: Grammar) -> Any:
        compiler = self._compiler_of(is_json=grammar.kind == "json_schema")
        if grammar.kind == "regex":
            return compiler.compile_regex(grammar.text)
        if grammar.kind == "ebnf":
            return compiler.compile_grammar(grammar.text)
        if what := unheld(json.loads(grammar.text)):
            raise RequestRejected(
                f"request {request_id}: its JSON schema has {what}, which an answer can't be held to; write the schema "
                "without it, and check the answer"
            )
        return compiler.compile_json_schema(grammar.text, any_whitespace=self._any_whitespace)

    def _compiler_of(self, *, is_json: bool) -> Any:
        """xgrammar takes a token without text for a special one, and "<|im_start|>" for text.

        Under a schema, tokens with control characters have no text either: no JSON has them in a string, and xgrammar's
        rule for strings of a given length lets them through.
        """
        if is_json not in self._compilers:
            words = [
                b"" if token in self._special or (is_json and _CONTROL.search(word)) else word
                for token, word in enumerate(self._vocabulary.decoded_vocab)
            ]
            info = self._library.TokenizerInfo(
                words,
                vocab_type=self._library.VocabType.RAW,
                vocab_size=self.vocab_size,
                stop_token_ids=self._end_token_ids,
                add_prefix_space=self._vocabulary.add_prefix_space,
            )
            # Its own cache of parts of grammars breaks on long repetitions in a pattern (0.2.8).
            self._compilers[is_json] = self._library.GrammarCompiler(
                info, max_threads=min(os.cpu_count() or 1, 8), cache_enabled=False
            )
        return self._compilers[is_json]


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
