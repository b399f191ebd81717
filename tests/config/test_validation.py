"""Unknown keys, types, ranges, aliases: the message names key, value, source and what was wanted."""

from __future__ import annotations

from pathlib import Path

import pytest

from skyrl_train.config import ConfigError, load_config
from skyrl_train.config.aliases import ALIASES
from skyrl_train.config.keys import schema_keys


def refused(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(list(argv))
    return str(caught.value)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("trainer.sed", "trainer.seed"),
        ("trainer.policy.optimizer_config.learning_rate", "trainer.policy.optimizer_config"),
        ("generator.smpling_params.top_p", "generator.sampling_params"),
        ("generator.speculative_decoding.ngram.max_trie_deep", "generator.speculative_decoding.ngram.max_trie_depth"),
        ("generatr.backend", "generator"),
        ("generator.train_batch_size", "trainer.train_batch_size"),
        ("temperature", "generator.sampling_params.temperature"),
        ("algorithm.use_kl_los", "trainer.algorithm.use_kl_loss"),
    ],
)
def test_an_unknown_key_names_the_nearest(written: str, meant: str) -> None:
    message = refused(f"{written}=1")
    assert "unknown key" in message
    assert f"did you mean {meant}" in message
    assert f"override {written}=1" in message


def test_an_unknown_key_in_a_file_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("generator:\n  bakend: sglang\n")
    message = refused("--config-name", "mine")
    assert "unknown key generator.bakend: did you mean generator.backend? (mine.yaml)" in message


def test_all_unknown_keys_are_listed_at_once() -> None:
    message = refused("trainer.sed=1", "generator.bakend=x")
    assert "2 settings are wrong" in message
    assert "trainer.seed" in message
    assert "generator.backend" in message


@pytest.mark.parametrize(
    ("override", "wanted", "found"),
    [
        ("trainer.seed=-1", ">= 0", "-1"),
        ("trainer.seed=abc", "a whole number", "'abc'"),
        ("trainer.seed=true", "a whole number", "True"),
        ("trainer.max_steps=2.5", "a whole number", "2.5"),
        ("trainer.gradient_checkpointing=1", "true or false", "1"),
        ("trainer.policy.optimizer_config.lr=0", "> 0", "0"),
        ("trainer.policy.optimizer_config.lr=nan", "a finite number", "nan"),
        ("generator.sampling_params.top_p=1.5", "<= 1", "1.5"),
        ("generator.sampling_params.top_k=-1", ">= 0", "-1"),
        ("generator.backend=tgi", "one of 'embedded', 'sglang' or 'vllm'", "'tgi'"),
        ("generator.sampling_params.stop=x", "a list", "'x'"),
        ("generator.engine_init_kwargs=3", "keys and values", "3"),
        ("trainer.epochs=null", "a whole number", "None"),
        ("trainer.run_name=a/b", "text that matches", "'a/b'"),
        ("trainer.policy.model.path=''", "text that is not empty", "''"),
        ("data.on_bad_row=ignore", "one of 'error' or 'skip'", "'ignore'"),
    ],
)
def test_a_wrong_value_says_what_was_wanted_found_and_where(override: str, wanted: str, found: str) -> None:
    message = refused(override)
    assert message.startswith(f"{override.partition('=')[0]} must be {wanted}")
    assert f"found {found} (override {override})" in message


def test_a_value_where_a_group_stands_is_refused() -> None:
    assert "trainer.placement is a group of keys" in refused("trainer.placement=4")


def test_a_whole_number_is_fine_where_a_number_is_wanted() -> None:
    assert load_config(["generator.sampling_params.temperature=1"]).config.generator.sampling_params.temperature == 1.0


ALIAS_VALUES = {
    "policy.learning_rate": "3e-4",
    "algorithm.adv_estimator": "grpo",
    "algorithm.policy_loss": "dual_clip",
    "algorithm.kl_coef": "0.002",
    "algorithm.entropy_coef": "0.01",
    "rollout.n_samples_per_prompt": "5",
    "rollout.batch_size": "16",
    "env.name": "arithmetic",
    "env.max_turns": "1",
    "environment.name": "arithmetic",
    "generator.enable_lora": "false",
}


def test_every_alias_has_a_value_here_and_a_key_in_the_schema() -> None:
    assert set(ALIAS_VALUES) == set(ALIASES)
    assert set(ALIASES.values()) <= set(schema_keys())


@pytest.mark.parametrize("alias", ALIAS_VALUES)
def test_an_alias_sets_its_key_and_shows_as_the_source(alias: str) -> None:
    override = f"{alias}={ALIAS_VALUES[alias]}"
    loaded = load_config([override])
    source = loaded.sources[ALIASES[alias]]
    assert source.alias == alias
    assert str(source) == f"override {override}"
    assert load_config([f"{ALIASES[alias]}={ALIAS_VALUES[alias]}"]).config == loaded.config


def test_the_whole_algorithm_group_may_be_written_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("algorithm:\n  eps_clip_high: 0.28\n  policy_loss: dual_clip\n")
    loaded = load_config(["--config-name", "mine"])
    assert loaded.config.trainer.algorithm.eps_clip_high == 0.28
    assert loaded.config.trainer.algorithm.policy_loss_type == "dual_clip"
    assert str(loaded.sources["trainer.algorithm.eps_clip_high"]) == "alias algorithm.eps_clip_high in mine.yaml"


def test_a_key_and_its_alias_with_two_values_names_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("trainer: {policy: {optimizer_config: {lr: 1.0e-5}}}\n")
    message = refused("--config-name", "mine", "policy.learning_rate=3e-5")
    assert "trainer.policy.optimizer_config.lr is 1e-05 (mine.yaml)" in message
    assert "policy.learning_rate is 3e-05 (override policy.learning_rate=3e-5)" in message


def test_two_aliases_of_one_key_with_two_values_are_refused() -> None:
    message = refused("env.name=arithmetic", "environment.name=gsm8k")
    assert "env.name is 'arithmetic'" in message
    assert "environment.name is 'gsm8k'" in message


def test_a_key_and_its_alias_with_one_value_are_fine() -> None:
    loaded = load_config(["rollout.batch_size=16", "trainer.train_batch_size=16"])
    assert loaded.config.trainer.train_batch_size == 16
    assert loaded.sources["trainer.train_batch_size"].alias is None


def test_a_wrong_value_through_an_alias_is_checked() -> None:
    assert "trainer.train_batch_size must be >= 1, found 0 (override rollout.batch_size=0)" in refused(
        "rollout.batch_size=0"
    )
