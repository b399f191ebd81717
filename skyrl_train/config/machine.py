"""What this machine has, and the one-screen report when that is not enough for a configuration."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from skyrl_train.config.model_shape import BUILTIN_PREFIX, find_model_folder
from skyrl_train.config.placement import count_gpus
from skyrl_train.config.schema import Config
from skyrl_train.config.unbuilt import MAX_POLICY_GPUS
from skyrl_train.engines.server.environment import as_process_environment, engine_environment, engine_python

PROBE_TIMEOUT_S = 30.0
INSTALL = {"sglang": '"sglang==0.5.23"', "vllm": '"vllm==0.26.0"'}


@dataclass(frozen=True, kw_only=True)
class Gpu:
    name: str
    memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class Machine:
    """GPUs that this process may use, cores, and memory of the host."""

    gpus: tuple[Gpu, ...]
    num_cpus: int
    memory_bytes: int

    def __str__(self) -> str:
        memory = f"{self.num_cpus} CPU cores, {self.memory_bytes / 2**30:.0f} GiB of memory"
        if not self.gpus:
            return f"no GPU, {memory}"
        first = self.gpus[0]
        return f"{len(self.gpus)} x {first.name} ({first.memory_bytes / 2**30:.0f} GiB), {memory}"


def this_machine() -> Machine:
    """Asks nvidia-smi for GPUs: importing torch would take seconds and a driver context."""
    return Machine(
        gpus=_visible(_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES")),
        num_cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    )


def engine_release(config: Config) -> str | None:
    """The installed version of the configured server in its interpreter; None when it is not there or not needed."""
    package = config.generator.backend
    if package == "embedded":
        return None
    python, extra = config.generator.engine_python, config.generator.engine_environment
    # Not resolved: the interpreters of two virtual environments are links to one file.
    ours = Path(engine_python(python)).absolute() == Path(sys.executable).absolute()
    if ours and not extra:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None
    code = f"from importlib.metadata import version; print(version({package!r}))"
    try:
        program = engine_python(python)
        answer = subprocess.run(
            [program, "-c", code],
            capture_output=True,
            text=True,
            timeout=PROBE_TIMEOUT_S,
            check=False,
            env=as_process_environment(engine_environment(program, extra)),
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


def capability_report(config: Config, *, machine: Machine) -> str | None:
    """One screen: what the configuration needs, what is here, what closes each difference. None when it can run."""
    gaps = [gap for gap in (*_gpu_gaps(config, machine), *_engine_gaps(config), *_file_gaps(config)) if gap]
    if not gaps:
        return None
    lines = [
        "This machine can't run this configuration; nothing was started.",
        f"Here: {machine}.",
        "",
    ]
    for gap in gaps:
        lines.append(f"  needs {gap.needs}; here: {gap.here}")
        lines += [f"      {'-> ' if index == 0 else '   '}{way}" for index, way in enumerate(gap.ways)]
    lines += [
        "",
        "Add --explain to see every key, the plan of GPUs and memory, and the engines' commands.",
        "To train here and now: python -m skyrl_train.entrypoints.main_base",
    ]
    return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class _Gap:
    needs: str
    here: str
    ways: tuple[str, ...]


def _gpu_gaps(config: Config, machine: Machine) -> list[_Gap]:
    need = count_gpus(config)
    placement = config.trainer.placement
    # Other machines' GPUs can't be counted from here: of a cluster, this node's share must be present.
    nodes = placement.policy_num_nodes if placement.colocate_all else 1
    per_node = -(-need.total // max(nodes, config.generator.multi_node.nnodes))
    if per_node <= len(machine.gpus):
        return []
    here = len(machine.gpus)
    if here:
        way = f"or trainer.placement.policy_num_gpus_per_node={here} and engines that take {here} GPUs together"
    else:
        way = "or trainer.placement.policy_num_gpus_per_node=0: everything on the CPU, for tiny models"
    return [
        _Gap(
            needs=f"{per_node} GPU{'s' if per_node > 1 else ''}{' on this node' if nodes > 1 else ''} ({need})",
            here=str(here),
            ways=("run the same command on a machine that has them", way),
        )
    ]


def _engine_gaps(config: Config) -> list[_Gap]:
    generator = config.generator
    backend = generator.backend
    gaps = []
    if backend in INSTALL and generator.run_engines_locally and engine_release(config) is None:
        python = generator.engine_python
        where = f"generator.engine_python={python}" if python else f"this interpreter ({sys.executable})"
        found = python is None or shutil.which(Path(python).expanduser()) is not None
        missing = f"no package {backend} in it" if found else "no such program"
        gaps.append(
            _Gap(
                needs=f"{backend} in {where}",
                here=missing,
                ways=(
                    f"python3 -m venv ~/{backend}-env && ~/{backend}-env/bin/pip install {INSTALL[backend]}",
                    f"then generator.engine_python=~/{backend}-env/bin/python",
                ),
            )
        )
    if (count := count_gpus(config).policy) > MAX_POLICY_GPUS:
        gaps.append(
            _Gap(
                needs=f"a trainer on {count} GPUs",
                here=f"this version trains on {MAX_POLICY_GPUS}",
                ways=(f"trainer.placement.policy_num_gpus_per_node={MAX_POLICY_GPUS}",),
            )
        )
    return gaps


def _file_gaps(config: Config) -> list[_Gap]:
    trainer, speculation = config.trainer, config.generator.speculative_decoding
    models = {"trainer.policy.model.path": trainer.policy.model.path}
    if trainer.algorithm.use_kl_loss or trainer.algorithm.use_kl_in_reward:
        models["trainer.ref.model.path"] = trainer.ref.model.path or trainer.policy.model.path
    if speculation.enabled and speculation.draft_model_path:
        models["generator.speculative_decoding.draft_model_path"] = speculation.draft_model_path
    gaps = []
    for path, keys in _by_value(models).items():
        if not path.startswith(BUILTIN_PREFIX) and find_model_folder(path) is None:
            name = path.rstrip("/").rpartition("/")[2]
            hub_name = path if path.count("/") == 1 and not path.startswith((".", "/", "~")) else f"ORGANISATION/{name}"
            gaps.append(
                _Gap(
                    needs=f"the model {path} ({keys[0]})",
                    here="not on disk, nor in the Hugging Face cache",
                    ways=(f"hf download {hub_name} --local-dir models/{name}", f"then {keys[0]}=models/{name}"),
                )
            )
    files = {"data.train_data": config.data.train_data, "data.val_data": config.data.val_data}
    missing = {key: [file for file in paths if not Path(file).expanduser().exists()] for key, paths in files.items()}
    if any(missing.values()):
        names = [f"{', '.join(paths)} ({key})" for key, paths in missing.items() if paths]
        gaps.append(
            _Gap(
                needs=f"the data {' and '.join(names)}",
                here=f"not under {Path.cwd()}",
                ways=_data_ways([file for paths in missing.values() for file in paths]),
            )
        )
    return gaps


def _data_ways(missing: list[str]) -> tuple[str, ...]:
    if all("gsm8k" in file for file in missing):
        return (f"python examples/gsm8k/prepare.py --out {Path(missing[0]).parent}",)
    return ("data.train_data=[PATH, ...]: jsonl, json, parquet, or a datasets folder",)


def _by_value(items: dict[str, str]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {}
    for key, value in items.items():
        grouped.setdefault(value, []).append(key)
    return grouped


def _gpus() -> tuple[Gpu, ...]:
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    if shutil.which(command[0]) is None:
        return ()
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return ()
    rows = [line.rsplit(",", 1) for line in answer.stdout.splitlines() if line.count(",") >= 1]
    return tuple(Gpu(name=name.strip(), memory_bytes=int(mib) * 2**20) for name, mib in rows if mib.strip().isdigit())


def _visible(gpus: tuple[Gpu, ...], variable: str | None) -> tuple[Gpu, ...]:
    """CUDA_VISIBLE_DEVICES, which nvidia-smi does not heed: indices or UUIDs; the first unknown one ends the list."""
    if variable is None:
        return gpus
    chosen: list[Gpu] = []
    for word in filter(None, (part.strip() for part in variable.split(","))):
        if word.startswith(("GPU-", "MIG-")):
            chosen += gpus[:1]  # which one does not matter here: they are counted, and are of one kind
        elif word.isdigit() and int(word) < len(gpus):
            chosen.append(gpus[int(word)])
        else:
            break
    return tuple(chosen)
