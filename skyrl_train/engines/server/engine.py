"""A server as an Engine, whatever the server is: its pauses, its weights and its lives. Requests: see traffic.

gate open while the server is up, awake and not paused

pause keep    the server holds its requests (it then says which version sampled what), or, where it can't,
              they are ended and go on after `resume` from what they have: nothing old is left in a cache
server lost   the lifeline brings one up again, it is given the current weights, the gate opens
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import replace

import torch

from skyrl_train.engines.base import EngineInfo, EngineStats, Occupant, PauseMode
from skyrl_train.engines.server.client import ServerClient, ServerFigures, ServerTraits
from skyrl_train.engines.server.lifeline import Life, Lifeline
from skyrl_train.engines.server.traffic import FIRST_BUSY_WAIT_S, Serving, Traffic
from skyrl_train.errors import EngineUnavailable, RequestRejected, SkyRLError, WeightsTorn, WeightUpdateError
from skyrl_train.types import AdapterWeights, Completion, DiskWeights, GenerateRequest, NamedWeights, WeightUpdate
from skyrl_train.weight_sync.folder import read_weights
from skyrl_train.weight_sync.plan import WeightPlan

logger = logging.getLogger(__name__)

Verify = Callable[[ServerClient, int], Awaitable[None]]
"""Proof that the server has the weights of a version: raises WeightUpdateError."""


class ServerEngine:
    """Implements `engines.base.Engine` over one server. `start` must have returned before anything else is called.

    `vocab_size` bounds token ids: one outside it would end a server. `weight_dtype` is the type that weights travel
    in. `adapters` are those that the server loads at its start.
    """

    def __init__(
        self,
        *,
        traits: ServerTraits,
        model: str,
        max_context_len: int,
        vocab_size: int,
        lifeline: Lifeline,
        weight_dtype: torch.dtype,
        bucket_bytes: int = 512 * 2**20,
        adapters: Collection[str] = (),
        policy_version: int = 0,
        verify: Verify | None = None,
        prepares: bool = False,
        check_adapter: Callable[[AdapterWeights], None] = lambda adapter: None,
    ) -> None:
        self._traits = traits
        self._info = EngineInfo(
            name=traits.name,
            model=model,
            max_context_len=max_context_len,
            logprob_space=traits.logprob_space,
            capabilities=traits.capabilities,
        )
        self._vocab_size = vocab_size
        self._lifeline = lifeline
        self._weight_dtype = weight_dtype
        self._bucket_bytes = bucket_bytes
        self._adapters = frozenset(adapters)
        self._verify = verify
        self._prepares = prepares
        self._check_adapter = check_adapter
        self._traffic = Traffic(self._info, traits, lost=self._lost, check_open=self._check_open)

        self._version = policy_version
        self._weights: WeightUpdate | None = None
        self._given: WeightUpdate | None = None
        """What this life of the server was given last; `_weights` is what it should have."""
        self._whole = True
        self._unproved = False
        self._num_adapters_named = 0
        self._paused = False
        self._held = False
        self._asleep: set[Occupant] = set()
        self._closed = False
        self._failure: Exception | None = None
        self._watch: asyncio.Task[None] | None = None
        self._revival: asyncio.Task[None] | None = None
        self._last_figures: ServerFigures | None = None

    @property
    def info(self) -> EngineInfo:
        return self._info

    async def start(self) -> None:
        """Brings the server up. Raises EngineUnavailable, or ConfigError where it isn't what was asked for."""
        life = await self._lifeline.start()
        self._traffic.serving = Serving(life=life, version=self._version)
        await life.client.set_weight_version(str(self._version))
        self._watch = asyncio.create_task(self._look_after(life), name=f"watch {self._info.name}")
        self._set_gate()

    async def stats(self) -> EngineStats:
        self._check_open()
        figures = self._last_figures
        if self._revival is None:
            try:
                figures = self._last_figures = await self._life.client.figures()
            except EngineUnavailable:
                # It is being lost, which the watch will tell; what this engine knows by itself is still true.
                self._check_open()
        totals, in_server = self._traffic.totals, self._traffic.num_in_server
        running = in_server if figures is None else min(figures.num_running, in_server)
        return EngineStats(
            policy_version=self._version,
            paused=self._paused,
            num_running=running,
            num_waiting=len(self._traffic) - running,
            kv_used_frac=figures.kv_used_frac if figures else 0.0,
            num_prompt_tokens_total=totals.num_prompt_tokens,
            num_cached_tokens_total=totals.num_cached_tokens,
            num_generated_tokens_total=totals.num_generated_tokens,
            num_retractions_total=(figures.num_retractions_total if figures else None) or 0,
            num_evicted_tokens_total=(figures.num_evicted_tokens_total if figures else None) or 0,
            num_steps_total=(figures.num_steps_total if figures else None) or 0,
            accept_len=figures.accept_len if figures else None,
            num_sessions=len(self._traffic.book),
            num_restarts_total=self._lifeline.num_restarts,
            num_resent_total=totals.num_resent,
        )

    async def metrics_text(self) -> str:
        """The server's own series; empty while it is away."""
        self._check_open()
        try:
            return "" if self._revival is not None else await self._life.client.metrics_text()
        except EngineUnavailable:
            return ""

    # -- requests

    async def generate(self, request: GenerateRequest) -> Completion:
        self._check_open()
        self._check_request(request)
        return await self._traffic.generate(request)

    async def abort(self, request_ids: Sequence[str]) -> None:
        await self._traffic.abort(list(request_ids))

    async def open_session(self, capacity: int) -> str:
        self._check_open()
        if "sessions" not in self._info.capabilities:
            raise RequestRejected(f"engine {self._info.name} has no sessions; send whole prompts")
        return self._traffic.book.open(capacity)

    async def clear_session(self, session_id: str) -> None:
        self._traffic.book.clear(session_id)
        await self._traffic.close_natively(session_id)

    async def close_session(self, session_id: str) -> None:
        await self._traffic.close_session(session_id)

    # -- control

    async def pause(self, mode: PauseMode = "keep") -> None:
        self._check_open()
        self._paused = True
        self._set_gate()
        if mode == "keep" and self._traits.reports_versions:
            self._held = True
            # A server that puts a request back into its queue forgets what it had counted of it.
            await self._traffic.end_attempts(for_good=False, counted_only=True)
            await self._on_server(lambda client: client.hold())
            return
        if mode == "wait":
            try:
                await self._traffic.empty()
            except asyncio.CancelledError:
                self._paused = False
                self._set_gate()
                raise
        else:
            await self._traffic.end_attempts(for_good=mode == "abort")
        await self._on_server(lambda client: client.halt())

    async def resume(self) -> None:
        self._check_open()
        if not self._whole:
            raise WeightUpdateError(
                f"engine {self._info.name}: the last weight update failed half way; repeat it before resume"
            )
        if self._asleep:
            raise RequestRejected(f"engine {self._info.name} sleeps ({', '.join(sorted(self._asleep))}); wake it first")
        if not self._paused:
            return
        await self._on_server(lambda client: client.release())
        await self._prove()
        self._paused = self._held = False
        self._set_gate()

    async def _prove(self) -> None:
        """After an update, before the gate opens: the server scores as the trainer does. Raises WeightUpdateError."""
        if self._verify is None or not self._unproved:
            return
        try:
            await self._verify(self._life.client, self._version)
        except WeightUpdateError:
            self._whole = False
            await self._on_server(lambda client: client.halt())
            raise
        except EngineUnavailable as exc:
            raise EngineUnavailable(await self._lifeline.account(str(exc))) from exc
        self._unproved = False

    async def flush_cache(self) -> None:
        self._check_open()
        if running := self._traffic.num_in_server:
            raise RequestRejected(f"engine {self._info.name}: {running} requests run on cached prefixes; wait or pause")
        await self._on_server(lambda client: client.flush_cache())

    async def sleep(self, release: Sequence[Occupant]) -> None:
        self._check_can_sleep()
        if running := self._traffic.num_in_server:
            raise RequestRejected(f"engine {self._info.name}: {running} requests run; it sleeps only when drained")
        self._asleep |= set(release)
        self._set_gate()
        await self._life.client.sleep(release)
        if "weights" in release:
            self._whole = False  # what wakes up is memory, not weights

    async def wake(self, restore: Sequence[Occupant]) -> None:
        self._check_can_sleep()
        await self._life.client.wake(restore)
        self._asleep -= set(restore)
        self._set_gate()

    async def close(self) -> None:
        """Open requests fail with EngineUnavailable. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        tasks = [task for task in (self._watch, self._revival) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        serving = self._traffic.serving
        await self._lifeline.stop(serving.life if serving else None)
        self._traffic.look_again()

    # -- weights

    async def prepare_weights(self, update: WeightUpdate) -> None:
        self._check_open()
        source = self._readable(update).source
        if self._prepares and isinstance(source, NamedWeights) and self._revival is None:
            await self._life.channel.prepare(self._plan(source), source.tensors, version=update.version)

    async def update_weights(self, update: WeightUpdate) -> None:
        self._check_open()
        if not self._paused:
            raise WeightUpdateError(f"engine {self._info.name} must be paused for a weight update")
        update = self._readable(update)
        # A server that is just coming up gets these weights rather than the last ones.
        self._weights = update
        await self._revived()
        self._check_open()
        if self._is_at(update):
            return
        life = self._life
        try:
            await self._give(life, update)
        except WeightUpdateError as exc:
            # A refused update is the trainer's to know. A server that died of it, or was left with no whole weights,
            # is started again with these.
            torn = isinstance(exc, WeightsTorn) and self._lifeline.is_ours
            if self._lifeline.is_running() and not torn:
                raise
            self._begin_revival(life, f"during an update to version {update.version}: {exc}")
            await self._revived()
            self._check_open()
            if not self._is_at(update):
                raise

    def _is_at(self, update: WeightUpdate) -> bool:
        return self._whole and self._weights is update and self._given is update

    def _readable(self, update: WeightUpdate) -> WeightUpdate:
        source = update.source
        if isinstance(source, DiskWeights):
            return replace(update, source=NamedWeights(tensors=read_weights(source.path)))
        if isinstance(source, AdapterWeights):
            if "adapter_weights" not in self._info.capabilities:
                raise WeightUpdateError(f"engine {self._info.name} serves no adapters; send it the merged matrices")
            self._check_adapter(source)
        elif not isinstance(source, NamedWeights):
            raise WeightUpdateError(
                f"engine {self._info.name} is a process of its own and needs the tensors, found {type(source).__name__}"
            )
        return update

    async def _give(self, life: Life, update: WeightUpdate) -> None:
        """Weights to the paused server, whole; then it serves `update.version`."""
        source, adapter = update.source, None
        self._given = None
        if isinstance(source, NamedWeights):
            self._whole = False
            await life.channel.push(self._plan(source), source.tensors, version=update.version)
        else:
            assert isinstance(source, AdapterWeights), source
            adapter = await self._change_adapter(life, source, update.version)
        served = await life.client.weight_version()
        if served is not None and served != str(update.version):
            self._whole = False
            raise WeightUpdateError(
                f"engine {self._info.name} reports weights {served!r} after an update to {update.version}"
            )
        self._whole, self._given, self._version = True, update, update.version
        # The base model is what can be scored. A paused server scores nothing: the proof comes when it goes on.
        self._unproved = isinstance(source, NamedWeights)
        self._traffic.serving = Serving(life=life, version=update.version, adapter=adapter)

    def _plan(self, source: NamedWeights) -> WeightPlan:
        return WeightPlan.of(source.tensors, dtype=self._weight_dtype, bucket_bytes=self._bucket_bytes)

    async def _change_adapter(self, life: Life, adapter: AdapterWeights, version: int) -> str:
        if self._held:
            # What the server holds would go on under the old adapter.
            await self._traffic.end_attempts(for_good=False)
        self._num_adapters_named += 1
        # A name is never used twice: a server may go on serving an adapter that it unloaded.
        name = f"policy-{version}-{self._num_adapters_named}"
        try:
            await life.client.load_adapter(name, adapter)
        except RequestRejected as exc:
            raise WeightUpdateError(f"engine {self._info.name} does not take the adapter: {exc}") from exc
        serving = self._traffic.serving
        if serving is not None and serving.life is life and serving.adapter is not None:
            await life.client.unload_adapter(serving.adapter)
        await life.client.flush_cache()
        await life.client.set_weight_version(str(version))
        return name

    # -- the server's lives

    async def _look_after(self, life: Life) -> None:
        """Until the engine is closed or lost: notices the end of each life and has the next one brought up."""
        while self._failure is None:
            self._begin_revival(life, await self._lifeline.wait_dead(life))
            await self._revived()
            life = self._life

    async def _lost(self, life: Life, reason: str) -> None:
        """An attempt or a call broke. Returns at once: the gate is shut until the server is up again."""
        if self._revival is not None or self._life is not life:
            return
        if self._lifeline.is_running() and await life.client.is_healthy():
            await asyncio.sleep(FIRST_BUSY_WAIT_S)  # it answers: one connection broke
        else:
            self._begin_revival(life, reason)

    def _begin_revival(self, life: Life, reason: str) -> None:
        if self._revival is None and self._life is life and not self._closed:
            self._revival = asyncio.create_task(self._revive(life, reason), name=f"revive {self._info.name}")
            self._set_gate()

    async def _revived(self) -> None:
        if self._revival is not None:
            await asyncio.wait({self._revival})

    async def _revive(self, life: Life, reason: str) -> None:
        try:
            new = await self._lifeline.revive(life, reason)
            self._traffic.serving = Serving(life=new, version=self._version)
            await self._bring_up_to_date(new)
        except Exception as exc:  # the one boundary: every caller gets it, chained
            self._failure = exc
            if not isinstance(exc, SkyRLError):
                logger.exception("engine %s is lost", self._info.name)
        finally:
            self._revival = None
            self._set_gate()
            if self._failure is not None:
                self._traffic.look_again()

    async def _bring_up_to_date(self, life: Life) -> None:
        """The current weights, or, where the trainer has moved on since, none: the next update opens the gate."""
        await life.client.halt()
        update = self._weights
        if update is None:
            await life.client.set_weight_version(str(self._version))
        else:
            source = update.source
            assert isinstance(source, NamedWeights | AdapterWeights), source
            self._whole = False
            if source.still_valid():
                await self._give(life, update)
                self._whole = source.still_valid()
            if not self._whole:
                logger.warning(
                    "engine %s is up without the weights of version %d, which the trainer no longer has; it serves "
                    "again with the next update",
                    self._info.name,
                    update.version,
                )
                self._given, self._paused = None, True
        if not self._paused:
            await life.client.release()
            await self._prove()

    async def _on_server(self, call: Callable[[ServerClient], Awaitable[None]]) -> None:
        """A control call that may be repeated; a server that is lost meanwhile is brought up and asked again."""
        for last in (False, True):
            await self._revived()
            self._check_open()
            life = self._life
            try:
                await call(life.client)
                return
            except EngineUnavailable as exc:
                if last:
                    raise
                await self._lost(life, str(exc))

    # -- small things

    @property
    def _life(self) -> Life:
        assert self._traffic.serving is not None, f"engine {self._info.name} was not started"
        return self._traffic.serving.life

    def _set_gate(self) -> None:
        is_up = self._traffic.serving is not None and self._revival is None and self._failure is None
        if is_up and not self._paused and not self._asleep and not self._closed:
            self._traffic.open_gate()
        else:
            self._traffic.shut_gate()

    def _check_open(self) -> None:
        if self._failure is not None:
            raise EngineUnavailable(f"engine {self._info.name} is lost: {self._failure}") from self._failure
        if self._closed:
            raise EngineUnavailable(f"engine {self._info.name} is closed")

    def _check_can_sleep(self) -> None:
        self._check_open()
        if "sleep" not in self._info.capabilities:
            raise RequestRejected(f"engine {self._info.name} can't sleep")

    def _check_request(self, request: GenerateRequest) -> None:
        rid, name, sampling = request.request_id, self._info.name, request.sampling
        if rid in self._traffic:
            raise RequestRejected(f"request {rid}: engine {name} has a running request of this id")
        for token in (*request.prompt_token_ids, *sampling.stop_token_ids):
            if not 0 <= token < self._vocab_size:
                raise RequestRejected(
                    f"request {rid}: token id {token} is outside of engine {name}'s vocabulary [0, {self._vocab_size})"
                )
        if request.adapter is not None and request.adapter not in self._adapters:
            known = ", ".join(sorted(self._adapters)) or "none"
            raise RequestRejected(f"request {rid}: engine {name} has no adapter {request.adapter!r}; it has {known}")
        for asked, capability in (
            (request.session is not None, "sessions"),
            (request.priority != 0, "priority"),
            (sampling.grammar is not None, "structured_output"),
            (bool(sampling.stop), "stop_strings"),
            (sampling.min_p > 0, "min_p"),
        ):
            if asked and capability not in self._info.capabilities:
                raise RequestRejected(f"request {rid}: engine {name} has no {capability.replace('_', ' ')}")
