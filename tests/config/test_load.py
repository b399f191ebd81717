"""Composing: file, overrides, defaults; where each value came from; what reads back."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from skyrl_train.config import ConfigError, load_config
from skyrl_train.config.keys import schema_keys


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_defaults_together_are_the_quickstart() -> None:
    config = load_config([]).config
    assert config.trainer.policy.model.path == "builtin:arithmetic"
    assert config.environment.env_class == "arithmetic"
    assert config.generator.backend == "embedded"
    assert config.trainer.algorithm.advantage_estimator == "grpo"
    assert config.trainer.run_path == "runs/quickstart"
    assert config.generator.weight_sync_backend == "local"
    assert load_config([]).warnings == ()


def test_a_loaded_configuration_is_frozen() -> None:
    config = load_config([]).config
    with pytest.raises(ValueError, match="frozen"):
        config.trainer.seed = 3  # type: ignore[misc]


def test_every_key_has_a_value_a_source_and_a_description() -> None:
    loaded = load_config([])
    assert set(loaded.sources) == set(schema_keys())
    assert all(field.description for field in schema_keys().values())


def test_a_partial_file_is_laid_over_the_defaults(folder: Path) -> None:
    (folder / "mine.yaml").write_text("trainer:\n  seed: 7\n")
    loaded = load_config(["--config-path", ".", "--config-name", "mine"])
    assert loaded.config.trainer.seed == 7
    assert loaded.config.trainer.train_batch_size == load_config([]).config.trainer.train_batch_size
    assert str(loaded.sources["trainer.seed"]) == "mine.yaml"
    assert str(loaded.sources["trainer.train_batch_size"]) == "base.yaml"
    assert str(loaded.sources["trainer.strategy"]) == "default"


def test_config_path_is_relative_to_the_current_directory(folder: Path) -> None:
    (folder / "configs").mkdir()
    (folder / "configs" / "mine.yaml").write_text("trainer: {seed: 8}\n")
    loaded = load_config(["--config-path", "configs", "--config-name", "mine.yaml"])
    assert loaded.config.trainer.seed == 8
    assert str(loaded.sources["trainer.seed"]) == "configs/mine.yaml"
    assert load_config(["--config-path=configs", "--config-name=mine"]).config.trainer.seed == 8


def test_overrides_win_over_the_file_and_the_last_one_wins(folder: Path) -> None:
    (folder / "mine.yaml").write_text("trainer: {seed: 7}\n")
    loaded = load_config(["--config-name", "mine", "trainer.seed=1", "trainer.seed=2"])
    assert loaded.config.trainer.seed == 2
    assert str(loaded.sources["trainer.seed"]) == "override trainer.seed=2"


def test_an_override_may_set_what_the_file_does_not_have(folder: Path) -> None:
    (folder / "mine.yaml").write_text("trainer: {seed: 7}\n")
    loaded = load_config(["--config-name", "mine", "generator.sampling_params={top_k: 4, temperature: 0.7}"])
    assert loaded.config.generator.sampling_params.top_k == 4
    assert loaded.config.generator.sampling_params.temperature == 0.7
    assert loaded.sources["generator.sampling_params.top_k"].kind == "override"


def test_a_tilde_takes_a_line_of_the_file_back(folder: Path) -> None:
    (folder / "mine.yaml").write_text("trainer: {seed: 7, run_name: a}\n")
    loaded = load_config(["--config-name", "mine", "~trainer.seed"])
    assert loaded.config.trainer.seed == 42
    assert str(loaded.sources["trainer.seed"]) == "default"


def test_lists_mappings_and_quotes_follow_hydras_grammar() -> None:
    config = load_config(
        [
            'generator.sampling_params.stop=["</a>","x=1"]',
            "generator.chat_template_kwargs={enable_thinking: false}",
            "trainer.policy.optimizer_config.adam_betas=[0.9,0.95]",
        ]
    ).config
    assert config.generator.sampling_params.stop == ("</a>", "x=1")
    assert config.generator.chat_template_kwargs == {"enable_thinking": False}
    assert config.trainer.policy.optimizer_config.adam_betas == (0.9, 0.95)


def test_a_folder_under_home_needs_no_quotes() -> None:
    loaded = load_config(["generator.backend=sglang", "generator.engine_python=~/sglang-env/bin/python"])
    assert loaded.config.generator.engine_python == "~/sglang-env/bin/python"
    assert "generator.engine_python=~/sglang-env/bin/python" in str(loaded.sources["generator.engine_python"])


def test_a_file_may_have_a_defaults_list_and_sources_tell_them_apart(folder: Path) -> None:
    (folder / "common.yaml").write_text("trainer: {seed: 3, run_name: common}\n")
    (folder / "mine.yaml").write_text("defaults: [common, _self_]\ntrainer: {run_name: mine}\n")
    loaded = load_config(["--config-name", "mine"])
    assert (loaded.config.trainer.seed, loaded.config.trainer.run_name) == (3, "mine")
    assert str(loaded.sources["trainer.run_name"]) == "mine.yaml"
    assert str(loaded.sources["trainer.seed"]) == "the defaults of mine.yaml"


def test_interpolations_see_the_defaults_and_the_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELS", "/models")
    (folder / "mine.yaml").write_text(
        "trainer: {run_name: 'seed-${trainer.seed}', policy: {model: {path: '${oc.env:MODELS}/a'}}}\n"
    )
    config = load_config(["--config-name", "mine"]).config
    assert config.trainer.run_name == "seed-42"
    assert config.trainer.run_path == "runs/seed-42"
    assert config.trainer.policy.model.path == "/models/a"


def test_what_a_run_writes_reads_back_to_the_same_configuration(folder: Path) -> None:
    first = load_config(
        ["trainer.seed=5", "generator.sampling_params.stop=[x]", "trainer.micro_train_batch_size_per_gpu=8"]
    )
    (folder / "config.yaml").write_text(first.to_yaml())
    second = load_config(["--config-name", "config"])
    assert second.config == first.config
    assert second.warnings == first.warnings


def test_what_a_server_run_writes_reads_back_too(folder: Path) -> None:
    first = load_config(["generator.backend=sglang", "generator.metrics.enabled=true"])
    (folder / "config.yaml").write_text(first.to_yaml())
    assert load_config(["--config-name", "config"]).config == first.config


def test_null_keys_follow_the_backend_and_say_so() -> None:
    embedded, sglang = load_config([]), load_config(["generator.backend=sglang"])
    assert embedded.config.generator.max_num_seqs == 512
    assert str(embedded.sources["generator.max_num_seqs"]) == "embedded default"
    assert sglang.config.generator.max_num_seqs is None  # SGLang sizes itself
    assert str(sglang.sources["generator.gpu_memory_utilization"]) == "sglang default"
    assert str(embedded.sources["trainer.policy_mini_batch_size"]) == "from trainer.train_batch_size"


@pytest.mark.parametrize(
    ("gpus", "colocated", "expected"), [(0, "true", "disk"), (1, "true", "cuda_ipc"), (1, "false", "nccl")]
)
def test_weight_sync_is_chosen_by_placement(gpus: int, colocated: str, expected: str) -> None:
    config = load_config(
        [
            "generator.backend=sglang",
            f"trainer.placement.policy_num_gpus_per_node={gpus}",
            f"trainer.placement.colocate_all={colocated}",
        ]
    ).config
    assert config.generator.weight_sync_backend == expected


def test_a_missing_file_is_named_with_what_is_there(folder: Path) -> None:
    (folder / "other.yaml").write_text("trainer: {}\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml does not exist; the folder has other"):
        load_config(["--config-name", "mine"])
    with pytest.raises(ConfigError, match="no such folder"):
        load_config(["--config-path", "nowhere", "--config-name", "mine"])
    with pytest.raises(ConfigError, match="without --config-name"):
        load_config(["--config-path", "."])


def test_broken_yaml_is_named(folder: Path) -> None:
    (folder / "mine.yaml").write_text("trainer: [1, 2\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml: "):
        load_config(["--config-name", "mine"])


def test_a_key_written_twice_in_a_file_is_an_error(folder: Path) -> None:
    (folder / "mine.yaml").write_text("trainer: {seed: 1}\ntrainer: {seed: 2}\n")
    with pytest.raises(ConfigError, match="duplicate"):
        load_config(["--config-name", "mine"])


def test_options_and_overrides_that_are_none_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown option --explian; did you mean --explain\?"):
        load_config(["--explian"])
    with pytest.raises(ConfigError, match="names several values"):
        load_config(["trainer.seed=1,2"])
    with pytest.raises(ConfigError, match="is not key=value"):
        load_config(["trainer.seed"])
    with pytest.raises(ConfigError, match="wanted --explain or --explain=json"):
        load_config(["--explain=yaml"])


def test_an_interpolation_that_leads_nowhere_is_named() -> None:
    with pytest.raises(ConfigError, match="interpolation"):
        load_config(["trainer.run_name=${trainer.nothing}"])


def test_to_yaml_holds_every_key() -> None:
    tree = yaml.safe_load(load_config([]).to_yaml())
    for path in schema_keys():
        value = tree
        for part in path.split("."):
            assert part in value, path
            value = value[part]


def test_who_set_a_key_is_known_also_inside_a_mapping() -> None:
    loaded = load_config(["generator.backend=vllm", "+generator.engine_init_kwargs.async-scheduling=true"])
    assert loaded.by_user("generator.backend") and not loaded.by_user("generator.max_num_seqs")
    assert loaded.by_user("generator.engine_init_kwargs.async_scheduling")
    assert not loaded.by_user("generator.engine_init_kwargs.enable_chunked_prefill"), "nobody asked for it"
