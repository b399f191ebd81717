"""From a configuration to an SGLang server that can be started, and to the client of one that runs.

The command is the one that --explain prints (config/plan.py), with the model's folder in its place; the environment is
ours without our PYTHONPATH, with what SGLang needs, and with generator.engine_environment over it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from skyrl_train.config.model_shape import find_model_folder, read_model_shape
from skyrl_train.config.plan import engine_arguments
from skyrl_train.config.schema import Config
from skyrl_train.engines.server.client import ServerTraits
from skyrl_train.engines.server.environment import engine_api_key, engine_environment, engine_python
from skyrl_train.engines.server.process import LaunchSpec
from skyrl_train.engines.sglang.client import SGLangClient
from skyrl_train.engines.sglang.command import command_line
from skyrl_train.engines.sglang.installed import check_arguments, read_installed
from skyrl_train.engines.sglang.releases import release_number
from skyrl_train.engines.sglang.traits import STREAM_INTERVAL_SINCE, samples_greedily, server_traits
from skyrl_train.engines.sglang.wire import Wire
from skyrl_train.errors import ConfigError

ATTACHED_FIELDS = (
    "enable_lora",
    "max_lora_rank",
    "enable_priority_scheduling",
    "schedule_low_priority_values_first",
    "enable_deterministic_inference",
    "speculative_algorithm",
)
"""What a server that somebody else started must share with the configuration; its size is its owner's affair."""


@dataclass(frozen=True, kw_only=True)
class SGLangLaunch:
    """One server to start, and what is known of it before it runs. `arguments` are its ServerArgs."""

    spec: LaunchSpec
    traits: ServerTraits
    arguments: Mapping[str, Any]
    vocab_size: int | None
    bos_token_id: int | None

    @property
    def api_key(self) -> str | None:
        """Set by generator.engine_init_kwargs, if at all."""
        key = self.arguments.get("admin_api_key") or self.arguments.get("api_key")
        return None if key is None else str(key)

    def client(self, url: str) -> SGLangClient:
        """For the server while it is at `url`: a restart brings it up at another one."""
        return _client(
            url,
            self.traits,
            api_key=self.api_key,
            arguments=self.arguments,
            expected=self.arguments,
            vocab_size=self.vocab_size,
            bos_token_id=self.bos_token_id,
            health_path="/health",
        )


def sglang_launch(
    config: Config,
    index: int,
    *,
    log_folder: Path,
    model_path: str | None = None,
    vocab_size: int | None = None,
    bos_token_id: int | None = None,
    by_user: Callable[[str], bool] = lambda key: True,
) -> SGLangLaunch:
    """Engine `index`. `model_path` is where the model lies, if not where the key says (a built-in one); `by_user` tells
    which keys the user set. Asks the interpreter what it has. Raises ConfigError.
    """
    generator = config.generator
    python = engine_python(generator.engine_python)
    installed = read_installed(python, {**_needed(config, None), **generator.engine_environment})
    arguments = engine_arguments(config, index, release=installed.release)
    if model_path is not None:
        arguments["model_path"] = model_path
    arguments = check_arguments(arguments, installed, by_user=by_user)
    environment = engine_environment(
        python, {**_needed(config, arguments["model_path"]), **generator.engine_environment}
    )
    name = f"sglang-{index}"
    return SGLangLaunch(
        spec=LaunchSpec(
            name=name,
            command=tuple(command_line(arguments, python=python)),
            environment=environment,
            log_path=log_folder / f"{name}.log",
            startup_timeout_s=generator.health_checks.startup_timeout_s,
        ),
        traits=server_traits(name, arguments, release=installed.release, environment=environment),
        arguments=arguments,
        vocab_size=vocab_size if vocab_size is not None else _vocab_size(arguments["model_path"]),
        bos_token_id=bos_token_id,
    )


@dataclass(frozen=True, kw_only=True)
class SGLangAttached:
    """A server that somebody else runs, as it was when it was read. `found` are its ServerArgs, `expected` ours."""

    traits: ServerTraits
    found: Mapping[str, Any]
    expected: Mapping[str, Any]
    vocab_size: int | None
    bos_token_id: int | None
    api_key: str | None

    def client(self, url: str) -> SGLangClient:
        return _client(
            url,
            self.traits,
            api_key=self.api_key,
            arguments=self.found,
            expected=self.expected,
            vocab_size=self.vocab_size,
            bos_token_id=self.bos_token_id,
            health_path="/model_info",
        )


async def read_attached(
    config: Config, index: int, url: str, *, vocab_size: int | None = None, bos_token_id: int | None = None
) -> SGLangAttached:
    """What runs at `url`. Raises ConfigError where it is no SGLang server, EngineUnavailable where none answers."""
    name, api_key = f"sglang-{index}", engine_api_key(config.generator.engine_api_key_env)
    wire = Wire(url, name=name, api_key=api_key)
    try:
        found: dict[str, Any] = json.loads(await wire.get("/server_info", what=f"{name}: server_info"))
    finally:
        await wire.close()
    if "version" not in found or "model_path" not in found:
        raise ConfigError(f"{name}: {url} answers, but is no SGLang server (generator.remote_inference_engine_urls)")
    wanted = engine_arguments(config, index, release=str(found["version"]))
    expected = {field: wanted[field] for field in ATTACHED_FIELDS if field in wanted}
    # The same model may lie elsewhere on the server's machine; its name must be the same.
    same_name = _last(found["model_path"]) == _last(wanted["model_path"])
    expected["model_path"] = found["model_path"] if same_name else wanted["model_path"]
    return SGLangAttached(
        traits=server_traits(name, found, release=str(found["version"])),
        found=found,
        expected=expected,
        vocab_size=vocab_size if vocab_size is not None else _vocab_size(wanted["model_path"]),
        bos_token_id=bos_token_id,
        api_key=api_key,
    )


async def attach_sglang(
    config: Config, index: int, url: str, *, vocab_size: int | None = None, bos_token_id: int | None = None
) -> SGLangClient:
    """The client of a server that runs already: its traits are read from it. Raises ConfigError for one that is not
    what the configuration asks for, EngineUnavailable where none answers.
    """
    attached = await read_attached(config, index, url, vocab_size=vocab_size, bos_token_id=bos_token_id)
    client = attached.client(url)
    try:
        await client.check_identity()
    except BaseException:
        await client.close()
        raise
    return client


def _client(
    url: str,
    traits: ServerTraits,
    *,
    api_key: str | None,
    arguments: Mapping[str, Any],
    expected: Mapping[str, Any],
    vocab_size: int | None,
    bos_token_id: int | None,
    health_path: str,
) -> SGLangClient:
    return SGLangClient(
        url,
        traits,
        vocab_size=vocab_size,
        bos_token_id=bos_token_id,
        context_length=arguments.get("context_length"),
        api_key=api_key,
        expected=expected,
        has_metrics=bool(arguments.get("enable_metrics")),
        greedy_only=samples_greedily(arguments),
        health_path=health_path,
        batched=release_number(traits.release) >= STREAM_INTERVAL_SINCE,
    )


def _needed(config: Config, model_path: str | None) -> dict[str, str]:
    """What SGLang itself reads. Its health check would generate a token, which a paused server can't; the context is
    a few tokens longer than the model's (args.CONTEXT_RESERVE), which it must be allowed; a model that is on this disk
    needs no hub.
    """
    variables = {"SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0", "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"}
    if model_path is not None and find_model_folder(model_path) is not None:
        variables |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if not config.trainer.placement.policy_num_gpus_per_node:
        variables |= {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    elif config.generator.weight_sync_backend == "nccl":
        # SGLang would turn this off for itself, and one NCCL can't open the memory that the other shares with it then.
        variables["NCCL_CUMEM_ENABLE"] = os.environ.get("NCCL_CUMEM_ENABLE", "-2")
    return variables


def _vocab_size(model_path: str) -> int | None:
    shape = read_model_shape(model_path)
    return None if shape is None else shape.vocab_size


def _last(path: str) -> str:
    return PurePosixPath(path).name
