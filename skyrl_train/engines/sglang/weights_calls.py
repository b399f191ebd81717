"""The HTTP calls of a weight update in SGLang's words, as 0.5.17 and 0.5.23 take them."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from skyrl_train.engines.sglang.releases import release_number
from skyrl_train.engines.sglang.wire import Wire
from skyrl_train.errors import EngineError, WeightsTorn, WeightUpdateError
from skyrl_train.weight_sync.broadcast import GroupAddress
from skyrl_train.weight_sync.buckets import Place

UPDATE_TIMEOUT_S = 600.0
JOIN_TIMEOUT_S = 120.0
LETTING_GO_TIMEOUT_S = 10.0
_FIRST_WITH_SESSION = (0, 5, 23)
_LAST_WITHOUT_SESSION = (0, 5, 17)
_DTYPE_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


class UpdateCalls:
    """The calls of an update in SGLang's words. A refusal or a lost connection is WeightUpdateError."""

    def __init__(self, wire: Wire, *, release: str, timeout_s: float) -> None:
        self._wire = wire
        self.timeout_s = timeout_s
        number = release_number(release)
        self._may_have_session = number > _LAST_WITHOUT_SESSION
        self._must_have_session = number >= _FIRST_WITH_SESSION
        # Of the models in a server, the policy alone: a draft is another model.
        self._policy_only: dict[str, Any] = (
            {"selector": "target"} if self._may_have_session else {"disable_draft_model": True}
        )

    @property
    def name(self) -> str:
        return self._wire.name

    @asynccontextmanager
    async def session(self) -> AsyncIterator[None]:
        """Where the release wants its updates between begin and end. An update that another one left open is ended."""
        opened = await self._begin()
        try:
            yield
        except BaseException:
            # The server must take the next update, whatever became of this one.
            if opened:
                await asyncio.shield(self._end_quietly())
            raise
        if opened:
            try:
                await self._post("/end_weight_update", {})
            except WeightUpdateError as error:
                raise WeightsTorn(f"{error}. All tensors are in, but the server did not finish the update") from error

    async def load_folder(self, folder: Path, *, version: int) -> None:
        await self._post(
            "/update_weights_from_disk",
            {
                "model_path": str(folder),
                "load_format": "safetensors",
                "flush_cache": True,
                "weight_version": str(version),
            },
        )

    async def load_handles(self, handles: list[bytes], *, last_of: int | None) -> None:
        """One handle a rank. `last_of` is the version that is whole with this bucket."""
        await self._post(
            "/update_weights_from_tensor",
            {
                "serialized_named_tensors": [base64.b64encode(handle).decode() for handle in handles],
                "load_format": "flattened_bucket",
                **self._policy_only,
                **_ending(last_of),
            },
        )

    async def receive(self, places: Sequence[Place], *, group: str, last_of: int | None) -> None:
        """Blocks until the bucket was broadcast in `group`."""
        body = {
            "names": [place.spec.name for place in places],
            "dtypes": [_DTYPE_NAMES[place.spec.dtype] for place in places],
            "shapes": [list(place.spec.shape) for place in places],
            "group_name": group,
            "load_format": "flattened_bucket",
            **_ending(last_of),
        }
        if self._may_have_session:
            body |= self._policy_only
        await self._post("/update_weights_from_distributed", body)

    async def join(self, address: GroupAddress, *, timeout_s: float) -> None:
        """Blocks until all ranks of the server are in the group."""
        body = {
            "master_address": address.host,
            "master_port": address.port,
            "rank_offset": address.first_worker_rank,
            "world_size": address.world_size,
            "group_name": address.name,
            "backend": address.backend,
        }
        await self._post("/init_weights_update_group", body, timeout_s=timeout_s)

    async def leave(self, group: str) -> None:
        """Never raises: the server may be gone, or never have joined."""
        with suppress(WeightUpdateError):
            await self._post("/destroy_weights_update_group", {"group_name": group}, timeout_s=LETTING_GO_TIMEOUT_S)

    async def close(self) -> None:
        await self._wire.close()

    async def _begin(self) -> bool:
        if not self._may_have_session:
            return False
        body = self._policy_only
        try:
            await self._post("/begin_weight_update", body)
        except WeightUpdateError as refused:
            if not self._must_have_session and "404" in str(refused):
                self._may_have_session = False
                return False
            if "already open" not in str(refused):
                raise
            await self._post("/end_weight_update", {})
            await self._post("/begin_weight_update", body)
        return True

    async def _end_quietly(self) -> None:
        with suppress(WeightUpdateError):
            await self._post("/end_weight_update", {}, timeout_s=LETTING_GO_TIMEOUT_S)

    async def _post(self, path: str, body: Mapping[str, Any], *, timeout_s: float | None = None) -> None:
        what = f"{self.name}: {path.lstrip('/')}"
        try:
            text = await self._wire.post(path, body, what=what, timeout_s=timeout_s or self.timeout_s)
        except EngineError as error:
            raise WeightUpdateError(str(error)) from error
        answer = json.loads(text)
        if answer.get("success") is False:
            raise WeightUpdateError(f"{what}: SGLang answered: {answer.get('message')}")


def _ending(last_of: int | None) -> dict[str, Any]:
    if last_of is None:
        return {"flush_cache": False}
    return {"flush_cache": True, "weight_version": str(last_of)}
