"""What a server is started with beyond the keys, what it can do then, and the check against the installed release."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from skyrl_train.config import load_config
from skyrl_train.engines.server.environment import as_process_environment, engine_environment
from skyrl_train.engines.sglang.command import command_line, server_arguments
from skyrl_train.engines.sglang.identity import check_identity
from skyrl_train.engines.sglang.installed import InstalledSGLang, Option, check_arguments, read_installed
from skyrl_train.engines.sglang.traits import samples_greedily, server_traits
from skyrl_train.errors import ConfigError

SGLANG = "generator.backend=sglang"


def arguments(*overrides: str, release: str = "0.5.23") -> dict[str, Any]:
    return server_arguments(load_config([SGLANG, *overrides]).config, release=release)


def test_a_server_on_a_cpu_gets_kernels_that_are_there() -> None:
    found = arguments()
    assert (found["attention_backend"], found["sampling_backend"]) == ("torch_native", "pytorch")
    assert found["sleep_on_idle"] is found["disable_decode_cuda_graph"] is found["disable_prefill_cuda_graph"] is True
    assert "disable_cuda_graph" in arguments(release="0.5.10")
    assert "disable_cuda_graph" not in found


def test_what_the_user_sets_wins_over_what_follows() -> None:
    found = arguments(
        "generator.attention.backend=intel_amx",
        "generator.max_num_seqs=7",
        "generator.scheduling.max_total_tokens=999",
        "generator.engine_init_kwargs.sleep_on_idle=false",
    )
    assert (found["attention_backend"], found["max_running_requests"], found["max_total_tokens"]) == (
        "intel_amx",
        7,
        999,
    )
    assert "--sleep-on-idle" not in command_line(found, python="python")


def test_a_gpu_server_chooses_its_kernels_itself() -> None:
    found = arguments("trainer.placement.policy_num_gpus_per_node=1", "trainer.policy.model.path=models/m")
    for field in ("device", "attention_backend", "max_total_tokens", "sleep_on_idle", "disable_decode_cuda_graph"):
        assert field not in found


@pytest.mark.parametrize(
    ("seqs", "context", "tokens"), [(4, 100, 400), (64, 4096, 2**16), (1, 100_000, 100_000), (8, 512, 4096)]
)
def test_the_cache_holds_all_that_runs_within_bounds_and_one_whole_context(
    seqs: int, context: int, tokens: int
) -> None:
    keys = (f"generator.max_num_seqs={seqs}", f"generator.max_model_len={context}")
    assert arguments(*keys)["max_total_tokens"] == tokens + 64


def test_the_whole_of_max_model_len_can_be_served() -> None:
    assert arguments("generator.max_model_len=1000")["context_length"] == 1007


def test_speculation_on_a_cpu_takes_kernels_that_verify() -> None:
    found = arguments("generator.speculative_decoding.enabled=true")
    assert found["prefill_attention_backend"] == found["decode_attention_backend"] == "intel_amx"
    assert samples_greedily(found)
    assert not samples_greedily(arguments())
    assert not samples_greedily({**found, "device": "cuda"})


def test_adapters_have_the_policys_size() -> None:
    rank = "trainer.policy.model.lora.rank=4"
    found = arguments(rank, "trainer.policy.model.lora.exclude_modules=[o_proj]")
    assert (found["enable_lora"], found["max_lora_rank"], found["lora_backend"]) == (True, 4, "torch_native")
    assert found["lora_target_modules"] == ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
    narrow = arguments(rank, "trainer.policy.model.lora.target_modules=[q_proj,v_proj]", "generator.lora.max_rank=16")
    assert (narrow["max_lora_rank"], narrow["lora_target_modules"]) == (16, ["q_proj", "v_proj"])
    assert not {"max_lora_rank", "lora_target_modules", "lora_backend"} & set(arguments())


@pytest.mark.parametrize("group", ["sampling_params", "eval_sampling_params"])
def test_penalties_make_the_scheduler_wait_for_the_sampler(group: str) -> None:
    assert arguments(f"generator.{group}.presence_penalty=0.5")["disable_overlap_schedule"] is True
    assert "disable_overlap_schedule" not in arguments(f"generator.{group}.top_p=0.9")


def test_traits_follow_from_arguments_and_release() -> None:
    plain = server_traits("sglang-0", {}, release="0.5.23")
    assert {"abort", "stop_strings", "min_p", "structured_output", "sessions"} <= plain.capabilities
    assert not {"seed", "priority", "lora", "sleep", "speculation", "penalties"} & plain.capabilities
    assert (plain.logprob_space, plain.reports_versions, plain.native_sessions) == ("penalised", True, True)
    assert not server_traits("sglang-0", {}, release="0.5.17").reports_versions
    assert not server_traits("sglang-0", {"dp_size": 2}, release="0.5.23").native_sessions
    everything = {
        "enable_deterministic_inference": True,
        "enable_priority_scheduling": True,
        "enable_lora": True,
        "enable_memory_saver": True,
        "disable_overlap_schedule": True,
    }
    full = server_traits("sglang-0", everything, release="0.5.23").capabilities
    assert {"seed", "priority", "lora", "adapter_weights", "sleep", "penalties"} <= full
    fast = server_traits("sglang-0", {**everything, "speculative_algorithm": "NGRAM"}, release="0.5.23").capabilities
    assert "speculation" in fast and not {"seed", "min_p", "penalties"} & fast
    assert "structured_output" not in server_traits("s", {"grammar_backend": "none"}, release="0.5.23").capabilities


def test_an_environment_variable_changes_what_log_probabilities_are_of() -> None:
    original = {"SGLANG_RETURN_ORIGINAL_LOGPROB": "1"}
    assert server_traits("s", {}, release="0.5.23", environment=original).logprob_space == "raw"


def test_our_packages_stay_out_of_the_engines_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/ours")
    monkeypatch.setenv("PATH", "/usr/bin")
    given = as_process_environment(engine_environment("/engine/bin/python", {"A": "b"}))
    assert "PYTHONPATH" not in given and given["A"] == "b"
    assert given["PATH"] == f"/engine/bin{os.pathsep}/usr/bin"
    asked = as_process_environment(engine_environment("/engine/bin/python", {"PYTHONPATH": "/site"}))
    assert asked["PYTHONPATH"] == "/site"


OPTIONS = {
    "cuda_graph_bs_decode": Option(flags=("--cuda-graph-bs-decode",), choices=None, default=None, is_switch=False),
    "sampling_backend": Option(
        flags=("--sampling-backend",), choices=("flashinfer", "pytorch"), default=None, is_switch=False
    ),
    "device": Option(flags=("--device",), choices=None, default=None, is_switch=False),
    "enable_lora": Option(flags=("--enable-lora",), choices=None, default=False, is_switch=True),
    "odd_name": Option(flags=("--other-name",), choices=None, default=None, is_switch=False),
}
INSTALLED = InstalledSGLang(release="0.5.99", options=OPTIONS)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cuda_graph_bs": [1]}, "generator.cuda_graph.bs: SGLang 0.5.99 has no cuda_graph_bs; use generator.cuda_gra"),
        ({"devise": "cpu"}, "generator.engine_init_kwargs.devise: SGLang 0.5.99 has no devise; the nearest is device"),
        ({"sampling_backend": "x"}, "generator.attention.sampling_backend: .* knows no sampling_backend x; it has fla"),
        ({"odd_name": 1}, "has no option --odd-name for odd_name, it has --other-name"),
        ({"device": True}, "takes a value for device, found a bare true"),
    ],
)
def test_an_argument_that_the_release_lacks_names_its_key(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_arguments(given, INSTALLED)


def test_what_no_user_asked_for_is_left_out_where_the_release_lacks_it() -> None:
    given = {"random_seed": 7, "device": "cpu", "enable_lora": True}
    assert check_arguments(given, INSTALLED, by_user=lambda key: False) == {"device": "cpu", "enable_lora": True}


def test_an_interpreter_without_sglang_is_named(tmp_path: Path) -> None:
    program = tmp_path / "python"
    with pytest.raises(ConfigError, match="can't be run"):
        read_installed(str(program))
    program.write_text("#!/bin/sh\necho 'ModuleNotFoundError: no sglang here' >&2\nexit 1\n")
    program.chmod(0o755)
    with pytest.raises(ConfigError, match=r"SGLang can't be imported there \(ModuleNotFoundError: no sglang here\)"):
        read_installed(str(program))


def test_another_server_than_the_configured_one_is_named_with_all_that_differs() -> None:
    wanted = {"model_path": "m/", "tp_size": 2, "enable_lora": True, "context_length": 1007}
    same = {**wanted, "model_path": "m", "version": "0.5.23", "pp_size": 1}
    check_identity(same, wanted, release="0.5.23", name="sglang-0", url="http://h:1")
    other = {**same, "tp_size": 1, "version": "0.5.17", "speculative_algorithm": "NGRAM", "skip_tokenizer_init": True}
    with pytest.raises(ConfigError) as caught:
        check_identity(other, wanted, release="0.5.23", name="sglang-0", url="http://h:1")
    message = str(caught.value)
    for part in (
        "it is SGLang 0.5.17, expected 0.5.23",
        "it would not see stop strings",
        "tp_size is 1, generator.inference_engine_tensor_parallel_size asks for 2",
        "speculative_algorithm is 'NGRAM', generator.speculative_decoding.algorithm asks for None",
    ):
        assert part in message
