"""Several engines described as one."""

from __future__ import annotations

from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from skyrl_train.engines.base import EngineInfo, EngineStats
from skyrl_train.engines.joined import joined_info, joined_metrics, joined_stats
from skyrl_train.errors import ConfigError

INFO = EngineInfo(
    name="a",
    model="m",
    max_context_len=100,
    logprob_space="temperature",
    capabilities=frozenset({"abort", "sessions", "priority"}),
)
STATS = EngineStats(
    policy_version=3,
    paused=False,
    num_running=1,
    num_waiting=2,
    kv_used_frac=0.25,
    num_prompt_tokens_total=10,
    num_cached_tokens_total=4,
    num_generated_tokens_total=20,
    num_retractions_total=1,
    num_evicted_tokens_total=5,
    num_steps_total=7,
)


def test_what_is_promised_holds_for_every_engine() -> None:
    other = replace(INFO, name="b", max_context_len=80, capabilities=frozenset({"abort", "seed", "sessions"}))
    assert joined_info([INFO, other]) == EngineInfo(
        name="a+b",
        model="m",
        max_context_len=80,
        logprob_space="temperature",
        capabilities=frozenset({"abort", "sessions"}),
    )


def test_engines_that_are_no_copies_are_refused() -> None:
    with pytest.raises(ConfigError, match="same model, found a: m, b: other"):
        joined_info([INFO, replace(INFO, name="b", model="other")])
    with pytest.raises(ConfigError, match="same logprob_space, found a: temperature, b: raw"):
        joined_info([INFO, replace(INFO, name="b", logprob_space="raw")])
    with pytest.raises(ConfigError, match="names of their own, found a, a"):
        joined_info([INFO, INFO])
    with pytest.raises(ConfigError, match="at least one"):
        joined_info([])


def test_figures_are_sums_where_they_count_and_the_worst_where_they_bound() -> None:
    fuller = replace(STATS, kv_used_frac=0.75, accept_len=3.0, paused=True, num_sessions=2)
    joined = joined_stats([STATS, fuller], [replace(STATS, num_sessions=5)], policy_version=3)
    assert (joined.num_running, joined.num_waiting, joined.num_sessions) == (2, 4, 2)
    assert (joined.num_generated_tokens_total, joined.num_cached_tokens_total, joined.num_steps_total) == (60, 12, 21)
    assert (joined.kv_used_frac, joined.accept_len, joined.paused) == (0.75, 3.0, True)
    assert joined.cache_hit_frac == 0.4


def test_metrics_of_several_servers_are_one_valid_text() -> None:
    text = (
        "# HELP sglang:num_running_reqs Requests that run.\n# TYPE sglang:num_running_reqs gauge\n"
        'sglang:num_running_reqs{{model_name="m, {{1}}"}} {0}\n'
        "# HELP sglang:queue_time_seconds Queue.\n# TYPE sglang:queue_time_seconds histogram\n"
        'sglang:queue_time_seconds_bucket{{le="1"}} {0}\nsglang:queue_time_seconds_bucket{{le="+Inf"}} {0}\n'
        "sglang:queue_time_seconds_sum 0.5\nsglang:queue_time_seconds_count {0}\n"
        "no_comment_total {0}\n"
    )
    joined = joined_metrics({"sglang-0": text.format(2), "sglang-1": text.format(5)})
    families = list(text_string_to_metric_families(joined))
    # The parser begins a family at each change of name: a metric whose lines were apart would come twice.
    assert [family.name for family in families][:2] == ["sglang:num_running_reqs", "sglang:queue_time_seconds"]
    assert {family.name for family in families[2:]} == {"no_comment_total"}
    found = {
        (sample.name, sample.labels["engine"], sample.labels.get("le")): sample.value
        for family in families
        for sample in family.samples
    }
    assert found["sglang:num_running_reqs", "sglang-0", None] == 2
    assert found["sglang:num_running_reqs", "sglang-1", None] == 5
    assert found["sglang:queue_time_seconds_bucket", "sglang-1", "+Inf"] == 5
    assert found["no_comment_total", "sglang-0", None] == 2
    assert len(found) == 12
    assert {family.type for family in families} == {"gauge", "histogram", "unknown"}
    assert joined_metrics({"a": "", "b": ""}) == ""


def test_a_servers_own_label_of_that_name_is_kept_under_another() -> None:
    text = 'vllm:running{engine="0",model_name="say \\"engine=\\", }"} 3.0\n'
    (family,) = text_string_to_metric_families(joined_metrics({"vllm-1": text}))
    assert family.samples[0].labels == {
        "engine": "vllm-1",
        "exported_engine": "0",
        "model_name": 'say "engine=", }',
    }
