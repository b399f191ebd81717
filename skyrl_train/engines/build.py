"""From a configuration to the server engines of a run: launched here, or attached to.

One engine is a ServerEngine; several are one RoutedEngine over them. Nothing is started: `Engine.start` does that.
"""

from __future__ import annotations

import asyncio
import json
import math
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from skyrl_train.config.model_shape import ModelShape, read_model_shape
from skyrl_train.config.schema import Config
from skyrl_train.engines.base import Engine
from skyrl_train.engines.router import RoutedEngine
from skyrl_train.engines.server.client import Attempt, ServerClient, ServerTraits
from skyrl_train.engines.server.engine import ServerEngine
from skyrl_train.engines.server.lifeline import HealthPolicy, Lifeline
from skyrl_train.engines.server.process import ServerProcess
from skyrl_train.engines.server.weights import Verify
from skyrl_train.errors import ConfigError, RequestRejected
from skyrl_train.types import SamplingParams
from skyrl_train.weight_sync.adapter import check_adapter
from skyrl_train.weight_sync.channel import WeightChannel
from skyrl_train.weight_sync.model_folder import model_specs
from skyrl_train.weight_sync.verify import Score, probe_tokens, verify_weights


@dataclass(frozen=True, kw_only=True)
class Places:
    """Folders of a run: `model` is what the policy started from; the servers write `logs`, and read `weights`."""

    model: Path
    logs: Path
    weights: Path


@dataclass(frozen=True, kw_only=True)
class ServerParts:
    """One server of either kind, before it runs. `process` None: somebody else runs it, at `url`."""

    traits: ServerTraits
    process: ServerProcess | None = None
    url: str | None = None
    connect: Callable[[str], ServerClient]
    open_channel: Callable[[str], WeightChannel]


async def build_server_engine(
    config: Config,
    places: Places,
    *,
    device: torch.device | None = None,
    policy_version: int = 0,
    reference: Score | None = None,
    tokenizer: Any = None,
    samplings: Mapping[str, SamplingParams] | None = None,
    by_user: Callable[[str], bool] = lambda key: True,
) -> Engine:
    """The engines of generator.backend sglang or vllm, not started yet.

    `device` is where the trainer's tensors are. `reference` is the trainer's own scoring, by which each weight update
    is proved. `samplings` are what will be asked for, by key: what a server can't do of it is refused here. Asks the
    servers' interpreter, or the running servers, what they are. Raises ConfigError.
    """
    generator = config.generator
    shape = read_model_shape(str(places.model))
    if shape is None:
        raise ConfigError(f"{places.model} has no config.json to read the model's vocabulary from")
    if reference is not None:
        _check_head_survives(config)
        _check_room(config, places)
    urls: list[str | None] = [None] * generator.num_inference_engines
    if not generator.run_engines_locally:
        urls = [_with_scheme(url) for url in generator.remote_inference_engine_urls]
    parts = _sglang_parts if generator.backend == "sglang" else _vllm_parts
    servers = await asyncio.gather(
        *(
            parts(config, index, url, places, shape, device or torch.device("cpu"), tokenizer, by_user)
            for index, url in enumerate(urls)
        )
    )
    for key, sampling in (samplings or {}).items():
        await _check_sampling(key, sampling, servers[0])
    # vLLM looks for an answer's end before it looks for an abort.
    ends = end_token_ids(places.model, tokenizer) if generator.backend == "sglang" else ()
    engines = [_engine(config, server, places, shape, policy_version, reference, ends) for server in servers]
    return engines[0] if len(engines) == 1 else RoutedEngine(engines)


def _check_head_survives(config: Config) -> None:
    """SGLang (0.5.23) loads a folder into the draft as well, and can't be told not to; over tensors it can."""
    generator = config.generator
    drafts = generator.speculative_decoding
    if generator.backend != "sglang" or not drafts.enabled or drafts.algorithm != "eagle3":
        return
    if generator.weight_sync_backend == "disk":
        raise ConfigError(
            "generator.speculative_decoding.algorithm=eagle3 with generator.weight_sync_backend=disk: SGLang loads the "
            "policy's new weights into the head too, whose shapes are others, and ends; set weight_sync_backend to "
            "nccl, gloo or cuda_ipc"
        )


def _check_room(config: Config, places: Places) -> None:
    """Weights as a folder for each engine: found out in a moment here, after the servers' start there."""
    generator = config.generator
    adapter = config.trainer.policy.model.lora.rank and generator.lora.enabled
    if generator.weight_sync_backend != "disk" or adapter:
        return
    dtype = getattr(torch, generator.model_dtype or "float32")
    numbers = sum(math.prod(spec.shape) for spec in model_specs(places.model).values())
    needed = generator.num_inference_engines * numbers * dtype.itemsize
    # What an earlier run left there gives way.
    left = sum(file.stat().st_size for file in places.weights.glob("*/weights-*/*"))
    disk = next(folder for folder in (places.weights, *places.weights.resolve().parents) if folder.exists())
    if (free := shutil.disk_usage(disk).free) + left < needed:
        raise ConfigError(
            f"generator.weight_sync_backend=disk writes {needed / 2**20:,.1f} MiB at each update to {places.weights}, "
            f"and {free / 2**20:,.1f} MiB are free there; make room, or set trainer.run_path to another disk"
        )


async def _check_sampling(key: str, sampling: SamplingParams, server: ServerParts) -> None:
    client = server.connect(server.url or "http://127.0.0.1:1")  # it is asked nothing
    short = replace(sampling, max_new_tokens=1, min_new_tokens=min(sampling.min_new_tokens, 1))
    try:
        client.check(Attempt(wire_id=key, token_ids=(0,), sampling=short))
    except RequestRejected as exc:
        raise ConfigError(f"{key}: {exc}") from exc
    finally:
        await client.close()


def _engine(
    config: Config,
    server: ServerParts,
    places: Places,
    shape: ModelShape,
    policy_version: int,
    reference: Score | None,
    ends: Collection[int],
) -> ServerEngine:
    generator, name = config.generator, server.traits.name
    health = generator.health_checks
    dtype = getattr(torch, generator.model_dtype or "float32")
    assert generator.max_model_len is not None, "it has a default"
    return ServerEngine(
        traits=server.traits,
        model=config.trainer.policy.model.path,
        max_context_len=generator.max_model_len,
        vocab_size=shape.vocab_size,
        end_token_ids=ends,
        lifeline=Lifeline(
            name,
            process=server.process,
            url=server.url,
            connect=server.connect,
            open_channel=server.open_channel,
            health=HealthPolicy(
                interval_s=health.interval_s,
                max_failures=health.max_failures,
                attached_timeout_s=health.startup_timeout_s,
            ),
        ),
        weight_dtype=dtype,
        adapters=tuple(generator.lora.paths),
        policy_version=policy_version,
        prepares=generator.use_overlapped_weight_sync,
        verify=None if reference is None else _verify(name, reference, shape.vocab_size, dtype),
        check_adapter=lambda adapter: check_adapter(adapter, model_specs(places.model)),
    )


async def _sglang_parts(
    config: Config,
    index: int,
    url: str | None,
    places: Places,
    shape: ModelShape,
    device: torch.device,
    tokenizer: Any,
    by_user: Callable[[str], bool],
) -> ServerParts:
    from skyrl_train.engines.sglang.launch import SGLangAttached, read_attached, sglang_launch
    from skyrl_train.engines.sglang.weights import sglang_channel

    ids: dict[str, Any] = {"vocab_size": shape.vocab_size, "bos_token_id": getattr(tokenizer, "bos_token_id", None)}
    launch = (
        sglang_launch(config, index, log_folder=places.logs, model_path=str(places.model), by_user=by_user, **ids)
        if url is None
        else await read_attached(config, index, url, **ids)
    )
    traits, kind = launch.traits, config.generator.weight_sync_backend
    assert kind != "auto" and kind != "local", kind

    def open_channel(at: str) -> WeightChannel:
        return sglang_channel(
            kind,
            at,
            release=traits.release,
            model_folder=places.model,
            tp_size=config.generator.inference_engine_tensor_parallel_size,
            device=device,
            disk_root=places.weights / traits.name,
            name=traits.name,
            api_key=launch.api_key,
        )

    return ServerParts(
        traits=traits,
        process=None if isinstance(launch, SGLangAttached) else ServerProcess(launch.spec),
        url=url,
        connect=launch.client,
        open_channel=open_channel,
    )


async def _vllm_parts(
    config: Config,
    index: int,
    url: str | None,
    places: Places,
    shape: ModelShape,
    device: torch.device,
    tokenizer: Any,
    by_user: Callable[[str], bool],
) -> ServerParts:
    from skyrl_train.engines.vllm.launch import attach_vllm, vllm_launch
    from skyrl_train.engines.vllm.weights import vllm_channel

    def decode(token_ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(token_ids)))

    ids: dict[str, Any] = {"vocab_size": shape.vocab_size, "decode": None if tokenizer is None else decode}
    launch = (
        vllm_launch(config, index, log_folder=places.logs, model_path=str(places.model), by_user=by_user, **ids)
        if url is None
        else await attach_vllm(config, index, url, **ids)
    )
    traits, kind = launch.traits, config.generator.weight_sync_backend
    assert kind != "auto" and kind != "local", kind
    return ServerParts(
        traits=traits,
        process=None if launch.spec is None else ServerProcess(launch.spec),
        url=url,
        connect=launch.client,
        open_channel=lambda at: vllm_channel(
            kind,
            at,
            model_folder=places.model,
            device=device,
            disk_root=places.weights / traits.name,
            api_key=launch.api_key,
        ),
    )


def _with_scheme(url: str) -> str:
    return url if "://" in url else f"http://{url}"


def end_token_ids(model: Path, tokenizer: Any) -> frozenset[int]:
    """What ends an answer of this model: its own two files and the tokenizer each may name some."""
    named: list[Any] = [getattr(tokenizer, "eos_token_id", None)]
    for file in (model / "config.json", model / "generation_config.json"):
        if file.is_file():
            found = json.loads(file.read_text(encoding="utf-8"))
            named += [found.get("eos_token_id"), found.get("text_config", {}).get("eos_token_id")]
    return frozenset(token for one in named for token in (one if isinstance(one, list) else [one]) if token is not None)


def _verify(name: str, reference: Score, vocab_size: int, dtype: torch.dtype) -> Verify:
    """The trainer scores a version once, when the engine is about to serve it and the trainer waits. A server that is
    started again is compared with that: the trainer may be in the middle of its next step by then.
    """
    scored: dict[int, Sequence[float]] = {}

    async def verify(client: ServerClient, version: int) -> None:
        async def trainers(token_ids: Sequence[int]) -> Sequence[float]:
            if version not in scored:
                values = await reference(token_ids)
                scored.clear()
                scored[version] = values
            return scored[version]

        await verify_weights(
            client.score,
            trainers,
            token_ids=probe_tokens(vocab_size),
            dtype=dtype,
            engine=name,
            version=version,
        )

    return verify
