"""The engine without asyncio: add requests, step, collect what finished.

    add -> queue -> [ plan -> model -> sample -> finish ] -> Finished
                     `------------- one step -----------'

Not thread-safe: one caller at a time. A step that raises leaves the core unusable; its owner must drop it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from skyrl_train.engines.base import Capability, EngineInfo, EngineStats, Occupant, PauseMode
from skyrl_train.engines.embedded.adapters.adapter import LoraAdapter
from skyrl_train.engines.embedded.adapters.served import ServedAdapters
from skyrl_train.engines.embedded.backends import native_or_warn
from skyrl_train.engines.embedded.config import EmbeddedConfig, resolve_context_len, resolve_kv_tokens, resolve_packing
from skyrl_train.engines.embedded.drafts.base import DraftSource
from skyrl_train.engines.embedded.drafts.speculation import SPECULATES, Speculation
from skyrl_train.engines.embedded.drafts.verify import VerifiedTokens, commit_plain, one_by_one
from skyrl_train.engines.embedded.host_tier import make_tier
from skyrl_train.engines.embedded.invariant.view import InvariantModel
from skyrl_train.engines.embedded.kv_pool import KVPool
from skyrl_train.engines.embedded.request import NO_SEAT, RequestState, Seats, to_completion
from skyrl_train.engines.embedded.rules.engine_rules import EngineRules
from skyrl_train.engines.embedded.rules.rule import tell
from skyrl_train.engines.embedded.runner import PendingTokens, make_runner, probe_layers
from skyrl_train.engines.embedded.scheduler import Scheduler
from skyrl_train.engines.embedded.sessions import EmbeddedSessions
from skyrl_train.engines.embedded.sleep import make_sleep, sleep_capabilities
from skyrl_train.engines.embedded.stops import completed_stop, end_token_ids
from skyrl_train.engines.embedded.twin import InferenceModel
from skyrl_train.engines.embedded.uniforms import derived_seed
from skyrl_train.engines.embedded.weights import planned_copy
from skyrl_train.errors import RequestRejected, WeightUpdateError
from skyrl_train.types import (
    AdapterWeights,
    Completion,
    FinishReason,
    GenerateRequest,
    WeightSource,
    WeightUpdate,
)

PauseState = Literal["running", "draining", "paused"]

CAPABILITIES: frozenset[Capability] = frozenset(
    {
        "abort",
        "named_weights",
        "disk_weights",
        "local_weights",
        "min_p",
        "penalties",
        "priority",
        "seed",
        "sessions",
        "stop_strings",
    }
)


LORA: frozenset[Capability] = frozenset({"lora", "adapter_weights"})
"""With adapters (EmbeddedConfig.lora)."""


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A request that left the engine, with its answer."""

    state: RequestState
    completion: Completion

    @property
    def failure(self) -> RequestRejected | None:
        """Of the user's own logit processor: what its caller gets instead of the completion."""
        failed = None if self.state.rule is None else self.state.rule.failure
        if failed is None:
            return None
        error = RequestRejected(str(failed))
        error.__cause__ = failed
        return error


class EngineCore:
    """One model, one KV pool, one scheduler."""

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: Any,
        *,
        config: EmbeddedConfig,
        name: str = "embedded-0",
        policy_version: int = 0,
        drafts: DraftSource | None = None,
    ) -> None:
        model_config: Any = model.config
        device = next(model.parameters()).device
        native = native_or_warn(device)
        lora, seats = config.lora, config.max_num_seqs
        self.adapters = None if lora is None else ServedAdapters(lora, model, seats, engine=name)
        packs = resolve_packing(config, model)
        if config.deterministic:
            inference_model: InferenceModel = InvariantModel(model, packs_weights=packs)
        else:
            adapted = None if self.adapters is None else self.adapters.maps()
            inference_model = InferenceModel(model, native, packs_weights=packs, adapted=adapted)
        layers = probe_layers(inference_model)
        self.context_len = resolve_context_len(config, model_config)
        draft_bytes = 0 if drafts is None else drafts.bytes_per_token
        pool = KVPool(layers, resolve_kv_tokens(config, layers, self.context_len, device, draft_bytes), device)
        end_ids = end_token_ids(model, tokenizer, config.extra_eos_token_ids)
        self.rules = EngineRules(
            name,
            model,
            tokenizer,
            end_ids,
            grammar_backend=config.grammar_backend,
            any_whitespace=config.json_whitespace,
            allow_processors=config.logit_processors,
        )
        self.info = EngineInfo(
            name=name,
            model=model_config.name_or_path or type(model).__name__,
            max_context_len=min(self.context_len, pool.num_slots),
            logprob_space="temperature",
            capabilities=CAPABILITIES
            | self.rules.capabilities
            | (LORA if self.adapters else frozenset())
            | sleep_capabilities(device)
            | (SPECULATES if drafts else frozenset()),
        )
        self.config = config
        self.policy_version = policy_version
        self.pause_state: PauseState = "running"
        self.weights_are_whole = True
        self._model = model
        self._tokenizer = tokenizer
        self._vocab_size: int = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        self._seats = Seats(config.max_num_seqs, self.context_len, end_ids)
        tier = make_tier(config, pool, draft_bytes=draft_bytes)
        self.scheduler = Scheduler(config, self._seats, pool, self.adapters, tier)
        if self.adapters is not None:
            self.adapters.begin(self.scheduler)
        self.sessions = EmbeddedSessions(name, self.scheduler.cache)
        max_rows = max(config.max_num_batched_tokens, self.context_len + config.max_num_seqs)
        self._runner = make_runner(inference_model, native, config, layers, pool, self._seats, max_rows)
        self.speculation: Speculation | None = None
        if drafts is not None:
            self.speculation = Speculation.of(drafts, self.scheduler, self._runner)
        drafter = None if self.speculation is None else self.speculation.drafter
        self.rest = make_sleep(name, self.scheduler.cache, inference_model, drafter)
        self._pending: PendingTokens | None = None
        self._by_id: dict[str, RequestState] = {}
        self._num_submitted = 0
        self._num_steps = 0
        self._num_generated = 0

    @property
    def model(self) -> torch.nn.Module:
        """The module whose weights are served."""
        return self._model

    # -- requests

    def add(self, request: GenerateRequest) -> RequestState:
        """Queue a request. Raises RequestRejected if it can never be served here."""
        new_token_ids, came = request.prompt_token_ids, request
        request = self.sessions.whole(request)
        self._check(request, new_token_ids)
        try:
            rule = self.rules.start(request)
            self.sessions.enter(came)
        except RequestRejected:
            if self.adapters is not None:
                self.adapters.trim()
            raise
        sampling = request.sampling
        order = self._num_submitted
        self._num_submitted += 1
        known, num_prompt = request.partial, len(request.prompt_token_ids)
        state = RequestState(
            request=request,
            order=order,
            seed=derived_seed(self.config.seed, order) if sampling.seed is None else sampling.seed,
            tokens=np.asarray(request.prompt_token_ids + (known.token_ids if known else ()), dtype=np.int32),
            logprobs=np.asarray((0.0,) * num_prompt + (known.logprobs if known else ()), dtype=np.float32),
            version_marks=[(span.version, span.start) for span in known.versions] if known else [],
            rule=rule,
            urgency=-request.priority if self.config.low_priority_values_first else request.priority,
        )
        self._by_id[request.request_id] = state
        if self.adapters is not None:
            self.adapters.opened(request)
        self.scheduler.enqueue(state)
        return state

    def _check(self, request: GenerateRequest, new_token_ids: tuple[int, ...]) -> None:
        name, rid = self.info.name, request.request_id
        if rid in self._by_id:
            raise RequestRejected(f"request {rid}: engine {name} is serving a request with this id already")
        ids = new_token_ids
        if request.partial is not None:
            ids += request.partial.token_ids
        if min(ids) < 0 or max(ids) >= self._vocab_size:
            bad = next(i for i in ids if not 0 <= i < self._vocab_size)
            raise RequestRejected(f"request {rid}: token id {bad} is outside the vocabulary of {self._vocab_size}")
        for stop_id in request.sampling.stop_token_ids:
            if not 0 <= stop_id < self._vocab_size:
                raise RequestRejected(
                    f"request {rid}: stop token id {stop_id} is outside the vocabulary of {self._vocab_size}"
                )
        if request.sampling.stop and self._tokenizer is None:
            raise RequestRejected(f"request {rid}: stop strings need a tokenizer, engine {name} has none")
        self.scheduler.check(
            name, rid, len(request.prompt_token_ids), request.sampling.max_new_tokens, self.context_len
        )
        if self.adapters is not None:
            self.adapters.check(request)
        elif request.adapter is not None:
            raise RequestRejected(f"request {rid}: engine {name} has no adapter {request.adapter!r}, nor any other")

    def abort(self, request_ids: Sequence[str]) -> list[Finished]:
        """End these requests with what they have; ids that aren't here are ignored."""
        settled = self._settle()
        states = [self._by_id[rid] for rid in dict.fromkeys(request_ids) if rid in self._by_id]
        return [*settled, *(self._finish(state, "abort", None) for state in states)]

    def drop(self, request_id: str) -> list[Finished]:
        """Its caller went away: end it, and let its session forget it. What others got meanwhile."""
        settled = self._settle()
        state = self._by_id.get(request_id)
        if state is not None:
            self._finish(state, "abort", None, keep=False)
        return settled

    def close_session(self, session_id: str) -> list[Finished]:
        """End what runs in it, and forget it; an unknown one is fine."""
        finished = self.abort(self.sessions.book.running(session_id))
        self.sessions.close(session_id)
        return finished

    @property
    def has_work(self) -> bool:
        """Whether `step` would do something."""
        if self.pause_state == "draining":
            return True  # a step ends the drain, also where an abort has ended the last request that had begun
        if self.pause_state == "paused" or self.rest.asleep:
            return False
        return bool(self._by_id)

    # -- stepping

    def step(self) -> list[Finished]:
        """Compute one step; the requests that ended with it. The last one of a drain makes it a pause."""
        finished = self._compute()
        if self.pause_state == "draining" and not self.scheduler.num_started:
            self.pause_state = "paused"
        return finished

    def _compute(self) -> list[Finished]:
        """Launch a step, then take in the tokens of the one before it, or of this one if the runner does not lag."""
        finished = self._settle() if self._runner.must_settle() else []
        before, self._pending = self._pending, None
        num_before = self._num_generated
        plan = self.scheduler.plan(self.policy_version, admit_new=self.pause_state == "running")
        if plan is not None:
            self._num_steps += 1
            self._pending = self._runner.launch(plan)
        if before is not None:
            finished += self._take_in(before)
        if not self._runner.lags:
            finished += self._settle()
        if self.speculation is not None:
            self.speculation.step_done(self._num_generated - num_before)
        return finished

    def _settle(self) -> list[Finished]:
        """Wait for the tokens that are on their way; after this the host knows all there is."""
        pending, self._pending = self._pending, None
        return [] if pending is None else self._take_in(pending)

    def _take_in(self, pending: PendingTokens) -> list[Finished]:
        tokens, logprobs = pending.result()
        chosen = pending.seats
        # Whoever ended or was retracted since the launch has left the seat: the token is nobody's.
        present = self._seats.tenancy[chosen] == pending.tenancy
        if not present.all():
            chosen, tokens, logprobs = chosen[present], tokens[present], logprobs[present]
        self._seats.in_flight[chosen] -= 1
        if isinstance(pending, VerifiedTokens):
            return self._commit_verified(pending)
        return self._commit(chosen, tokens, logprobs)

    def _commit_verified(self, verified: VerifiedTokens) -> list[Finished]:
        """Append what a step with guesses brought: at once where nothing ends, else as if it had come one by one."""
        num_plain, rows = commit_plain(self._seats, verified)
        self._num_generated += num_plain
        finished = []
        for chosen, tokens, logprobs in one_by_one(self._seats, verified, rows):
            finished += self._commit(chosen, tokens, logprobs)
        return finished

    def _commit(
        self, chosen: npt.NDArray[np.intp], tokens: npt.NDArray[np.int64], logprobs: npt.NDArray[np.float32]
    ) -> list[Finished]:
        """Append one token to each of these seats and end those that are done."""
        seats = self._seats
        length = seats.length[chosen]
        seats.tokens[chosen, length] = tokens
        seats.logprobs[chosen, length] = logprobs
        seats.length[chosen] = length + 1
        self._num_generated += len(chosen)
        ruled_out = tell(seats.rules, chosen, tokens) if seats.rules else {}
        may_stop = length >= seats.min_len[chosen]
        stopped = seats.stops.hits(chosen, tokens) & may_stop
        done = stopped | (length + 1 >= seats.max_len[chosen])
        strings = self._completed_strings(chosen[may_stop]) if seats.stops.strings else {}
        if not strings and not ruled_out and not done.any():
            return []
        finished = []
        if strings or ruled_out:
            done |= np.isin(chosen, [*strings, *ruled_out])
        for row in np.nonzero(done)[0]:
            seat, token = int(chosen[row]), int(tokens[row])
            state = seats.owners[seat]
            assert state is not None
            if stopped[row]:
                asked = token in state.request.sampling.stop_token_ids
                finished.append(self._finish(state, "stop", token if asked else None))
            elif seat in ruled_out:
                finished.append(self._finish(state, *ruled_out[seat]))
            elif seat in strings:
                finished.append(self._finish(state, "stop", strings[seat]))
            else:
                finished.append(self._finish(state, "length", None))
        return finished

    def _completed_strings(self, chosen: npt.NDArray[np.intp]) -> dict[int, str]:
        """seat -> the stop string that its last token completed."""
        seats = self._seats
        result = {}
        for seat in chosen:
            stops = seats.stops.strings.get(int(seat))
            if stops:
                answer = seats.tokens[seat, seats.prompt_len[seat] : seats.length[seat]].tolist()
                found = completed_stop(self._tokenizer, answer, stops)
                if found is not None:
                    result[int(seat)] = found
        return result

    def _finish(
        self, state: RequestState, reason: FinishReason, stop_reason: str | int | None, *, keep: bool = True
    ) -> Finished:
        """`keep`: its session can go on from it."""
        if state.seat == NO_SEAT:
            self.scheduler.dequeue(state)
            end = self.scheduler.cache.root
        else:
            end = self.scheduler.release(state)
        del self._by_id[state.request.request_id]
        completion = to_completion(state, reason, stop_reason)
        self.sessions.leave(state.request, completion.token_ids if keep else None, end)
        if self.adapters is not None:
            self.adapters.closed(state.request)  # may forget the adapter's keys: pins that are there move with them
        return Finished(state=state, completion=completion)

    def answer_so_far(self, state: RequestState, begin: int = 0) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Tokens and log-probabilities of an open request's answer, from token `begin` on."""
        tokens, logprobs = state.tokens, state.logprobs
        if state.seat != NO_SEAT:
            length = self._seats.length[state.seat]
            tokens, logprobs = self._seats.tokens[state.seat, :length], self._seats.logprobs[state.seat, :length]
        start = state.num_prompt_tokens + begin
        return tuple(tokens[start:].tolist()), tuple(logprobs[start:].tolist())

    # -- control

    def pause(self, mode: PauseMode) -> list[Finished]:
        """Stop stepping. "wait": only once what has begun is done; until then `pause_state` is "draining".

        Requests that are queued and have not begun stay queued in every mode.
        """
        finished = self._settle()
        self.pause_state = "draining" if mode == "wait" and self.scheduler.num_started else "paused"
        if mode == "abort":
            finished += [self._finish(state, "abort", None) for state in self.scheduler.started()]
        return finished

    def cancel_drain(self) -> None:
        """Whoever wanted the pause went away before it came."""
        if self.pause_state == "draining":
            self.pause_state = "running"

    def resume(self) -> None:
        """Raises WeightUpdateError while the weights are half loaded."""
        if not self.weights_are_whole:
            raise WeightUpdateError(
                f"engine {self.info.name}: the last weight update failed half way; repeat it before resume"
            )
        self.rest.check_awake()
        self.pause_state = "running"

    def sleep(self, release: Sequence[Occupant]) -> None:
        """See `Engine.sleep`. Of a paused engine, requests that have not begun may wait."""
        num_busy = self.scheduler.num_started if self.pause_state == "paused" else len(self._by_id)
        self.rest.begin(release, num_busy=num_busy)

    def update_weights(self, update: WeightUpdate) -> None:
        """See `Engine.update_weights`. A refused update changes nothing; a failed one forbids `resume`."""
        name = self.info.name
        if self.pause_state != "paused":
            raise WeightUpdateError(f"engine {name}: weights change only while it is paused, it is {self.pause_state}")
        if "weights" in self.rest.asleep:
            raise WeightUpdateError(f"engine {name} sleeps and has no room for weights; wake them first")
        if update.version < self.policy_version:
            raise WeightUpdateError(
                f"engine {name} serves version {self.policy_version}; version {update.version} is older"
            )
        policy = self._planned_policy(update.source)
        copy = planned_copy(self._model, update.source)
        if copy is not None:
            self.weights_are_whole = False
            try:
                copy()
            except Exception as exc:
                raise WeightUpdateError(
                    f"engine {name}: version {update.version} was copied only in part: {exc}"
                ) from exc
        if policy is None:
            self._runner.weights_changed()
        if self.speculation is not None:
            self.speculation.weights_changed()
        self.scheduler.retract_all()
        self.scheduler.cache.flush()
        if self.adapters is not None:
            self.adapters.set_policy(policy)
        self.policy_version = update.version
        self.weights_are_whole = True

    def _planned_policy(self, source: WeightSource) -> LoraAdapter | None:
        """The adapter that is the policy from this update on, checked; None: the model itself is."""
        if not isinstance(source, AdapterWeights):
            return None
        if self.adapters is None:
            raise WeightUpdateError(f"engine {self.info.name} serves no adapters; send it the merged matrices")
        return self.adapters.make_policy(source)

    def flush_cache(self) -> None:
        """Forget cached prefixes. Raises RequestRejected while requests hold some."""
        if self.scheduler.num_running:
            raise RequestRejected(
                f"engine {self.info.name}: {self.scheduler.num_running} requests run on cached prefixes; wait or pause"
            )
        self.scheduler.cache.flush()

    # -- figures

    def stats(self) -> EngineStats:
        scheduler = self.scheduler
        pool = scheduler.pool
        return EngineStats(
            policy_version=self.policy_version,
            paused=self.pause_state != "running",
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            kv_used_frac=1 - pool.num_free / pool.num_slots,
            num_prompt_tokens_total=scheduler.num_prompt_tokens_total,
            num_cached_tokens_total=scheduler.num_cached_tokens_total,
            num_generated_tokens_total=self._num_generated,
            num_retractions_total=scheduler.num_retractions_total,
            num_evicted_tokens_total=scheduler.cache.num_evicted_total,
            num_steps_total=self._num_steps,
            num_sessions=len(self.sessions),
            num_host_cached_tokens_total=0 if scheduler.cache.tier is None else scheduler.cache.tier.num_read_total,
            **({} if self.speculation is None else self.speculation.figures()),
        )

    def check_integrity(self) -> None:
        """Assert that slots, references, seats and queue agree. For tests: it is slow."""
        self.scheduler.check_integrity()
        self.sessions.check_integrity()
        if self.adapters is not None:
            self.adapters.check_integrity(self._by_id.values(), self.scheduler.running())
        known = [*self.scheduler.running(), *self.scheduler.waiting()]
        assert len(known) == len(self._by_id)
        assert all(self._by_id[state.request.request_id] is state for state in known)
