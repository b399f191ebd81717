"""The rules of one engine: which it can hold, and the rule of a request that comes in."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch

from skyrl_train.engines.base import Capability
from skyrl_train.engines.embedded.config import GrammarBackend
from skyrl_train.engines.embedded.rules.grammar import GrammarCompiler, GrammarState, is_installed
from skyrl_train.engines.embedded.rules.processor import Processor
from skyrl_train.engines.embedded.rules.rule import LogitRule
from skyrl_train.errors import ConfigError, RequestRejected
from skyrl_train.types import GenerateRequest, Grammar


class EngineRules:
    """Grammars need a tokenizer, which says what a token's text is, and xgrammar. The first one makes the compiler."""

    def __init__(
        self,
        name: str,
        model: torch.nn.Module,
        tokenizer: Any,
        end_token_ids: Sequence[int],
        *,
        grammar_backend: GrammarBackend,
        any_whitespace: bool,
        allow_processors: bool,
    ) -> None:
        self._name = name
        self._vocab_size = logits_width(model)
        self._tokenizer = tokenizer
        self._end_token_ids = tuple(end_token_ids)
        self._backend = grammar_backend
        self._any_whitespace = any_whitespace
        self._allow_processors = allow_processors
        self._compiler: GrammarCompiler | None = None
        self._lock = threading.Lock()

    @property
    def capabilities(self) -> frozenset[Capability]:
        can = self._backend == "xgrammar" and self._tokenizer is not None and is_installed()
        return frozenset({"structured_output"}) if can else frozenset()

    def start(self, request: GenerateRequest) -> LogitRule | None:
        """The rule of a whole request, told of the answer that it brings; None if it asks for none.

        Raises RequestRejected where the rule can't be followed.
        """
        sampling = request.sampling
        if sampling.grammar is None and sampling.logit_processor is None:
            return None
        grammar = None if sampling.grammar is None else self._state(request, sampling.grammar)
        rule = LogitRule(grammar=grammar, processor=self._processor(request))
        for token in request.partial.token_ids if request.partial else ():
            if not rule.take(token) or (grammar is not None and grammar.is_over):
                raise RequestRejected(
                    f"request {request.request_id}: token {rule.num_taken - 1} of its partial answer, id {token}, ends "
                    "its grammar or breaks it; nothing can follow"
                )
        if grammar is not None:
            grammar.compiler.fill([grammar])
            if grammar.is_stuck:
                raise RequestRejected(
                    f"request {request.request_id}: no token of the vocabulary can come next in its grammar; it allows "
                    "no answer, or one that this tokenizer can't write"
                )
        return rule

    def prepare(self, request: GenerateRequest) -> None:
        """Compile its grammar, in any thread: `start` finds it then. Raises as `start`, where that is seen already."""
        grammar = request.sampling.grammar
        if grammar is not None:
            self._compiler_for(request).prepare(request.request_id, grammar)

    def _state(self, request: GenerateRequest, grammar: Grammar) -> GrammarState:
        return self._compiler_for(request).start(request.request_id, grammar, request.sampling)

    def _compiler_for(self, request: GenerateRequest) -> GrammarCompiler:
        rid = request.request_id
        if not self.capabilities:
            raise RequestRejected(f"request {rid}: engine {self._name} follows no grammars: {self._why_not()}")
        if request.sampling.min_new_tokens:
            raise RequestRejected(
                f"request {rid}: a grammar says where its answer may end, so min_new_tokens="
                f"{request.sampling.min_new_tokens} can't be kept; leave it out, or ask for length in the grammar"
            )
        with self._lock:
            if self._compiler is None:
                self._compiler = GrammarCompiler(
                    self._tokenizer, self._vocab_size, self._end_token_ids, any_whitespace=self._any_whitespace
                )
        return self._compiler

    def _why_not(self) -> str:
        if self._backend == "none":
            return "it was started with grammar backend none (generator.structured_output.grammar_backend)"
        if self._tokenizer is None:
            return "it has no tokenizer"
        return "xgrammar is not installed; pip install xgrammar"

    def _processor(self, request: GenerateRequest) -> Processor | None:
        named, rid = request.sampling.logit_processor, request.request_id
        if named is None:
            return None
        if not self._allow_processors:
            raise RequestRejected(
                f"request {rid}: engine {self._name} runs no logit processors (asked for: {named.path}); set "
                "generator.custom_logit_processor.enabled=true"
            )
        try:
            return Processor(rid, named, request.prompt_token_ids)
        except ConfigError as exc:
            raise RequestRejected(f"request {rid}: {exc}") from exc


def logits_width(model: torch.nn.Module) -> int:
    """Words that the model's logits have: more than the tokenizer's where its matrices are padded, or fewer."""
    causal: Any = model
    head = causal.get_output_embeddings()
    weight: torch.Tensor = (causal.get_input_embeddings() if head is None else head).weight
    return weight.shape[0]
