"""SGLang's HTTP API as a ServerClient. Checked against 0.5.23 while it runs, and against the source of 0.5.17.

What differs from what its documents suggest, and is handled here:
- `/abort_request` ends every request whose id *begins* with the one given: ids on the wire are prefix-free.
- An abort that overtakes its request, or meets it before the scheduler has it, is lost: aborts are repeated, and an
  attempt that never started is answered here.
- `/health` generates a token: it takes a second, and fails while the server is paused.
- A token id outside the vocabulary ends the whole server: it is refused here.
- In a session, a continuation that begins with the beginning-of-text token loses it.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from skyrl_train.engines.base import Occupant
from skyrl_train.engines.server.client import Attempt, AttemptResult, ServerFigures, ServerTraits
from skyrl_train.engines.sglang.adapters import AdapterFolders
from skyrl_train.engines.sglang.answers import attempt_result, prompt_logprobs
from skyrl_train.engines.sglang.args import CONTEXT_RESERVE
from skyrl_train.engines.sglang.figures import Counts, server_figures
from skyrl_train.engines.sglang.identity import check_identity
from skyrl_train.engines.sglang.sampling import cut_ids, sampling_fields
from skyrl_train.engines.sglang.submission import Sending, Submission
from skyrl_train.engines.sglang.wire import Wire
from skyrl_train.errors import EngineError, EngineUnavailable, RequestRejected, WeightUpdateError
from skyrl_train.observability.tracing import traceparent
from skyrl_train.types import AdapterWeights

logger = logging.getLogger(__name__)

HEALTH_TIMEOUT_S = 10.0
LOAD_TIMEOUT_S = 300.0
FLUSH_WAIT_S = 1.0
"""The last step's bookkeeping may still run when its answers are here."""
ABORT_AGAIN_S = (0.25, 0.5, 1.0, 2.0, 6.0)
"""Pauses between repeated aborts. What hasn't returned after them never started: the server lost the abort."""


class SGLangClient:
    """One running server. `expected` are the ServerArgs that it must have been started with (see launch.py).

    `vocab_size` bounds token ids; without it only negative ones are refused. `bos_token_id` is the tokenizer's.
    `context_length` is the server's own, which it does not serve to its end (args.CONTEXT_RESERVE). `greedy_only`: it
    samples nothing (traits.samples_greedily). `batched`: it can answer the requests of a batch one by one.
    `health_path` is what `is_healthy` asks: "/health" of a server that runs with
    SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION=0, as launch.py starts it; of others an answer of "/model_info".
    """

    def __init__(
        self,
        url: str,
        traits: ServerTraits,
        *,
        vocab_size: int | None = None,
        bos_token_id: int | None = None,
        api_key: str | None = None,
        expected: Mapping[str, Any] | None = None,
        health_path: str = "/model_info",
        context_length: int | None = None,
        has_metrics: bool = False,
        greedy_only: bool = False,
        adapter_folder: Path | None = None,
        batched: bool = True,
    ) -> None:
        self._traits = traits
        self._name = traits.name
        self._wire = Wire(url, name=traits.name, api_key=api_key)
        self._submission = Submission(self._wire, batched=batched)
        self._adapters = AdapterFolders(adapter_folder)
        self._vocab_size = vocab_size
        self._bos_token_id = bos_token_id
        self._expected = dict(expected or {})
        self._context_length = context_length
        self._has_metrics = has_metrics
        self._greedy_only = greedy_only
        self._low_first = bool(self._expected.get("schedule_low_priority_values_first"))
        self._health_path = health_path
        self._in_flight: dict[str, asyncio.Future[Mapping[str, Any]]] = {}
        self._chores: set[asyncio.Task[None]] = set()
        self._counts = Counts()

    @property
    def traits(self) -> ServerTraits:
        return self._traits

    async def is_healthy(self) -> bool:
        try:
            await self._wire.get(self._health_path, what=f"{self._name}: health", timeout_s=HEALTH_TIMEOUT_S)
        except EngineError:
            return False
        return True

    async def check_identity(self) -> None:
        found = json.loads(await self._wire.get("/server_info", what=f"{self._name}: server_info"))
        check_identity(found, self._expected, release=self._traits.release, name=self._name, url=self._wire.url)

    def check(self, attempt: Attempt) -> None:
        what = f"{self._name}: request {attempt.wire_id}"
        self._token_ids(attempt, what)
        sampling_fields(attempt.sampling, self._traits.capabilities, what=what)

    async def generate(self, attempt: Attempt) -> AttemptResult:
        what = f"{self._name}: request {attempt.wire_id}"
        sampling = attempt.sampling
        answer: asyncio.Future[Mapping[str, Any]] = asyncio.get_running_loop().create_future()
        sending = Sending(
            rid=rid_of(attempt.wire_id),
            what=what,
            token_ids=self._token_ids(attempt, what),
            sampling=sampling_fields(sampling, self._traits.capabilities, what=what),
            adapter=self._adapter(attempt, what),
            priority=self._priority(attempt),
            session=self._session(attempt, what),
            traceparent=traceparent(),
            answer=answer,
        )
        if sending.rid in self._in_flight:
            raise RequestRejected(f"{what}: an attempt of this id is in the server already")
        self._in_flight[sending.rid] = answer
        self._submission.add(sending)
        try:
            body = await answer
        except asyncio.CancelledError:
            self._spawn(self._end([sending.rid]))
            raise
        finally:
            del self._in_flight[sending.rid]
        self._counts.add(body)
        return attempt_result(
            body,
            what=what,
            stop_token_ids=sampling.stop_token_ids,
            stop=sampling.stop,
            cut_at=cut_ids(sampling),
            with_spans=self._traits.reports_versions,
        )

    async def abort(self, wire_ids: Sequence[str]) -> None:
        rids = [rid_of(wire_id) for wire_id in wire_ids]
        await self._post_aborts(rids)
        if waiting := [rid for rid in rids if rid in self._in_flight]:
            self._spawn(self._see_ended(waiting))

    async def hold(self) -> None:
        """`retract` puts what runs back into the queue and frees its cache, which is computed anew afterwards.
        `in_place` would keep the cache: keys and values of the old weights under answers of the new ones, and the
        flush of the update would fail.
        """
        await self._post("/pause_generation", {"mode": "retract"})

    async def halt(self) -> None:
        """As hold: the mode `abort` polls once a second until the server has ended everything, which it has."""
        await self._post("/pause_generation", {"mode": "retract"})

    async def release(self) -> None:
        await self._post("/continue_generation", {})

    async def flush_cache(self) -> None:
        await self._post(f"/flush_cache?timeout={FLUSH_WAIT_S:g}", {})

    async def weight_version(self) -> str | None:
        found = json.loads(await self._wire.get("/model_info", what=f"{self._name}: model_info"))
        version = found.get("weight_version")
        return None if version is None else str(version)

    async def set_weight_version(self, version: str) -> None:
        await self._done(
            "/update_weight_version", {"new_version": version, "abort_all_requests": False}, f"weight version {version}"
        )

    async def load_adapter(self, name: str, adapter: AdapterWeights | str) -> None:
        """Tensors travel as files: SGLang loads an adapter that it evicted again from the path that it came from,
        which one that came as tensors does not have. A name is never used twice.
        """
        folder = adapter if isinstance(adapter, str) else await self._adapters.write(name, adapter)
        try:
            await self._done("/load_lora_adapter", {"lora_name": name, "lora_path": folder}, f"adapter {name}")
        except EngineError:
            await self._adapters.remove(name)
            raise

    async def unload_adapter(self, name: str) -> None:
        """The server goes on serving the name from its path, if there is one: with its files gone it refuses it."""
        await self._done("/unload_lora_adapter", {"lora_name": name}, f"adapter {name}")
        await self._adapters.remove(name)

    async def open_session(self, session_id: str, capacity: int) -> None:
        """`capacity` is passed on; SGLang stores it and holds nobody to it."""
        await self._post("/open_session", {"session_id": session_id, "capacity_of_str_len": capacity})

    async def close_session(self, session_id: str) -> None:
        await self._post("/close_session", {"session_id": session_id})

    async def sleep(self, release: Sequence[Occupant]) -> None:
        await self._occupants("/release_memory_occupation", release)

    async def wake(self, restore: Sequence[Occupant]) -> None:
        await self._occupants("/resume_memory_occupation", restore)

    async def score(self, token_ids: Sequence[int]) -> tuple[float, ...]:
        what = f"{self._name}: scoring"
        self._check_ids(token_ids, what)
        body = {
            "input_ids": list(token_ids),
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        return prompt_logprobs(json.loads(await self._wire.post("/generate", body, what=what)), what=what)

    async def figures(self) -> ServerFigures:
        loads = json.loads(await self._wire.get("/v1/loads", what=f"{self._name}: loads"))["loads"]
        return server_figures(loads, await self.metrics_text(), self._counts)

    async def metrics_text(self) -> str:
        if not self._has_metrics:
            return ""
        return await self._wire.get("/metrics", what=f"{self._name}: metrics")

    async def close(self) -> None:
        await self._submission.close()
        chores = list(self._chores)
        for chore in chores:
            chore.cancel()
        await asyncio.gather(*chores, return_exceptions=True)
        await self._adapters.close()
        await self._wire.close()

    def _token_ids(self, attempt: Attempt, what: str) -> tuple[int, ...]:
        ids = attempt.token_ids
        self._check_ids(ids, what)
        if self._greedy_only and attempt.sampling.temperature:
            raise RequestRejected(
                f"{what}: temperature={attempt.sampling.temperature:g}: SGLang on a CPU takes the likeliest token when "
                "it speculates, whatever the temperature; turn generator.speculative_decoding.enabled off"
            )
        if self._context_length is not None:
            room = self._context_length - CONTEXT_RESERVE
            if len(ids) + attempt.sampling.max_new_tokens > room:
                raise RequestRejected(
                    f"{what}: {len(ids)} tokens and max_new_tokens={attempt.sampling.max_new_tokens} are more than the "
                    f"context of {room}; lower generator.max_input_length or "
                    "generator.sampling_params.max_generate_length, or raise generator.max_model_len"
                )
        session = attempt.session
        if session is not None and session.parent_wire_id is not None and ids[0] == self._bos_token_id:
            return (ids[0], *ids)  # the server drops the first
        return ids

    def _check_ids(self, ids: Sequence[int], what: str) -> None:
        if not ids:
            raise RequestRejected(f"{what}: there are no tokens to start from")
        if min(ids) < 0 or (self._vocab_size is not None and max(ids) >= self._vocab_size):
            bound = "the vocabulary" if self._vocab_size is None else str(self._vocab_size)
            wrong = next(token for token in ids if token < 0 or token >= (self._vocab_size or token + 1))
            raise RequestRejected(f"{what}: token id {wrong} is not in [0, {bound}); it would end the server")

    def _priority(self, attempt: Attempt) -> int | None:
        """Ours is higher first; a server may have been told otherwise."""
        if "priority" not in self._traits.capabilities:
            return None
        return -attempt.priority if self._low_first else attempt.priority

    def _adapter(self, attempt: Attempt, what: str) -> str | None:
        if attempt.adapter is not None and "lora" not in self._traits.capabilities:
            raise RequestRejected(f"{what}: adapter {attempt.adapter}: this server runs without generator.lora.enabled")
        return attempt.adapter

    def _session(self, attempt: Attempt, what: str) -> dict[str, Any] | None:
        """The offset stays unset: 0 appends too, and -1 would drop a token."""
        session = attempt.session
        if session is None:
            return None
        if cut_ids(attempt.sampling):
            raise RequestRejected(
                f"{what}: ignore_eos with stop_token_ids in a session: the server's history would go on behind the stop"
            )
        if session.parent_wire_id is None:
            return {"id": session.session_id}
        return {"id": session.session_id, "rid": rid_of(session.parent_wire_id)}

    async def _post(self, path: str, body: Mapping[str, Any]) -> str:
        return await self._wire.post(path, body, what=f"{self._name}: {path}")

    async def _done(self, path: str, body: Mapping[str, Any], what: str) -> None:
        """A call that changes what the server has, and says whether it did. Raises WeightUpdateError."""
        try:
            text = await self._wire.post(path, body, what=f"{self._name}: {what}", timeout_s=LOAD_TIMEOUT_S)
        except RequestRejected as exc:
            raise WeightUpdateError(str(exc)) from exc
        answer = json.loads(text)
        if not answer.get("success"):
            message = answer.get("error_message") or answer.get("message")
            raise WeightUpdateError(f"{self._name}: {what}: SGLang refused {path}: {message}")

    async def _occupants(self, path: str, occupants: Sequence[Occupant]) -> None:
        if "sleep" not in self._traits.capabilities:
            raise RequestRejected(
                f"{self._name}: without --enable-memory-saver SGLang answers {path} and frees nothing; it is set where "
                "trainer.placement.colocate_all is, on GPUs"
            )
        await self._post(path, {"tags": list(occupants)})

    async def _post_aborts(self, rids: Iterable[str]) -> None:
        await asyncio.gather(*(self._post("/abort_request", {"rid": rid}) for rid in rids))

    async def _see_ended(self, rids: Sequence[str]) -> None:
        """Repeats an abort that the server lost; answers for it what never started there."""
        waiting = {rid: self._in_flight[rid] for rid in rids if rid in self._in_flight}
        for pause in ABORT_AGAIN_S:
            await asyncio.wait(waiting.values(), timeout=pause)
            waiting = {rid: answer for rid, answer in waiting.items() if not answer.done()}
            if not waiting:
                return
            await self._post_aborts(waiting)
        for rid, answer in waiting.items():
            if not answer.done():
                logger.warning("%s: %s: the server lost its abort; it is answered as not started", self._name, rid)
                answer.set_result(_never_started(rid))

    async def _end(self, rids: Sequence[str]) -> None:
        """What nobody waits for any more. Twice: the first may overtake its request."""
        await self._post_aborts(rids)
        await asyncio.sleep(ABORT_AGAIN_S[0])
        await self._post_aborts(rids)

    def _spawn(self, chore: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(self._quietly(chore))
        self._chores.add(task)
        task.add_done_callback(self._chores.discard)

    async def _quietly(self, chore: Coroutine[Any, Any, None]) -> None:
        """An abort that can't be delivered has no one to tell: the server is gone, or its requests are."""
        try:
            await chore
        except (EngineUnavailable, RequestRejected) as exc:
            logger.info("%s: an abort was not delivered: %s", self._name, exc)


def rid_of(wire_id: str) -> str:
    """The server's name of an attempt. None begins with another: the mark at the end occurs nowhere else."""
    return f"{wire_id.replace('%', '%25').replace('$', '%24')}$"


def _never_started(rid: str) -> Mapping[str, Any]:
    meta = {"id": rid, "finish_reason": {"type": "abort"}, "output_token_logprobs": []}
    return {"output_ids": [], "meta_info": meta}
