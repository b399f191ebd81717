"""A server as an Engine, whatever the server is: its pauses, its weights and its lives. Requests: see traffic.

gate open while the server is up, awake, has its weights whole and is not paused

pause keep    the server holds its requests (it then says which version sampled what), or, where it can't,
              they are ended and go on after `resume` from what they have: nothing old is left in a cache
server lost   what was in it is sent again; the next one is given the current weights, the gate opens: see lives
              asleep: nobody needs it, and the trainer has its GPU; the next one is started when it is woken
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Collection, Sequence

import torch

from skyrl_train.engines.base import EngineInfo, EngineStats, Occupant, PauseMode
from skyrl_train.engines.deadline import Deadline
from skyrl_train.engines.server.client import ServerTraits
from skyrl_train.engines.server.counters import Counters
from skyrl_train.engines.server.lifeline import Life, Lifeline
from skyrl_train.engines.server.lives import RETRY_S, Lives
from skyrl_train.engines.server.traffic import Serving, Traffic
from skyrl_train.engines.server.weights import ServerWeights, Verify
from skyrl_train.errors import EngineError, EngineUnavailable, RequestRejected, WeightsTorn, WeightUpdateError
from skyrl_train.types import AdapterWeights, Completion, GenerateRequest, WeightUpdate

logger = logging.getLogger(__name__)

LETTING_GO_S = 15.0
"""How long an update may take to end in a server that is lost."""


class ServerEngine:
    """Implements `engines.base.Engine` over one server. `start` must have returned before anything else is called.

    `vocab_size` bounds token ids: one outside it would end a server. `end_token_ids` are those that end an answer of
    this model. `weight_dtype` is the type that weights travel in. `adapters` are those that the server loads at its
    start.
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
        end_token_ids: Collection[int] = (),
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
        self._adapters = frozenset(adapters)
        self._prepares = prepares
        self._lives = Lives(
            self._info.name,
            lifeline,
            ended=self._end,
            settle=self._bring_up_to_date,
            refused=self._keep_without_weights,
            sleeps=lambda: bool(self._asleep),
            changed=self._look_again,
        )
        self._traffic = Traffic(
            self._info,
            traits,
            lost=self._lives.lost,
            check_open=self._lives.check_open,
            end_token_ids=end_token_ids,
        )
        self._weights = ServerWeights(
            self._info,
            weight_dtype=weight_dtype,
            bucket_bytes=bucket_bytes,
            version=policy_version,
            verify=verify,
            check_adapter=check_adapter,
        )
        self._counters = Counters()
        self._paused = False
        self._draining = False
        """A pause waits for what has begun."""
        self._held = False
        self._asleep: set[Occupant] = set()
        self._closed = False
        self._giving: asyncio.Task[None] | None = None
        self._left_sessions: set[str] = set()
        """What a server that is somebody else's may still have open of an earlier life."""

    @property
    def info(self) -> EngineInfo:
        return self._info

    async def start(self) -> None:
        """Brings the server up. Raises EngineUnavailable, or ConfigError where it isn't what was asked for: nothing of
        it is left then.
        """
        life: Life | None = None
        try:
            life = await self._lives.start()
            await life.client.set_weight_version(str(self._weights.version))
        except BaseException:
            await self._lifeline.stop(life)
            raise
        self._traffic.serving = Serving(life=life, version=self._weights.version)
        self._lives.watch()
        self._set_gate()

    async def stats(self) -> EngineStats:
        self._lives.check_open()
        if self._lives.is_up:
            life = self._lives.life
            try:
                seen = await life.client.figures()
                if self._lives.is_up and self._lives.life is life:
                    self._counters.look(seen)
            except EngineError:
                # It is being lost, which the watch will tell; what this engine knows by itself is still true.
                self._lives.check_open()
        figures, totals, in_server = self._counters.latest, self._traffic.totals, self._traffic.num_in_server
        running = in_server if figures is None else min(figures.num_running, in_server)
        return EngineStats(
            policy_version=self._weights.version,
            paused=self._paused,
            num_running=running,
            num_waiting=len(self._traffic) - running,
            kv_used_frac=figures.kv_used_frac if figures else 0.0,
            num_prompt_tokens_total=totals.num_prompt_tokens,
            num_cached_tokens_total=totals.num_cached_tokens,
            num_generated_tokens_total=totals.num_generated_tokens,
            num_retractions_total=self._counters.total("num_retractions_total"),
            num_evicted_tokens_total=self._counters.total("num_evicted_tokens_total"),
            num_steps_total=self._counters.total("num_steps_total"),
            accept_len=figures.accept_len if figures else None,
            num_sessions=len(self._traffic.book),
            num_restarts_total=self._lifeline.num_restarts,
            num_resent_total=totals.num_resent,
        )

    async def metrics_text(self) -> str:
        """The server's own series; empty while it is away."""
        self._lives.check_open()
        try:
            return await self._lives.life.client.metrics_text() if self._lives.is_up else ""
        except EngineUnavailable:
            self._lives.check_open()
            return ""

    # -- requests

    async def generate(self, request: GenerateRequest) -> Completion:
        self._lives.check_open()
        self._check_request(request)
        async with Deadline(request, self.abort) as deadline:
            return deadline.marked(await self._traffic.generate(request))

    async def abort(self, request_ids: Sequence[str]) -> None:
        await self._returning(self._traffic.abort(list(request_ids)))

    async def open_session(self, capacity: int) -> str:
        self._lives.check_open()
        if "sessions" not in self._info.capabilities:
            raise RequestRejected(f"engine {self._info.name} has no sessions; send whole prompts")
        return self._traffic.book.open(capacity)

    async def clear_session(self, session_id: str) -> None:
        self._traffic.book.clear(session_id)
        await self._traffic.close_natively(session_id)

    async def close_session(self, session_id: str) -> None:
        await self._returning(self._traffic.close_session(session_id))

    async def _returning(self, ending: Awaitable[None]) -> None:
        """A server that doesn't end what it is asked to end is lost: then all that is in it comes back."""
        life = self._traffic.serving.life if self._traffic.serving is not None else None
        try:
            await ending
        except EngineUnavailable as exc:
            if life is None or self._lives.is_over:
                raise
            self._lives.lose(life, str(exc))

    # -- control

    async def pause(self, mode: PauseMode = "keep") -> None:
        self._lives.check_open()
        if mode == "wait":
            await self._drain()
        self._paused = True
        self._set_gate()
        if mode == "keep" and self._traits.reports_versions:
            self._held = True
            # A server that puts a request back into its queue forgets what it had counted of it.
            await self._returning(self._traffic.end_attempts(for_good=False, counted_only=True))
            await self._lives.call(lambda client: client.hold())
            return
        await self._returning(self._traffic.end_attempts(for_good=mode == "abort"))
        await self._lives.call(lambda client: client.halt())

    async def _drain(self) -> None:
        """Paused but for what has begun, until that is done. A server that dies meanwhile is brought up for it."""
        if self._paused and self._traffic.num_begun and self._weights.whole and not self._asleep:
            await self.resume()  # an earlier pause froze it
        self._paused = self._draining = True
        self._set_gate()
        try:
            while self._traffic.num_begun and (self._lives.is_reviving or self._may_serve):
                await self._traffic.changed()
                self._lives.check_open()
        except asyncio.CancelledError:
            self._paused = False
            raise
        finally:
            self._draining = False
            self._set_gate()

    async def resume(self) -> None:
        """What was held goes on before new weights are proved: a paused server scores nothing. So nobody gets what they
        make before the verdict, and if they are the wrong ones, that is dropped.
        """
        proof = self._traffic.proof = asyncio.get_running_loop().create_future()
        dropped: int | None = None
        try:
            await self._go_on()
        except BaseException:
            dropped = self._weights.version if self._weights.needs_proof else None
            raise
        finally:
            if self._traffic.proof is proof:
                self._traffic.proof = None
            proof.set_result(dropped)

    async def _go_on(self) -> None:
        said = "it was lost again and again"
        for _ in range(2):
            await self._lives.revived()
            if not self._weights.whole:
                raise WeightUpdateError(
                    f"engine {self._info.name}: the last weight update failed half way; repeat it before resume"
                )
            if self._asleep:
                raise RequestRejected(
                    f"engine {self._info.name} sleeps ({', '.join(sorted(self._asleep))}); wake it first"
                )
            if not self._paused:
                return
            life = self._lives.life
            try:
                await life.client.release()
                await self._prove(life)
            except WeightUpdateError:
                await self._returning(self._traffic.end_attempts(for_good=False))
                raise
            except EngineUnavailable as exc:
                said = await self._lifeline.account(str(exc))
                if not await self._lives.lost(life, said):
                    await asyncio.sleep(RETRY_S)
                continue
            if self._lives.is_up and self._lives.life is life:
                self._paused = self._held = False
                self._set_gate()
                return
        self._lives.check_open()
        raise EngineUnavailable(f"engine {self._info.name} could not go on after a pause: {said}")

    async def _prove(self, life: Life) -> None:
        try:
            await self._weights.prove(life.client)
        except (WeightUpdateError, asyncio.CancelledError):
            with contextlib.suppress(EngineUnavailable):  # a server that is gone serves nobody
                await life.client.halt()
            raise

    async def flush_cache(self) -> None:
        self._lives.check_open()
        if running := self._traffic.num_in_server:
            raise RequestRejected(f"engine {self._info.name}: {running} requests run on cached prefixes; wait or pause")
        await self._lives.call(lambda client: client.flush_cache())

    async def sleep(self, release: Sequence[Occupant]) -> None:
        self._check_can_sleep()
        if running := self._traffic.num_in_server:
            raise RequestRejected(f"engine {self._info.name}: {running} requests run; it sleeps only when drained")
        before, was_whole = set(self._asleep), self._weights.whole
        self._asleep |= set(release)
        if "weights" in release:
            self._weights.whole = False  # what wakes up is memory, not weights
        self._set_gate()
        try:
            await self._lives.call(lambda client: client.sleep(release))
        except RequestRejected:  # it did not even begin
            self._asleep, self._weights.whole = before, was_whole
            self._set_gate()
            raise

    async def wake(self, restore: Sequence[Occupant]) -> None:
        self._check_can_sleep()
        wanted = [occupant for occupant in restore if occupant in self._asleep]
        if wanted and not self._lives.is_buried:
            await self._lives.call(lambda client: client.wake(wanted))
        if wanted and self._lives.is_buried:
            await self._wake_next_life()
        self._asleep -= set(wanted)
        self._set_gate()

    async def _wake_next_life(self) -> None:
        self._asleep.clear()
        await self._lives.unbury()

    async def close(self) -> None:
        """Open requests fail with EngineUnavailable. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        was_up = await self._lives.close()
        await self._stop_giving()
        serving = self._traffic.serving
        self._left_sessions |= self._traffic.forget_server()
        try:
            if serving is not None and was_up and not self._lifeline.is_ours:
                await self._close_left_sessions(serving.life)
        finally:
            await self._lifeline.stop(serving.life if serving else None)
            self._traffic.look_again()

    # -- weights

    async def prepare_weights(self, update: WeightUpdate) -> None:
        self._lives.check_open()
        update = await self._weights.readable(update)
        if self._prepares and self._lives.is_up:
            life = self._lives.life
            try:
                await self._weights.prepare(life, update)
            except WeightUpdateError:
                if self._lives.is_up and self._lives.life is life:
                    raise
                # The life that it was prepared for is over; the next one's update does it all.

    async def update_weights(self, update: WeightUpdate) -> None:
        self._lives.check_open()
        if not self._paused:
            raise WeightUpdateError(f"engine {self._info.name} must be paused for a weight update")
        if "weights" in self._asleep and not self._lives.is_buried:
            raise WeightUpdateError(f"engine {self._info.name} sleeps and has no room for weights; wake them first")
        update = await self._weights.readable(update)
        # A server that is just coming up gets these weights rather than the last ones.
        before, self._weights.wanted = self._weights.wanted, update
        if self._lives.is_buried:
            await self._wake_next_life()
        await self._lives.revived()
        if self._weights.has(update):
            return
        life = self._lives.life
        try:
            await self._give(life, update)
        except (WeightUpdateError, EngineUnavailable) as exc:
            failure = exc if isinstance(exc, WeightUpdateError) else WeightUpdateError(str(exc))
            if await self._is_lost_to(life, update, exc):
                await self._lives.revived()
                if not self._weights.has(update):
                    raise failure from exc
            else:
                # A refused update is the trainer's to know.
                if self._weights.whole:
                    self._weights.wanted = before
                raise failure from exc

    async def _is_lost_to(self, life: Life, update: WeightUpdate, exc: Exception) -> bool:
        """A server that died of an update, or was left with nobody knows which weights, is started again with it."""
        said = f"during an update to version {update.version}: {exc}"
        if self._lifeline.is_ours and isinstance(exc, WeightsTorn | EngineUnavailable):
            self._lives.lose(life, said)
            return True
        return await self._lives.lost(life, said)

    async def _give(self, life: Life, update: WeightUpdate) -> None:
        """As a task of its own: a server that is lost meanwhile ends it."""
        if self._held and isinstance(update.source, AdapterWeights):
            # What the server holds would go on under the old adapter.
            await self._returning(self._traffic.end_attempts(for_good=False))
        giving = self._giving = asyncio.create_task(self._give_to(life, update), name=f"weights to {self._info.name}")
        try:
            await asyncio.wait({giving})
        except asyncio.CancelledError:
            await self._stop_giving()
            raise
        finally:
            if self._giving is giving:
                self._giving = None
        if giving.cancelled():
            raise EngineUnavailable(f"engine {self._info.name} was lost while it was given weights")
        giving.result()

    async def _give_to(self, life: Life, update: WeightUpdate) -> None:
        weights = self._weights
        await weights.give(life, update)
        self._traffic.serving = Serving(life=life, version=weights.version, adapter=weights.adapter)

    async def _stop_giving(self) -> None:
        if (giving := self._giving) is not None:
            giving.cancel()
            await asyncio.wait({giving}, timeout=LETTING_GO_S)
            if giving.done() and not giving.cancelled():
                giving.exception()  # seen: whoever waits for it takes it too

    # -- the server's lives

    async def _end(self, life: Life) -> None:
        """Nothing is left of this life, of what the engine had of it."""
        left, stays = self._traffic.forget_server(), not self._lifeline.is_ours
        if stays:
            self._left_sessions |= left
        else:
            self._counters.life_over()
        await self._lifeline.end(life)
        await self._stop_giving()
        self._weights.life_over(server_stays=stays)

    async def _bring_up_to_date(self, life: Life) -> None:
        """The current weights, or, where the trainer has moved on since, none: the next update opens the gate."""
        weights = self._weights
        self._traffic.serving = Serving(life=life, version=weights.version)
        await life.client.halt()
        await self._close_left_sessions(life)
        if weights.wanted is None:
            await life.client.set_weight_version(str(weights.version))
            weights.whole = weights.whole or self._lifeline.is_ours
        else:
            weights.whole = False
            if weights.may_be_read() and not self._asleep:
                await self._give_to(life, weights.wanted)
                weights.whole = weights.may_be_read()
            if not weights.whole:
                logger.warning(
                    "engine %s is up without the weights of version %d, which the trainer no longer has; it serves "
                    "again with the next update",
                    self._info.name,
                    weights.wanted.version,
                )
                weights.distrust()
                self._paused = True
        if weights.whole and not self._asleep and (self._draining or not self._paused):
            await life.client.release()
            await self._prove(life)

    def _keep_without_weights(self, refusal: WeightUpdateError) -> None:
        """Whoever paused the engine meets this at `resume`, or gives it other weights. Nobody would give any to one
        that is waited for.
        """
        self._weights.distrust()
        if not self._paused:
            raise refusal
        logger.error("engine %s is up and did not take its weights: %s", self._info.name, refusal)

    async def _close_left_sessions(self, life: Life) -> None:
        left, self._left_sessions = self._left_sessions, set()
        for session_id in sorted(left):
            with contextlib.suppress(EngineError):
                await life.client.close_session(session_id)

    def _look_again(self) -> None:
        self._set_gate()
        self._traffic.look_again()

    # -- small things

    @property
    def _may_serve(self) -> bool:
        return self._lives.is_up and self._weights.whole and not self._asleep

    def _set_gate(self) -> None:
        if self._traffic.serving is None or not self._may_serve:
            self._traffic.set_gate("shut")
        else:
            self._traffic.set_gate("draining" if self._draining else "shut" if self._paused else "open")

    def _check_can_sleep(self) -> None:
        self._lives.check_open()
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
        if sampling.logit_processor is not None:
            raise RequestRejected(
                f"request {rid}: engine {name} runs no logit processors by their dotted path "
                f"({sampling.logit_processor.path}); the embedded engine does"
            )
        for asked, capability in (
            (request.session is not None, "sessions"),
            (request.priority != 0, "priority"),
            (sampling.grammar is not None, "structured_output"),
            (bool(sampling.stop), "stop_strings"),
            (sampling.min_p > 0, "min_p"),
        ):
            if asked and capability not in self._info.capabilities:
                raise RequestRejected(f"request {rid}: engine {name} has no {capability.replace('_', ' ')}")
