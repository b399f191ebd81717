"""From a configuration to a vLLM server that can be started, and to the client and the channel that speak to it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skyrl_train.cache import cache_root
from skyrl_train.config.plan import engine_gpus
from skyrl_train.engines.server.client import ServerTraits
from skyrl_train.engines.server.environment import engine_api_key, engine_environment, engine_python
from skyrl_train.engines.server.process import LaunchSpec
from skyrl_train.engines.vllm.answers import Decode
from skyrl_train.engines.vllm.args import command_line, server_options
from skyrl_train.engines.vllm.client import VLLMClient, release_of
from skyrl_train.engines.vllm.connection import Connection
from skyrl_train.engines.vllm.derived import RECEIVER_FOLDER, max_adapters
from skyrl_train.engines.vllm.installed import check_options, read_installed
from skyrl_train.engines.vllm.traits import server_traits, verifies_greedy_only
from skyrl_train.errors import ConfigError

if TYPE_CHECKING:
    from skyrl_train.config.schema import Config


@dataclass(frozen=True, kw_only=True)
class VLLMLaunch:
    """One server, and what is known of it before it is spoken to. `spec` None: somebody else runs it.

    `decode` turns ids into text with special tokens kept: it is needed with speculation and stop strings.
    """

    spec: LaunchSpec | None
    traits: ServerTraits
    options: Mapping[str, Any]
    max_adapters: int | None
    vocab_size: int | None
    decode: Decode | None
    greedy_only: bool
    api_key: str | None = None

    def client(self, url: str) -> VLLMClient:
        """For the server while it is at `url`: a restart brings it up at another one."""
        served = self.options["served-model-name"]
        return VLLMClient(
            url,
            traits=self.traits,
            model=served if isinstance(served, str) else str(served[0]),
            vocab_size=self.vocab_size,
            max_model_len=self.options.get("max-model-len"),
            max_adapters=self.max_adapters,
            decode=self.decode,
            greedy_only=self.greedy_only,
            api_key=self.api_key,
        )


def vllm_launch(
    config: Config,
    index: int,
    *,
    log_folder: Path,
    model_path: str | None = None,
    vocab_size: int | None = None,
    decode: Decode | None = None,
    by_user: Callable[[str], bool] = lambda key: True,
) -> VLLMLaunch:
    """Engine `index`. `model_path` is where the model lies, if not where the key says (a built-in one); `by_user` tells
    which keys the user set. Asks the interpreter what it has. Raises ConfigError.
    """
    generator = config.generator
    name = f"vllm-{index}"
    python = engine_python(generator.engine_python)
    options = server_options(config, model=model_path)
    installed = read_installed(python, generator.engine_environment)
    check_options(options, installed, by_user=by_user)
    spec = LaunchSpec(
        name=name,
        command=tuple(command_line(config, python=python, model=model_path)),
        environment=server_environment(
            config, python=python, release=installed.release, model=model_path, gpus=engine_gpus(config, index)
        ),
        log_path=log_folder / f"{name}.log",
        startup_timeout_s=generator.health_checks.startup_timeout_s,
    )
    return VLLMLaunch(
        spec=spec,
        api_key=None if options.get("api-key") is None else str(options["api-key"]),
        traits=server_traits(name, options, release=installed.release, on_cpu=_on_cpu(config)),
        options=options,
        max_adapters=max_adapters(config),
        vocab_size=vocab_size,
        decode=decode,
        greedy_only=verifies_greedy_only(options, on_cpu=_on_cpu(config)),
    )


async def attach_vllm(
    config: Config, index: int, url: str, *, vocab_size: int | None = None, decode: Decode | None = None
) -> VLLMLaunch:
    """A server that somebody else runs at `url`, with the options that this run would have started it with: what
    --explain prints, with `inside` of this package on its PYTHONPATH and VLLM_SERVER_DEV_MODE=1. Its client's
    check_identity says what differs. Raises EngineUnavailable when nobody answers there.
    """
    api_key = engine_api_key(config.generator.engine_api_key_env)
    connection = Connection(url, api_key=api_key)
    try:
        release = release_of(await connection.get("/version"))
    finally:
        await connection.close()
    options = server_options(config)
    return VLLMLaunch(
        spec=None,
        traits=server_traits(f"vllm-{index}", options, release=release, on_cpu=_on_cpu(config)),
        options=options,
        max_adapters=max_adapters(config),
        vocab_size=vocab_size,
        decode=decode,
        greedy_only=verifies_greedy_only(options, on_cpu=_on_cpu(config)),
        api_key=api_key,
    )


def server_environment(
    config: Config, *, python: str, release: str, model: str | None = None, gpus: Sequence[int] = ()
) -> dict[str, str | None]:
    """What differs from our own environment; generator.engine_environment wins. Raises ConfigError."""
    extra = dict(config.generator.engine_environment)
    tracing = config.generator.metrics.tracing
    on_cpu = _on_cpu(config)
    cache = cache_root() / f"vllm-{release}"
    own: dict[str, str] = {
        "VLLM_SERVER_DEV_MODE": "1",  # pause, weight update, prefix cache, sleep
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_CACHE_ROOT": str(cache / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    if os.path.isdir(model or config.trainer.policy.model.path):
        own |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if config.generator.multi_node.nnodes == 1:
        # Its processes talk on this machine alone.
        own |= {"VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    if tracing.enabled:
        own["OTEL_SERVICE_NAME"] = tracing.service_name or "vllm"
    if on_cpu:
        own["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        if "OMP_NUM_THREADS" not in os.environ:
            own["OMP_NUM_THREADS"] = str(max((os.cpu_count() or 1) // 2, 1))
    elif gpus:
        own["CUDA_VISIBLE_DEVICES"] = _visible(gpus)
    paths = [str(RECEIVER_FOLDER), *filter(None, [extra.pop("PYTHONPATH", "")])]
    environment = engine_environment(python, own | extra) | {"PYTHONPATH": os.pathsep.join(paths)}
    if on_cpu:
        _need_compiler(environment)
    return environment


def _on_cpu(config: Config) -> bool:
    return not config.trainer.placement.policy_num_gpus_per_node


def _visible(gpus: Sequence[int]) -> str:
    """CUDA_VISIBLE_DEVICES for `gpus`, which are numbered among those that our own variable leaves."""
    ours = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not ours:
        return ",".join(map(str, gpus))
    names = ours.split(",")
    return ",".join(names[gpu] for gpu in gpus)


def _need_compiler(environment: Mapping[str, str | None]) -> None:
    """On a CPU, vLLM compiles a function at the first request with log-probabilities, and dies of it without g++."""
    if shutil.which("g++", path=environment.get("PATH") or os.environ.get("PATH")) is None:
        raise ConfigError(
            "vLLM on a CPU needs g++ on PATH: it starts without one and dies at the first request; install a C++ "
            "compiler, or put its folder on PATH in generator.engine_environment"
        )
