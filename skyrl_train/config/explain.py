"""`--explain`: every resolved key with its source, the plan, the engines' commands; as text or JSON."""

from __future__ import annotations

import json
from typing import Any

from skyrl_train.config.command_line import USAGE
from skyrl_train.config.keys import read, schema_keys
from skyrl_train.config.load import LoadedConfig
from skyrl_train.config.machine import Machine, capability_report, this_machine
from skyrl_train.config.plan import engine_commands, make_plan, plan_lines, shell
from skyrl_train.config.schema import Config
from skyrl_train.config.tables import value_text
from skyrl_train.engines.sglang.releases import ASSUMED_RELEASE
from skyrl_train.engines.vllm.derived import RECEIVER_FOLDER


def render_explain(loaded: LoadedConfig, *, machine: Machine | None = None) -> str:
    """What `--explain` or `--help` prints. Reads the machine (nvidia-smi, files), starts nothing."""
    if loaded.help:
        return USAGE
    machine = machine or this_machine()
    if loaded.explain == "json":
        return json.dumps(explain_tree(loaded, machine), indent=2)
    return "\n".join(_text(loaded, machine))


def explain_tree(loaded: LoadedConfig, machine: Machine) -> dict[str, Any]:
    """The same as data: keys, plan, engines, warnings, and the report of what is missing here (null: it can run)."""
    plain = loaded.config.model_dump(mode="json")
    keys = {
        path: {"value": _in(plain, path), "source": str(loaded.sources[path]), "kind": loaded.sources[path].kind}
        for path in schema_keys()
    }
    return {
        "keys": keys,
        "plan": make_plan(loaded.config, machine).to_dict(),
        "engines": engine_commands(loaded.config, release=loaded.engine_release or ASSUMED_RELEASE),
        "engine_release": loaded.engine_release,
        "machine": str(machine),
        "warnings": list(loaded.warnings),
        "report": capability_report(loaded.config, machine=machine),
    }


def _text(loaded: LoadedConfig, machine: Machine) -> list[str]:
    rows = [(path, value_text(read(loaded.config, path)), str(loaded.sources[path])) for path in schema_keys()]
    key_width = max(len(path) for path, _, _ in rows)
    lines = [f"configuration: {len(rows)} keys; * is set by you", ""]
    group = ""
    for path, value, source in rows:
        parents = path.split(".")[:-1]
        if (top := ".".join(parents[:2])) != group and group:
            lines.append("")
        group = top
        mark = "*" if loaded.sources[path].by_user else " "
        lines.append(f"{mark} {path:<{key_width}}  {value:<24}  {source}")
    lines += ["", "plan", *(f"  {line}" for line in plan_lines(make_plan(loaded.config, machine)))]
    lines += ["", "engines", *(f"  {line}" for line in _engine_lines(loaded))]
    for warning in loaded.warnings:
        lines += ["", f"warning: {warning}"]
    report = capability_report(loaded.config, machine=machine)
    lines += ["", f"this machine ({machine}) can run it" if report is None else report]
    return lines


def _engine_lines(loaded: LoadedConfig) -> list[str]:
    generator = loaded.config.generator
    if generator.backend == "embedded":
        return ["embedded, in the trainer's process: no command"]
    if not generator.run_engines_locally:
        return [f"attached to {url}" for url in generator.remote_inference_engine_urls]
    commands = engine_commands(loaded.config, release=loaded.engine_release or ASSUMED_RELEASE)
    lines = [f"{generator.backend}-{index}: {shell(command)}" for index, command in enumerate(commands)]
    lines.append("host and port are added at start: 127.0.0.1 and a free one")
    if by_hand := _needed_by_hand(loaded.config):
        lines.append(f"started by hand it needs {by_hand} in its environment")
    if loaded.engine_release is None and generator.backend == "sglang":
        lines.append(f"no SGLang is installed here: arguments are those of {ASSUMED_RELEASE}")
    return lines


def _needed_by_hand(config: Config) -> str:
    """Without which the command doesn't start, or its server takes no weights."""
    if config.generator.backend == "vllm":
        return f"VLLM_SERVER_DEV_MODE=1 and PYTHONPATH={RECEIVER_FOLDER}"
    return "" if config.trainer.placement.policy_num_gpus_per_node else "SGLANG_USE_CPU_ENGINE=1"


def _in(tree: dict[str, Any], path: str) -> Any:
    value: Any = tree
    for part in path.split("."):
        value = value[part]
    return value
