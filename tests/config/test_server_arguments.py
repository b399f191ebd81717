"""The argument tables against the servers' own lists, and the command lines that come out of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from skyrl_train.config import ConfigError, load_config
from skyrl_train.config.keys import schema_keys
from skyrl_train.config.plan import engine_commands
from skyrl_train.engines.sglang.args import ARGUMENTS
from skyrl_train.engines.sglang.command import SWITCHES, command_line, server_arguments
from skyrl_train.engines.sglang.releases import CHECKED_RELEASES, release_number
from skyrl_train.engines.vllm.args import ARGUMENTS as VLLM_ARGUMENTS
from tests.config.test_speculation import interpreter_with_sglang

HERE = Path(__file__).parent
SGLANG = "generator.backend=sglang"


def fields_of(release: str) -> set[str]:
    """ServerArgs' fields in that release, without those that have no flag of their own."""
    return set((HERE / "sglang_fields" / f"{release}.txt").read_text().split())


def refused(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(list(argv))
    return str(caught.value)


@pytest.mark.parametrize("release", CHECKED_RELEASES)
def test_the_table_says_of_each_argument_whether_the_release_has_it(release: str) -> None:
    fields = fields_of(release)
    wrong = [row.field for row in ARGUMENTS if row.exists_in(release) != (row.field in fields)]
    assert wrong == []


def test_every_argument_has_a_key_and_every_replacement_exists() -> None:
    keys = set(schema_keys())
    assert {row.key for row in ARGUMENTS} <= keys
    named = {row.instead.partition("=")[0] for row in ARGUMENTS if row.instead and row.instead.startswith("generator.")}
    assert {name for name in named if not name.startswith("generator.engine_init_kwargs.")} <= keys
    assert set(SWITCHES.values()) <= keys


def test_a_gone_argument_says_what_to_use_or_why_nothing_is_needed() -> None:
    assert [row.field for row in ARGUMENTS if row.until and not row.instead and not _other_row(row.key)] == []


def _other_row(key: str) -> bool:
    return len([row for row in ARGUMENTS if row.key == key]) > 1


@pytest.mark.parametrize("release", ["0.26.0", "0.32.0"])
def test_every_vllm_option_exists(release: str) -> None:
    options = set((HERE / "vllm_options" / f"{release}.txt").read_text().split())
    assert {row.option.removeprefix("no-") for row in VLLM_ARGUMENTS} - options == set()
    assert {row.key for row in VLLM_ARGUMENTS} <= set(schema_keys())


def test_releases_compare_as_numbers() -> None:
    assert release_number("0.5.9") < release_number("0.5.10") == release_number("0.5.10.post2") < (0, 5, 17)


@pytest.mark.parametrize(
    ("override", "replacement"),
    [
        (
            "generator.speculative_decoding.ngram.branch_length=4",
            "use generator.speculative_decoding.ngram.max_trie_depth",
        ),
        ("generator.cuda_graph.max_bs=64", "use generator.cuda_graph.max_bs_decode"),
        ("generator.cuda_graph.piecewise_tokens=[64]", "use generator.cuda_graph.config"),
        ("generator.attention.nsa_prefill_backend=fa3", "use generator.attention.dsa_prefill_backend"),
        ("generator.rope_theta=10000.0", "use generator.json_model_override_args"),
        ("generator.metrics.collect_tokens_histogram=false", "always on"),
        ("generator.metrics.expert_distribution=true", "expert_balancedness_report_mode"),
        ("generator.disaggregation.decode_tp=2", "leave it out"),
    ],
)
def test_a_key_that_the_release_lacks_names_its_replacement(override: str, replacement: str) -> None:
    message = refused(SGLANG, override)
    assert "SGLang 0.5.23 has no" in message
    assert replacement in message


def test_keys_are_checked_against_the_installed_release(tmp_path: Path) -> None:
    old = f"generator.engine_python={interpreter_with_sglang(tmp_path / 'old', '0.5.10')}"
    loaded = load_config([SGLANG, old, "generator.cuda_graph.max_bs=64"])
    assert loaded.engine_release == "0.5.10"
    (command,) = engine_commands(loaded.config, release="0.5.10")
    assert command[command.index("--cuda-graph-max-bs") + 1] == "64"
    message = refused(SGLANG, old, "generator.cuda_graph.max_bs_decode=64")
    assert (
        "SGLang 0.5.10 has no cuda_graph_max_bs_decode, it came with 0.5.17; install SGLang 0.5.17 or later" in message
    )
    assert "does not know hrrn, it came with 0.5.23" in refused(SGLANG, old, "generator.scheduling.policy=hrrn")


def test_two_keys_that_write_one_argument_are_named() -> None:
    message = refused(SGLANG, "generator.max_num_seqs=8", "generator.scheduling.max_running_requests=16")
    assert "generator.max_num_seqs=8" in message
    assert "generator.scheduling.max_running_requests=16" in message
    assert "both write SGLang's max_running_requests" in message


@pytest.mark.parametrize(
    ("kwarg", "why"),
    [
        ("mem_fraction_static=0.5", "generator.gpu_memory_utilization"),
        ("tensor_parallel_size=2", "generator.inference_engine_tensor_parallel_size"),
        ("port=3000", "a free port is chosen"),
        ("moe-runner-backend=triton", None),
    ],
)
def test_engine_init_kwargs_write_nothing_that_a_key_writes(kwarg: str, why: str | None) -> None:
    name, _, value = kwarg.partition("=")
    message = refused(SGLANG, f"generator.engine_init_kwargs={{{name}: {value}}}")
    assert (why or "write the field's name, moe_runner_backend") in message


def test_other_engine_arguments_pass_through() -> None:
    config = load_config([SGLANG, "generator.engine_init_kwargs.moe_runner_backend=triton"]).config
    assert server_arguments(config, release="0.5.23")["moe_runner_backend"] == "triton"


def test_a_key_under_a_switch_that_is_off_warns() -> None:
    warnings = load_config([SGLANG, "generator.hierarchical_cache.ratio=3.0"]).warnings
    assert any("has no effect while generator.hierarchical_cache.enabled=false" in warning for warning in warnings)


def test_the_command_line_of_a_small_configuration() -> None:
    config = load_config(
        [
            SGLANG,
            "trainer.placement.policy_num_gpus_per_node=2",
            "generator.num_inference_engines=2",
            "trainer.policy.model.path=models/m",
            "generator.enable_prefix_caching=false",
            "generator.cuda_graph.enabled=false",
            "generator.lora.enabled=true",
            "generator.lora.paths={math: adapters/math}",
            "generator.metrics.enabled=true",
            "generator.metrics.buckets.time_to_first_token=[0.1,1.0]",
            "generator.kv_cache.fp8_gemm_backend=triton",
        ]
    ).config
    first, second = engine_commands(config, release="0.5.17")
    assert first[1:3] == ["-m", "sglang.launch_server"]
    text = " ".join(first)
    for part in (
        "--model-path models/m",
        "--tp-size 1",
        "--disable-radix-cache",
        "--disable-decode-cuda-graph --disable-prefill-cuda-graph",
        "--enable-lora --lora-paths math=adapters/math",
        "--enable-metrics",
        "--bucket-time-to-first-token 0.1 1.0",
        "--fp8-gemm-backend triton",
        "--enable-memory-saver",
        "--dtype bfloat16",
    ):
        assert part in text
    assert "speculative" not in text
    assert first[-1] == "0"
    assert second[-2:] == ["--base-gpu-id", "1"]


def test_flags_lists_and_mappings_on_the_command_line() -> None:
    words = command_line({"enable_x": True, "off": False, "none": None, "list": [1, 2], "map": {"a": 1}}, python="py")
    assert words == ["py", "-m", "sglang.launch_server", "--enable-x", "--list", "1", "2", "--map", '{"a": 1}']


def test_data_parallel_attention_is_a_size_in_newer_releases() -> None:
    config = load_config(
        [SGLANG, "generator.inference_engine_data_parallel_size=4", "generator.attention.enable_dp_attention=true"]
    ).config
    old, new = (server_arguments(config, release=release) for release in ("0.5.17", "0.5.23"))
    assert (old["dp_size"], old["enable_dp_attention"]) == (4, True)
    assert new["attn_dp_size"] == 4
    assert not {"dp_size", "enable_dp_attention"} & set(new)


def test_a_cpu_run_puts_its_server_on_the_cpu() -> None:
    arguments = server_arguments(load_config([SGLANG]).config, release="0.5.23")
    assert arguments["device"] == "cpu"
    assert "enable_memory_saver" not in arguments


def test_the_vllm_command_line() -> None:
    config = load_config(
        [
            "generator.backend=vllm",
            "trainer.policy.model.path=models/m",
            "trainer.placement.policy_num_gpus_per_node=1",
            "generator.speculative_decoding.enabled=true",
            "generator.speculative_decoding.num_draft_tokens=3",
        ]
    ).config
    ((*_, serve, model, first, second), *rest) = ([*engine_commands(config, release="0.26.0")[0][:7]],)
    assert (serve, model, first, second, rest) == ("serve", "models/m", "--tensor-parallel-size", "1", [])
    text = " ".join(engine_commands(config, release="0.26.0")[0])
    assert '--speculative-config {"method": "ngram", "num_speculative_tokens": 3}' in text
    assert "--enable-prefix-caching" in text
    assert "--enable-sleep-mode" in text


def test_what_vllm_has_no_option_for_is_refused() -> None:
    assert "vLLM has no such option" in refused("generator.backend=vllm", "generator.hierarchical_cache.enabled=true")
    assert "vLLM knows fcfs and priority" in refused("generator.backend=vllm", "generator.scheduling.policy=lpm")
