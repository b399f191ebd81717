"""How each backend is started for each setting. A server is started once for all tests of a setting.

setting       what is different in it
plain         nothing: priorities and metrics are on
disk, gloo    the path that new weights take
lora          two adapters, named at the start
ngram ...     speculation
one_seat      one request runs at a time, a few wait in the server
doomed        plain, for tests that kill the server
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import skyrl_train
from skyrl_train.attention import ATTENTION_NAME
from skyrl_train.config.load import load_config
from skyrl_train.engines.base import Engine
from skyrl_train.engines.build import Places, build_server_engine
from skyrl_train.engines.embedded import EmbeddedConfig, EmbeddedEngine
from skyrl_train.engines.server.guard import command_line, descendants
from skyrl_train.entrypoints.build_adapters import adapter_limits
from skyrl_train.entrypoints.build_speculation import draft_source
from skyrl_train.errors import ConfigError
from tests.contract import models
from tests.contract.models import CONTEXT_LEN
from tests.contract.under_test import NO_SERVER, Refused, UnderTest
from tests.interpreters import engine_python
from tests.tiny import make_tokenizer

BACKENDS = ("embedded", "sglang", "vllm")
SERVERS = ("sglang", "vllm")
EAGLE_HEADS = {"sglang": "LlamaForCausalLMEagle", "vllm": "LlamaForCausalLM"}
"""What each server calls the architecture of the same head."""
ADAPTER_SEEDS = {"first": 7, "second": 8}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """`keys` of `generator` over the common ones, `of` those of one backend. `only`: all others must refuse them."""

    keys: Mapping[str, Any] = field(default_factory=dict)
    of: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    only: tuple[str, ...] = BACKENDS


SERVED = {"scheduling.enable_priority": True, "metrics.enabled": True, "sessions.enabled": True}
COMMON: Mapping[str, Mapping[str, Any]] = {
    "embedded": {"max_num_seqs": 64, "sessions.enabled": True},
    "sglang": {
        "max_num_seqs": 64,
        "scheduling.enable_priority": True,
        "metrics.enabled": True,
        "sessions.enabled": True,
    },
    "vllm": {"max_num_seqs": 64, "scheduling.enable_priority": True, "metrics.enabled": True, "sessions.enabled": True},
}


def _speculation(algorithm: str, **keys: Any) -> dict[str, Any]:
    return {
        f"speculative_decoding.{key}": value for key, value in {"enabled": True, "algorithm": algorithm, **keys}.items()
    }


SETTINGS: dict[str, Setting] = {
    "plain": Setting(),
    "disk": Setting(keys={"weight_sync_backend": "disk"}, only=SERVERS),
    "gloo": Setting(keys={"weight_sync_backend": "gloo"}, only=SERVERS),
    "lora": Setting(
        keys={
            "lora.enabled": True,
            "lora.max_rank": 8,
            "lora.target_modules": ["q_proj", "v_proj"],
            "lora.paths": {name: f"{{{name}}}" for name in ADAPTER_SEEDS},
        },
    ),
    "ngram": Setting(
        keys=_speculation("ngram", num_draft_tokens=4),
        of={"vllm": {"speculative_decoding.ngram.max_trie_depth": 3}},
    ),
    "standalone": Setting(
        keys=_speculation("standalone", draft_model_path="{draft}", num_draft_tokens=4),
        of={"sglang": _speculation("standalone", num_steps=3, eagle_topk=1)},
    ),
    "eagle": Setting(
        keys=_speculation("eagle", draft_model_path="{head}", num_draft_tokens=4),
        of={
            backend: _speculation("eagle", num_steps=3, eagle_topk=2, num_draft_tokens=6)
            for backend in ("embedded", "sglang")
        },
    ),
    "eagle3": Setting(
        keys=_speculation("eagle3", draft_model_path="{head3}", num_draft_tokens=4),
        # From disk SGLang would load the policy into the head too.
        of={
            "sglang": {
                "weight_sync_backend": "gloo",
                **_speculation("eagle3", num_steps=3, eagle_topk=1, num_draft_tokens=4),
            }
        },
    ),
    "one_seat": Setting(
        keys={"max_num_seqs": 1},
        of={"sglang": {"scheduling.max_queued_requests": 6}},
    ),
    "doomed": Setting(only=SERVERS),
}
NOT_THERE = {("embedded", "doomed"): NO_SERVER}
"""What needs no refusal, because there is nothing to ask for."""
LABELS = {"plain": "auto"}
"""How a setting is named in the table, if not by its own name: plain is what the backend takes by itself."""


@asynccontextmanager
async def start(backend: str, setting: str, folder: Path) -> AsyncIterator[UnderTest | Refused]:
    """An engine that serves `models.policy()`, for as long as the context is open."""
    release = skyrl_train.__version__ if backend == "embedded" else _release(backend)
    if (backend, setting) in NOT_THERE:
        yield Refused(backend=backend, release=release, setting=setting, message=NOT_THERE[backend, setting])
        return
    arguments = _arguments(backend, setting, folder)
    if backend not in SETTINGS[setting].only:
        try:
            load_config(arguments)
        except ConfigError as refusal:
            yield Refused(backend=backend, release=release, setting=setting, message=str(refusal))
            return
        raise AssertionError(f"{backend} takes the configuration of {setting!r}, which it was not known to be able to")
    starter = _embedded if backend == "embedded" else _server
    async with starter(backend, setting, arguments, folder) as started:
        yield started


async def refuse_before_start(backend: str, folder: Path, keys: Mapping[str, Any]) -> None:
    """Everything up to the start of a server, with these keys over the plain ones; raises what refuses them."""
    arguments = [*_arguments(backend, "plain", folder), *_as_overrides(keys)]
    if backend == "embedded":
        load_config(arguments)
    else:
        await _build(arguments, folder)
    raise AssertionError(f"{backend} refuses nothing of {keys}")


def _arguments(backend: str, setting: str, folder: Path) -> list[str]:
    """The command line's overrides; the models that they name are made in `folder`."""
    keys = {**COMMON[backend], **SETTINGS[setting].keys, **SETTINGS[setting].of.get(backend, {})}
    if any("{draft}" in str(value) for value in keys.values()):
        models.save(models.nearly(models.policy()), folder / "draft")
    if any("{head}" in str(value) for value in keys.values()):
        models.save_eagle_head(folder / "head", EAGLE_HEADS.get(backend, ""))
    if any("{head3}" in str(value) for value in keys.values()):
        models.save_eagle3_head(folder / "head3")
    if "lora.paths" in keys:
        for name, seed in ADAPTER_SEEDS.items():
            models.save_adapter(models.adapter(seed), folder / name)
    arguments = [
        f"trainer.policy.model.path={models.save(models.policy(), folder / 'model')}",
        "trainer.placement.policy_num_gpus_per_node=0",
        f"generator.backend={backend}",
        f"generator.max_model_len={CONTEXT_LEN}",
    ]
    if backend in SERVERS:
        arguments.append(f"generator.engine_python={engine_python(backend)}")
    return [*arguments, *(text.format_map(_Folders(folder)) for text in _as_overrides(keys))]


class _Folders(dict[str, str]):
    """{name} in a setting is a folder of that name."""

    def __init__(self, root: Path) -> None:
        super().__init__({name: str(root / name) for name in ("draft", "head", "head3", *ADAPTER_SEEDS)})


def _as_overrides(keys: Mapping[str, Any]) -> list[str]:
    overrides = []
    for key, value in keys.items():
        if isinstance(value, dict):
            overrides += [f"+generator.{key}.{name}={item}" for name, item in value.items()]
        elif isinstance(value, Sequence) and not isinstance(value, str):
            overrides.append(f"generator.{key}=[{','.join(map(str, value))}]")
        else:
            overrides.append(f"generator.{key}={str(value).lower() if isinstance(value, bool) else value}")
    return overrides


def _release(backend: str) -> str:
    """Of the server in its own interpreter; its distribution for the CPU may have another name."""
    python = engine_python(backend)
    code = f"from importlib.metadata import version; print(version({backend!r}))"
    answer = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    return answer.partition("+")[0]


@asynccontextmanager
async def _embedded(backend: str, setting: str, arguments: list[str], folder: Path) -> AsyncIterator[UnderTest]:
    loaded = load_config(arguments).config
    keys = loaded.generator
    assert keys.max_num_seqs is not None
    config = EmbeddedConfig(
        max_context_len=CONTEXT_LEN,
        kv_cache_tokens=20_000,
        max_num_seqs=keys.max_num_seqs,
        lora=adapter_limits(loaded),
    )
    model = models.policy(attention=ATTENTION_NAME)
    engine = EmbeddedEngine(model, make_tokenizer(), config=config, driver="thread", drafts=draft_source(model, loaded))
    try:
        yield UnderTest(
            backend=backend,
            release=skyrl_train.__version__,
            setting=setting,
            engine=engine,
            reference=models.policy(),
            tokenizer=make_tokenizer(),
            folder=folder,
        )
    finally:
        await engine.close()


@asynccontextmanager
async def _server(backend: str, setting: str, arguments: list[str], folder: Path) -> AsyncIterator[UnderTest]:
    engine = await _build(arguments, folder)
    try:
        await engine.start()
        yield UnderTest(
            backend=backend,
            release=_release(backend),
            setting=setting,
            engine=engine,
            reference=models.policy(),
            tokenizer=make_tokenizer(),
            folder=folder,
            server_pid=_pid_of_server,
        )
    finally:
        await engine.close()


async def _build(arguments: list[str], folder: Path) -> Engine:
    """Asks the server's interpreter what it has, and starts nothing."""
    config = load_config(arguments).config
    places = Places(model=folder / "model", logs=folder / "logs", weights=folder / "weights")
    return await build_server_engine(config, places, tokenizer=make_tokenizer())


def _pid_of_server() -> int:
    """The first child of the one guard that this process has started."""
    tree = descendants(os.getpid())
    (guard,) = (process.pid for process in tree if "guard.py" in command_line(process.pid))
    return min((process for process in tree if process.parent == guard), key=lambda process: process.start).pid
