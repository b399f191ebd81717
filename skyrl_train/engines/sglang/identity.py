"""Is this server the one that was meant? Compared with what /server_info says of its arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from skyrl_train.errors import ConfigError

COMPARED = (
    "model_path",
    "context_length",
    "tp_size",
    "pp_size",
    "enable_metrics",
    "enable_lora",
    "max_lora_rank",
    "enable_memory_saver",
    "enable_priority_scheduling",
    "enable_deterministic_inference",
    "speculative_algorithm",
    "speculative_num_draft_tokens",
)
"""ServerArgs fields that change what the server can do or what its answers mean."""

KEYS = {
    "model_path": "trainer.policy.model.path",
    "context_length": "generator.max_model_len",
    "tp_size": "generator.inference_engine_tensor_parallel_size",
    "pp_size": "generator.inference_engine_pipeline_parallel_size",
    "enable_metrics": "generator.metrics.enabled",
    "enable_lora": "generator.lora.enabled",
    "max_lora_rank": "generator.lora.max_rank",
    "enable_memory_saver": "trainer.placement.colocate_all",
    "enable_priority_scheduling": "generator.scheduling.enable_priority",
    "enable_deterministic_inference": "generator.deterministic_inference.enabled",
    "speculative_algorithm": "generator.speculative_decoding.algorithm",
    "speculative_num_draft_tokens": "generator.speculative_decoding.num_draft_tokens",
}


def check_identity(found: Mapping[str, Any], expected: Mapping[str, Any], *, release: str, name: str, url: str) -> None:
    """`found` is /server_info, `expected` the ServerArgs of our configuration. Raises ConfigError naming what differs.

    A field that is not expected is compared as off, where off can be told from what SGLang chose by itself.
    """
    differing = []
    if found.get("version") != release:
        differing.append(f"it is SGLang {found.get('version')}, expected {release}")
    if found.get("skip_tokenizer_init"):
        differing.append("it runs with skip_tokenizer_init: it would not see stop strings")
    for field in COMPARED:
        wanted, there = expected.get(field), found.get(field)
        if wanted is None and (field not in _SWITCHES or not there):
            continue
        if not _same(field, wanted, there):
            differing.append(f"{field} is {there!r}, {KEYS[field]} asks for {wanted!r}")
    if differing:
        raise ConfigError(
            f"{name}: the server at {url} is not what this run is configured for: {'; '.join(differing)}. Start it "
            "with the arguments that --explain prints, or change these keys"
        )


_SWITCHES = ("enable_lora", "speculative_algorithm")
"""Fields that matter when they are on there and not asked for here."""


def _same(field: str, wanted: Any, there: Any) -> bool:
    if field == "speculative_algorithm":
        return bool((wanted or "").upper() == (there or "").upper())
    if field == "model_path" and wanted is not None and there is not None:
        return bool(str(wanted).rstrip("/") == str(there).rstrip("/"))
    if isinstance(wanted, bool) or wanted is None:
        return bool(wanted) == bool(there)
    return bool(wanted == there)
