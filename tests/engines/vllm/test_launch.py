"""From a configuration to a vLLM server: its options, its environment, what the installed release says to them."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from skyrl_train.config import load_config
from skyrl_train.config.plan import engine_commands
from skyrl_train.engines.vllm.args import ARGUMENTS, server_options
from skyrl_train.engines.vllm.derived import RECEIVER_FOLDER, max_adapters
from skyrl_train.engines.vllm.installed import InstalledVLLM, check_options, read_installed
from skyrl_train.engines.vllm.launch import server_environment, vllm_launch
from skyrl_train.engines.vllm.traits import server_traits, verifies_greedy_only
from skyrl_train.errors import ConfigError
from tests.tiny import make_model

STORED = Path(__file__).parents[2] / "config" / "vllm_options"
RELEASES = ("0.26.0", "0.32.0")
GPU = ("trainer.placement.policy_num_gpus_per_node=1", "trainer.policy.model.path=models/m")
SPECULATION = ("generator.speculative_decoding.enabled=true", "generator.speculative_decoding.num_draft_tokens=3")
FRONT_END = {"enable-prompt-tokens-details", "disable-uvicorn-access-log", "lora-modules"}
"""Options of the HTTP server: the stored lists are the engine's."""


@cache
def config_of(*keys: str) -> Any:
    return load_config(["generator.backend=vllm", "trainer.policy.model.path=models/m", *keys]).config


def capabilities(*keys: str) -> frozenset[str]:
    return server_traits("vllm-0", server_options(config_of(*keys)), release="0.32.0").capabilities


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize(
    "keys",
    [
        (),
        GPU,
        ("generator.lora.enabled=true", "generator.scheduling.enable_priority=true"),
        (*SPECULATION, "generator.metrics.tracing.enabled=true"),
    ],
)
def test_each_option_that_follows_from_others_exists(release: str, keys: tuple[str, ...]) -> None:
    known = set((STORED / f"{release}.txt").read_text().split()) | FRONT_END
    options = {name.removeprefix("no-") for name in server_options(config_of(*keys))}
    assert options - known == set()


def test_a_server_on_a_cpu_gets_what_it_needs(tmp_path: Path) -> None:
    model = make_model("qwen2")
    model.save_pretrained(tmp_path)
    options = server_options(
        config_of(f"trainer.policy.model.path={tmp_path}", "generator.max_model_len=300", "generator.max_num_seqs=10")
    )
    assert (options["dtype"], options["enforce-eager"], options["max-model-len"]) == ("float32", True, 300)
    # 10 requests of 300 tokens, each in whole blocks of 128, and one block more; 2 layers x 2 heads x 16 x 4 bytes x 2.
    assert options["kv-cache-memory-bytes"] == (10 * 384 + 128) * 2 * 2 * 2 * 16 * 4
    # There it is a fraction of the whole machine's memory.
    assert "gpu-memory-utilization" not in options
    assert server_options(config_of())["max-num-seqs"] == 64


def test_what_the_user_set_is_not_overridden() -> None:
    options = server_options(
        config_of(
            "+generator.engine_init_kwargs.compilation_config={mode: 3}",
            "generator.model_dtype=bfloat16",
            "+generator.engine_init_kwargs.kv_cache_memory_bytes=5",
            "+generator.engine_init_kwargs.logprobs_mode=raw_logprobs",
            "+generator.engine_init_kwargs.served_model_name=mine",
        )
    )
    assert "enforce-eager" not in options and options["dtype"] == "bfloat16"
    assert (options["kv-cache-memory-bytes"], options["served-model-name"]) == (5, "mine")
    assert server_traits("vllm-0", options, release="0.32.0").logprob_space == "raw"


def test_prompts_of_seeded_requests_are_whole_on_a_cpu_or_requests_have_no_seed() -> None:
    options = server_options(config_of())
    assert options["enable-chunked-prefill"] is False
    assert "seed" in server_traits("vllm-0", options, release="0.32.0", on_cpu=True).capabilities
    for key in ("generator.max_num_batched_tokens=64", "+generator.engine_init_kwargs.enable_chunked_prefill=true"):
        options = server_options(config_of(key, "generator.max_model_len=100"))
        assert options.get("enable-chunked-prefill") is not False, "such a server refuses to chunk no prompt"
        assert "seed" not in server_traits("vllm-0", options, release="0.32.0", on_cpu=True).capabilities
    assert "enable-chunked-prefill" not in server_options(config_of(*GPU)) and "seed" in capabilities(*GPU)


def test_a_server_on_gpus_keeps_vllms_own_choices() -> None:
    options = server_options(config_of(*GPU))
    assert options["gpu-memory-utilization"] == 0.6 and options["dtype"] == "bfloat16"
    assert options["enable-sleep-mode"] is True
    assert not {"enforce-eager", "kv-cache-memory-bytes", "max-num-seqs"} & set(options)


def test_the_command_is_the_one_that_explain_shows() -> None:
    config = config_of(
        "generator.enable_prefix_caching=false",
        "+generator.engine_init_kwargs.compilation_config={mode: 0}",
        "+generator.engine_init_kwargs.async_scheduling=false",
        "+generator.engine_init_kwargs.enable_flashinfer_autotune=true",
    )
    text = " ".join(engine_commands(config, release="0.32.0")[0])
    for part in (
        "-m vllm.entrypoints.cli.main serve models/m ",
        "--no-enable-prefix-caching",
        '--compilation-config {"mode": 0}',
        "--no-async-scheduling",
        "--enable-flashinfer-autotune",
        "--logprobs-mode processed_logprobs",
        "--worker-extension-cls skyrl_receiver.worker.WorkerExtension",
        '--weight-transfer-config {"backend": "skyrl"}',
        "--served-model-name policy",
    ):
        assert part in text


def test_the_last_slot_for_adapters_stays_empty_on_a_cpu() -> None:
    keys = ("generator.lora.enabled=true", "generator.lora.max_loras_per_batch=4", "generator.lora.max_rank=12")
    options = server_options(config_of(*keys))
    assert (options["max-loras"], options["max-cpu-loras"], options["max-lora-rank"]) == (4, 4, 16)
    assert max_adapters(config_of(*keys)) == 3
    assert max_adapters(config_of(*GPU, *keys)) is None


def test_a_policy_that_is_an_adapter_has_room_for_the_next_one() -> None:
    config = config_of("trainer.policy.model.lora.rank=4", "+generator.lora.paths.named=adapters/a")
    options = server_options(config)
    assert (options["enable-lora"], options["max-loras"], options["max-lora-rank"]) == (True, 4, 8)
    assert options["lora-modules"] == ["named=adapters/a"] and max_adapters(config) == 3


def test_more_adapters_than_slots_are_refused() -> None:
    keys = ("trainer.policy.model.lora.rank=4", "+generator.lora.paths.named=adapters/a")
    with pytest.raises(ConfigError, match=r"has room for 2 adapters on a CPU.* set it to 4"):
        config_of(*keys, "generator.lora.max_loras_per_batch=3")
    config_of(*keys, "generator.lora.max_loras_per_batch=4")


def test_options_of_adapters_are_left_out_without_them() -> None:
    assert not [name for name in server_options(config_of("generator.lora.max_rank=8")) if "lora" in name]


def test_capabilities_follow_the_options() -> None:
    plain = capabilities()
    assert {"abort", "min_p", "penalties", "seed", "sessions", "stop_strings", "structured_output"} <= plain
    assert not plain & {"priority", "lora", "adapter_weights", "sleep", "speculation", "local_weights"}
    assert "priority" in capabilities("generator.scheduling.enable_priority=true")
    assert {"lora", "adapter_weights"} <= capabilities("generator.lora.enabled=true")
    assert "sleep" in capabilities(*GPU)
    ngram = capabilities(*SPECULATION)
    assert "min_p" not in ngram and {"speculation", "seed"} <= ngram
    draft = ("generator.speculative_decoding.algorithm=standalone", "generator.speculative_decoding.draft_model_path=d")
    assert "seed" not in capabilities(*SPECULATION, *draft)


def test_speculation_in_vllms_words() -> None:
    ngram = server_options(config_of(*SPECULATION, "generator.speculative_decoding.ngram.max_trie_depth=4"))
    assert ngram["speculative-config"] == {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_max": 4,
        "prompt_lookup_min": 1,
    }
    with pytest.raises(ConfigError, match="vLLM has no default for it"):
        config_of("generator.speculative_decoding.enabled=true")


def test_drafts_are_verified_greedily_alone_on_a_cpu() -> None:
    assert verifies_greedy_only(server_options(config_of(*SPECULATION)), on_cpu=True)
    assert not verifies_greedy_only(server_options(config_of(*SPECULATION, *GPU)), on_cpu=False)
    assert not verifies_greedy_only(server_options(config_of()), on_cpu=True)


def test_our_own_paths_do_not_reach_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/ours")
    config = config_of(
        "+generator.engine_environment.PYTHONPATH=/theirs", "+generator.engine_environment.DO_NOT_TRACK=maybe"
    )
    environment = server_environment(config, python="/env/bin/python", release="0.32.0")
    assert environment["PYTHONPATH"] == f"{RECEIVER_FOLDER}{os.pathsep}/theirs"
    assert environment["PYTHONHOME"] is None and environment["DO_NOT_TRACK"] == "maybe"
    assert environment["VLLM_SERVER_DEV_MODE"] == "1" and environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"
    assert str(environment["PATH"]).startswith("/env/bin:")
    assert {path.name for path in RECEIVER_FOLDER.iterdir()} - {"__pycache__"} == {"__init__.py", "skyrl_receiver"}


def test_gpus_are_numbered_among_those_that_we_see(monkeypatch: pytest.MonkeyPatch) -> None:
    def visible() -> str | None:
        return server_environment(config_of(*GPU), python="python", release="0.32.0", gpus=(1, 2))[
            "CUDA_VISIBLE_DEVICES"
        ]

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible() == "1,2"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,GPU-uuid")
    assert visible() == "5,GPU-uuid"


def test_without_a_compiler_nothing_is_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"needs g\+\+"):
        server_environment(config_of(), python="python", release="0.32.0")
    server_environment(config_of(*GPU), python="python", release="0.32.0")


def test_what_the_installed_release_does_not_know_is_told_by_the_key() -> None:
    installed = InstalledVLLM(release="9.0", options={"dtype": ("float32", "auto"), "seed": None, "async": None})
    check_options({"dtype": "auto", "seed": 3, "async": True}, installed)
    with pytest.raises(ConfigError) as caught:
        check_options({"dtype": "int4", "max-num-seqs": 4, "async": False, "foo": 1}, installed)
    for part in (
        "generator.model_dtype: vLLM 9.0 knows no --dtype int4; it has float32, auto",
        "generator.max_num_seqs: vLLM 9.0 has no option --max-num-seqs",
        "engine_init_kwargs.async: vLLM 9.0 has no option --no-async",
        "engine_init_kwargs.foo: vLLM 9.0 has no option --foo",
    ):
        assert part in str(caught.value)


def test_an_interpreter_without_vllm_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be run"):
        read_installed(str(tmp_path / "python"))
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho No module named vllm >&2\nexit 1\n")
    python.chmod(0o755)
    with pytest.raises(ConfigError, match="can't be imported there"):
        read_installed(str(python))


@pytest.mark.engines
@pytest.mark.timeout(300)
def test_the_installed_release_knows_every_option_of_the_table(vllm_python: Path, tmp_path: Path) -> None:
    installed = read_installed(str(vllm_python))
    assert {row.option for row in ARGUMENTS} - set(installed.options) == set()
    stored = STORED / f"{installed.release}.txt"
    assert stored.exists(), f"no stored list of {installed.release}"
    assert set(stored.read_text().split()) - set(installed.options) == set()
    keys = ("generator.lora.enabled=true", "generator.scheduling.enable_priority=true")
    launch = vllm_launch(config_of(f"generator.engine_python={vllm_python}", *keys), 0, log_folder=tmp_path)
    assert launch.spec is not None and launch.traits.release == installed.release
    with pytest.raises(ConfigError, match=r"has no option --no-such-option"):
        wrong = config_of(f"generator.engine_python={vllm_python}", "+generator.engine_init_kwargs.no_such_option=1")
        vllm_launch(wrong, 0, log_folder=tmp_path)
