"""One vLLM server as a ServerClient: its OpenAI completions with token ids, and its development endpoints.

vLLM has no sessions: a turn is its whole prompt, and the prefix cache finds what it knows. `pause` stops the
scheduler; requests that come while it is paused wait. What a `keep` pause freezes would go on with keys and values of
the old weights, so the traits say `reports_versions=False` and the engine ends its requests before an update.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from skyrl_train.engines.base import Occupant
from skyrl_train.engines.server.client import (
    Attempt,
    AttemptResult,
    ServerFigures,
    ServerTraits,
)
from skyrl_train.engines.vllm.adapters import AdapterFolders
from skyrl_train.engines.vllm.answers import Decode, attempt_result
from skyrl_train.engines.vllm.connection import Connection
from skyrl_train.engines.vllm.derived import PROCESSED_LOGPROBS
from skyrl_train.engines.vllm.metrics import figures
from skyrl_train.engines.vllm.sampling import completion_body, engine_request_id
from skyrl_train.errors import ConfigError, EngineError, EngineUnavailable, RequestRejected
from skyrl_train.observability.tracing import traceparent
from skyrl_train.types import AdapterWeights

HEALTH_TIMEOUT_S = 5.0
ADAPTER_TIMEOUT_S = 300.0
SLEEP_TIMEOUT_S = 300.0
SERVER_INFO_TIMEOUT_S = 180.0
"""It also asks the system's tools what is installed."""
SCORE_TIMEOUT_S = 600.0
WARM_UP_TIMEOUT_S = 600.0

_TAGS: Mapping[Occupant, str] = {"weights": "weights", "kv_cache": "kv_cache"}


class VLLMClient:
    """The calls of one running server.

    `model` is the served name of the base model. `max_adapters` bounds what may be loaded at once: one less than
    the server's --max-loras where its last slot must stay empty. `decode` turns ids into text with special tokens
    kept; it is needed with speculation and stop strings. `greedy_only` refuses all other sampling.
    """

    def __init__(
        self,
        base_url: str,
        *,
        traits: ServerTraits,
        model: str,
        vocab_size: int | None = None,
        max_model_len: int | None = None,
        max_adapters: int | None = None,
        decode: Decode | None = None,
        greedy_only: bool = False,
        api_key: str | None = None,
    ) -> None:
        self.http = Connection(base_url, api_key=api_key)
        self.model = model
        self._traits = traits
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._max_adapters = max_adapters
        self._decode = decode
        self._greedy_only = greedy_only
        self._folders = AdapterFolders()

    @property
    def traits(self) -> ServerTraits:
        return self._traits

    async def is_healthy(self) -> bool:
        try:
            await self.http.get("/health", timeout_s=HEALTH_TIMEOUT_S)
        except EngineError:
            return False
        return True

    async def check_identity(self) -> None:
        """Release, model, context, development endpoints and the mode of its log-probabilities."""
        release = release_of(await self.http.get("/version"))
        if release != self._traits.release:
            raise ConfigError(
                f"the server at {self.http.base_url} is vLLM {release}, the run was planned for {self._traits.release}"
            )
        base = [card for card in await self._models() if not card.get("parent")]
        if self.model not in (names := [card["id"] for card in base]):
            raise ConfigError(f"the server at {self.http.base_url} serves {', '.join(names)}, not {self.model}")
        found = next(card for card in base if card["id"] == self.model).get("max_model_len")
        if self._max_model_len is not None and found is not None and found < self._max_model_len:
            raise ConfigError(
                f"the server at {self.http.base_url} has room for {found} tokens a request, the run needs "
                f"{self._max_model_len}; start it with --max-model-len {self._max_model_len}"
            )
        await self._check_development_mode()
        await self._warm_up()

    def check(self, attempt: Attempt) -> None:
        self._body(attempt)

    async def generate(self, attempt: Attempt) -> AttemptResult:
        assert attempt.session is None, f"request {attempt.wire_id} names a session, vLLM keeps none"
        body = self._body(attempt)
        try:
            answer = await self.http.post(
                "/v1/completions", body, timeout_s=None, pooled=True, traceparent=traceparent()
            )
        except asyncio.CancelledError:
            # A closed connection ends the request too, but a busy server may notice it at the answer's end only.
            await asyncio.shield(self._end(attempt.wire_id))
            raise
        return attempt_result(answer, wire_id=attempt.wire_id, decode=self._decode)

    def _body(self, attempt: Attempt) -> dict[str, Any]:
        return completion_body(
            attempt,
            model=self.model,
            vocab_size=self._vocab_size,
            max_model_len=self._max_model_len,
            by_priority="priority" in self._traits.capabilities,
            greedy_only=self._greedy_only,
        )

    async def abort(self, wire_ids: Sequence[str]) -> None:
        # An empty list would end every request.
        if wire_ids:
            await self.http.post("/abort_requests", {"request_ids": [engine_request_id(name) for name in wire_ids]})

    async def _end(self, wire_id: str) -> None:
        """Nobody waits for the answer any more; a server that is gone has no such request."""
        with contextlib.suppress(EngineError):
            await self.http.post(
                "/abort_requests", {"request_ids": [engine_request_id(wire_id)]}, timeout_s=HEALTH_TIMEOUT_S
            )

    async def hold(self) -> None:
        raise AssertionError("vLLM's requests are ended before an update: their cache is of the old weights")

    async def halt(self) -> None:
        await self.http.post("/pause?mode=abort")

    async def release(self) -> None:
        await self.http.post("/resume")

    async def flush_cache(self) -> None:
        answer = await self.http.post("/reset_prefix_cache")
        # Releases that answer without a body reset or fail with an error.
        if isinstance(answer, Mapping) and answer.get("success") is False:
            raise RequestRejected(f"vLLM at {self.http.base_url} kept its prefix cache: requests still run")

    async def weight_version(self) -> str | None:
        """None before 0.32's `/weight_info`."""
        try:
            answer = await self.http.get("/weight_info")
        except RequestRejected:
            return None
        return str(answer["weight_version"])

    async def set_weight_version(self, version: str) -> None:
        """Nothing on a release whose weights have no name."""
        if await self.weight_version() is not None:
            await self.http.post("/update_weight_version", {"new_version": version})

    async def load_adapter(self, name: str, adapter: AdapterWeights | str) -> None:
        """Raises RequestRejected when `name` is loaded, or as many as may be.

        The prefix cache tells adapters apart by name: never load other weights under a name that had some, unless
        the cache was flushed between.
        """
        loaded = await self.adapters()
        if self._max_adapters is not None and len(loaded) >= self._max_adapters:
            raise RequestRejected(
                f"adapter {name}: {len(loaded)} adapters are loaded ({', '.join(loaded) or 'none'}) and "
                f"{self._max_adapters} may be; unload one or raise generator.lora.max_loras_per_batch"
            )
        path = adapter if isinstance(adapter, str) else await self._folders.write(name, adapter)
        try:
            await self.http.post(
                "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path}, timeout_s=ADAPTER_TIMEOUT_S
            )
        except EngineError as exc:
            if not isinstance(adapter, str):
                await self._folders.remove(name)
            if isinstance(exc, EngineUnavailable) and await self.is_healthy():
                # A folder that can't be read is answered with 500.
                raise RequestRejected(f"adapter {name} from {path}: {exc}") from exc
            raise

    async def unload_adapter(self, name: str) -> None:
        """An unknown name is fine. Its slot is given back: the server's own unload only forgets the name."""
        try:
            await self.http.post("/v1/unload_lora_adapter", {"lora_name": name})
        except RequestRejected:
            if name in await self.adapters():
                raise
        await self._empty_slots()
        await self._folders.remove(name)

    async def adapters(self) -> list[str]:
        """The names that are loaded."""
        return [card["id"] for card in await self._models() if card.get("parent")]

    async def open_session(self, session_id: str, capacity: int) -> None:
        raise AssertionError("vLLM has no sessions")

    async def close_session(self, session_id: str) -> None:
        raise AssertionError("vLLM has no sessions")

    async def sleep(self, release: Sequence[Occupant]) -> None:
        """vLLM gives back weights and cache together: what is not in `release` is taken again at once, an empty cache
        included. Weights are dropped, so an update must follow their wake; where adapters are served they are kept in
        the host's memory instead, because an update then brings the adapter alone.
        """
        if not release:
            return
        level = 2 if "weights" in release and "lora" not in self._traits.capabilities else 1
        await self.http.post(f"/sleep?level={level}&mode=abort", timeout_s=SLEEP_TIMEOUT_S)
        await self.wake([occupant for occupant in _TAGS if occupant not in release])

    async def wake(self, restore: Sequence[Occupant]) -> None:
        """With all of it awake the server also goes on stepping, whatever `halt` said before."""
        if not restore:
            return
        tags = "&".join(f"tags={_TAGS[occupant]}" for occupant in restore)
        await self.http.post(f"/wake_up?{tags}", timeout_s=SLEEP_TIMEOUT_S)

    async def score(self, token_ids: Sequence[int]) -> tuple[float, ...]:
        """vLLM reads no cached prefix for a request that asks for its prompt's. A halted server goes on for this one
        request and is halted again: nothing else may wait in it then.
        """
        halted = bool((await self.http.get("/is_paused"))["is_paused"])
        if halted:
            await self.release()
        try:
            return await self._score(token_ids)
        finally:
            if halted:
                await self.halt()

    async def _score(self, token_ids: Sequence[int]) -> tuple[float, ...]:
        body = {
            "model": self.model,
            "prompt": list(token_ids),
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": 0,
            "return_token_ids": True,
        }
        answer = await self.http.post("/v1/completions", body, timeout_s=SCORE_TIMEOUT_S)
        try:
            found = answer["choices"][0]["prompt_logprobs"]
            pairs = zip(token_ids[1:], found[1:], strict=True)
            return tuple(float(entry[str(token)]["logprob"]) for token, entry in pairs)
        except (KeyError, IndexError, TypeError, ValueError) as exc:
            raise EngineUnavailable(f"vLLM's answer has no log-probability for each prompt token ({exc!r})") from exc

    async def figures(self) -> ServerFigures:
        return figures(await self.metrics_text())

    async def metrics_text(self) -> str:
        return str(await self.http.get("/metrics"))

    async def close(self) -> None:
        await self.http.close()
        await self._folders.remove_all()

    async def _models(self) -> list[Mapping[str, Any]]:
        return list((await self.http.get("/v1/models"))["data"])

    async def _check_development_mode(self) -> None:
        start = "start it with VLLM_SERVER_DEV_MODE=1 in its environment"
        try:
            info = await self.http.get("/server_info?config_format=json", timeout_s=SERVER_INFO_TIMEOUT_S)
        except RequestRejected as exc:
            raise ConfigError(f"the server at {self.http.base_url} has no pause and no weight update; {start}") from exc
        mode = info["vllm_config"]["model_config"]["logprobs_mode"]
        if (mode == PROCESSED_LOGPROBS) != (self._traits.logprob_space == "sampled"):
            raise ConfigError(
                f"the server at {self.http.base_url} gives {mode}; start it with --logprobs-mode {PROCESSED_LOGPROBS}"
            )

    async def _warm_up(self) -> None:
        """One token: vLLM compiles a part of its sampler at the first request with log-probabilities, which takes tens
        of seconds on a cold cache, and dies there of a compiler that doesn't work. A halted server is left alone.
        """
        if (await self.http.get("/is_paused"))["is_paused"]:
            return
        body = {"model": self.model, "prompt": [0], "max_tokens": 1, "temperature": 0, "logprobs": 0}
        await self.http.post("/v1/completions", body, timeout_s=WARM_UP_TIMEOUT_S)

    async def _empty_slots(self) -> None:
        """Take every adapter out of the workers; those that are still known come back when a request names them."""
        listed = await self.http.post("/collective_rpc", {"method": "list_loras"})
        for adapter_id in sorted({int(number) for number in _numbers(str(listed["results"]))}):
            await self.http.post("/collective_rpc", {"method": "remove_lora", "args": [adapter_id]})


def release_of(answer: Mapping[str, Any]) -> str:
    """Of what /version says: "0.32.0+cpu" is 0.32.0."""
    return str(answer["version"]).partition("+")[0]


def _numbers(text: str) -> list[str]:
    """The digits in "['{1, 3}']": sets travel as text."""
    return "".join(char if char.isdigit() else " " for char in text).split()
