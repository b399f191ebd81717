"""From a configuration to a vLLM server that can be started, and to the client and the channel that speak to it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from skyrl_train.engines.server.client import ServerTraits
from skyrl_train.engines.server.environment import engine_environment, engine_python
from skyrl_train.engines.server.process import LaunchSpec
from skyrl_train.engines.vllm.answers import Decode
from skyrl_train.engines.vllm.args import command_line, server_options
from skyrl_train.engines.vllm.client import VLLMClient
from skyrl_train.engines.vllm.derived import max_adapters
from skyrl_train.engines.vllm.installed import check_options, read_installed
from skyrl_train.engines.vllm.traits import server_traits
from skyrl_train.engines.vllm.weights import Carrier, FileCarrier, GroupCarrier, VLLMChannel
from skyrl_train.errors import ConfigError

if TYPE_CHECKING:
    from skyrl_train.config.schema import Config

RECEIVER_FOLDER = Path(__file__).parent / "inside"


@dataclass(frozen=True, kw_only=True)
class VLLMServer:
    """One server of a run. `spec` None: somebody else runs it."""

    spec: LaunchSpec | None
    traits: ServerTraits
    model: str
    max_model_len: int | None
    max_adapters: int | None
    weight_sync: str
    device: torch.device

    def connect(self, url: str, *, vocab_size: int | None = None, decode: Decode | None = None) -> VLLMClient:
        """`vocab_size` and `decode` are the model's and its tokenizer's; see VLLMClient."""
        return VLLMClient(
            url,
            traits=self.traits,
            model=self.model,
            vocab_size=vocab_size,
            max_model_len=self.max_model_len,
            max_adapters=self.max_adapters,
            decode=decode,
        )

    def open_channel(self, url: str) -> VLLMChannel:
        return VLLMChannel(url, _carrier(self.weight_sync, self.device))


def plan_server(
    config: Config,
    *,
    index: int,
    log_folder: Path,
    model: str | None = None,
    gpus: Sequence[int] = (),
    device: torch.device | None = None,
    is_set: Mapping[str, bool] | None = None,
) -> VLLMServer:
    """Engine `index` of a run, checked against the release that generator.engine_python has. Starts nothing.

    `model` is the folder to serve where it isn't trainer.policy.model.path; `gpus` are the engine's, by their number
    among those that this process sees; `device` is where the trainer's tensors are; `is_set` says which keys the user
    wrote. Raises ConfigError.
    """
    generator = config.generator
    name = f"vllm-{index}"
    python = engine_python(generator.engine_python)
    options = server_options(config)
    installed = read_installed(python, generator.engine_environment)
    check_options(options, installed, by_user=lambda key: is_set is None or is_set.get(key, False))
    environment = server_environment(config, python=python, release=installed.release, model=model, gpus=gpus)
    spec = LaunchSpec(
        name=name,
        command=tuple(command_line(config, python=python, model=model)),
        environment=environment,
        log_path=log_folder / f"{name}.log",
        startup_timeout_s=generator.health_checks.startup_timeout_s,
    )
    return _server(config, name, options, release=installed.release, spec=spec, device=device)


def plan_attached(config: Config, *, index: int, release: str, device: torch.device | None = None) -> VLLMServer:
    """A server of generator.remote_inference_engine_urls, which was started with the options that this run would
    have used. `release` is what its /version says.
    """
    return _server(config, f"vllm-{index}", server_options(config), release=release, spec=None, device=device)


def server_environment(
    config: Config, *, python: str, release: str, model: str | None = None, gpus: Sequence[int] = ()
) -> dict[str, str | None]:
    """What differs from our own environment; generator.engine_environment wins. Raises ConfigError."""
    extra = dict(config.generator.engine_environment)
    on_cpu = not config.trainer.placement.policy_num_gpus_per_node
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "skyrl_train" / f"vllm-{release}"
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


def _server(
    config: Config,
    name: str,
    options: Mapping[str, Any],
    *,
    release: str,
    spec: LaunchSpec | None,
    device: torch.device | None,
) -> VLLMServer:
    served = options["served-model-name"]
    return VLLMServer(
        spec=spec,
        traits=server_traits(name, options, release=release),
        model=served if isinstance(served, str) else str(served[0]),
        max_model_len=options.get("max-model-len"),
        max_adapters=max_adapters(config),
        weight_sync=config.generator.weight_sync_backend,
        device=device or torch.device("cpu"),
    )


def _carrier(weight_sync: str, device: torch.device) -> Carrier:
    if weight_sync == "disk":
        return FileCarrier()
    if weight_sync == "gloo":
        return GroupCarrier("gloo")
    if weight_sync == "nccl":
        return GroupCarrier("nccl", device=device)
    raise ConfigError(f"generator.weight_sync_backend={weight_sync}: vLLM takes disk, gloo and nccl")


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
