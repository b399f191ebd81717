"""What is in the tree and not built is refused by name when set, and only then."""

from __future__ import annotations

import pytest

from skyrl_train.config import ConfigError, load_config
from skyrl_train.config.keys import schema_groups, schema_keys
from skyrl_train.config.unbuilt import UNBUILT


@pytest.mark.parametrize(
    "override",
    [
        "trainer.placement.critic_num_nodes=2",
        "trainer.fsdp_config.cpu_offload=true",
        "trainer.placement.policy_num_gpus_per_node=8",
        "generator.enable_http_endpoint=true",
        "generator.speculative_decoding.adaptive=true",
        "generator.speculative_decoding.ngram.match_type=PROB",
        "generator.lora.max_chunk_size=16",
        "generator.metrics.mfu=true",
        "generator.metrics.tracing.enabled=true",
        "generator.scheduling.policy=dfs-weight",
        "generator.scheduling.max_queued_requests=9",
        "generator.scheduling.retraction_policy=length",
        "generator.structured_output.grammar_backend=outlines",
        "generator.structured_output.whitespace_pattern=x",
        "generator.hierarchical_cache.write_policy=write_through",
        "generator.hierarchical_cache.storage_backend=file",
        "generator.num_inference_engines=2",
        "generator.engine_python=python",
        "generator.batched=true",
    ],
)
def test_a_feature_that_is_not_built_is_refused_by_name(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([override])
    assert "not built yet" in str(caught.value)
    assert override in str(caught.value)


def test_the_default_written_out_asks_for_nothing() -> None:
    load_config(
        ["generator.max_turns=1", "trainer.fully_async.enabled=false", "generator.sessions.default_capacity=32768"]
    )


def test_servers_have_what_the_embedded_engine_lacks() -> None:
    load_config(["generator.backend=sglang", "generator.sessions.enabled=true", "generator.scheduling.policy=lpm"])


def test_each_line_of_the_table_is_about_a_key_or_group_of_the_schema() -> None:
    known = {*schema_keys(), *schema_groups()}
    assert [row.prefix for row in UNBUILT if row.prefix not in known] == []


def test_all_of_them_are_listed_at_once() -> None:
    with pytest.raises(ConfigError, match="2 settings are not built yet"):
        load_config(["generator.batched=true", "trainer.sequence_parallel_size=2"])
