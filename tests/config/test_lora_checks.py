"""Keys of adapters: what has no effect is said, what can't work is refused."""

from __future__ import annotations

import pytest

from skyrl_train.config import ConfigError, load_config
from skyrl_train.engines.embedded.adapters.settings import LoraLimits
from skyrl_train.entrypoints.build import weights_for
from skyrl_train.entrypoints.build_adapters import adapter_limits

POLICY, CRITIC = "trainer.policy.model.lora", "trainer.critic.model.lora"
ON = f"{POLICY}.rank=8"


def refused(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(list(argv))
    return str(caught.value)


def warned(*argv: str) -> str:
    return "\n".join(load_config(list(argv)).warnings)


@pytest.mark.parametrize(
    "setting",
    ["alpha=32", "dropout=0.1", "target_modules=[q_proj]", "exclude_modules=[q_proj]", "init_method=pissa"],
)
def test_a_key_of_adapters_that_nobody_asked_for_has_no_effect_and_says_so(setting: str) -> None:
    assert f"{POLICY}.rank=0 trains all weights" in warned(f"{POLICY}.{setting}")
    assert "trains all weights" not in warned(f"{POLICY}.{setting}", ON)
    gae = "trainer.algorithm.advantage_estimator=gae"
    assert f"{CRITIC}.rank=0 trains all weights" in warned(f"{CRITIC}.{setting}", ON, gae)


def test_orthogonal_adapters_have_an_even_rank() -> None:
    assert "needs an even rank" in refused(f"{POLICY}.rank=3", f"{POLICY}.init_method=orthogonal")
    load_config([f"{POLICY}.rank=4", f"{POLICY}.init_method=orthogonal"])
    load_config([f"{POLICY}.rank=3"])


def test_an_adapter_may_be_served_merged() -> None:
    server = ("generator.backend=sglang", ON)
    assert weights_for(load_config([*server, "generator.lora.enabled=false"]).config) == "server"
    assert weights_for(load_config([*server]).config) == "adapter"


def test_no_target_is_refused() -> None:
    assert f"{POLICY}.target_modules is empty" in refused(ON, f"{POLICY}.target_modules=[]")


def test_dropout_where_ratios_see_it_says_so() -> None:
    dropout, whole = f"{POLICY}.dropout=0.1", "trainer.policy_mini_batch_size=32"
    assert "see its noise" in warned(ON, dropout), "the built-in model has two updates a batch"
    one_update = ("trainer.train_batch_size=32", whole)
    assert "see its noise" not in warned(ON, dropout, *one_update)
    assert "see its noise" in warned(ON, dropout, *one_update, "trainer.update_epochs_per_batch=2")
    assert "see its noise" in warned(ON, dropout, *one_update, "trainer.algorithm.use_tis=true")
    assert "see its noise" not in warned(ON, *one_update, "trainer.algorithm.use_tis=true")


def test_dropout_with_a_bound_on_engine_and_trainer_is_refused() -> None:
    bound = "trainer.algorithm.off_policy.max_logprob_diff=0.1"
    assert "have dropout's noise" in refused(ON, f"{POLICY}.dropout=0.1", bound)
    load_config([ON, bound])


def test_an_engine_has_room_for_the_adapter_that_it_serves_which_is_twice_as_wide_with_pissa() -> None:
    server = ("generator.backend=sglang", "generator.lora.max_rank=8", ON)
    load_config(list(server))
    assert "an engine serves 16" in refused(*server, f"{POLICY}.init_method=pissa")
    assert "max_rank=4" in refused(*server, "generator.lora.max_rank=4")


# -- generator.lora in the embedded engine


def test_the_embedded_engine_serves_the_adapter_unless_it_is_told_to_merge() -> None:
    assert weights_for(load_config([ON]).config) == "frozen_base"
    assert weights_for(load_config([ON, "generator.lora.enabled=false"]).config) == "module"
    asynchronous = "trainer.fully_async.enabled=true"
    assert weights_for(load_config([ON, asynchronous]).config) == "frozen_base"
    assert weights_for(load_config([ON, asynchronous, "generator.lora.enabled=false"]).config) == "copy"


@pytest.mark.parametrize(
    "where", ["trainer.placement.policy_num_gpus_per_node=1", "generator.deterministic_inference.enabled=true"]
)
def test_where_it_serves_no_adapters_the_policy_is_merged_and_asking_for_more_is_refused(where: str) -> None:
    assert load_config([ON, where]).config.generator.lora.enabled is False
    error = refused(ON, where, "generator.lora.enabled=true")
    assert where in error and "a policy that trains an adapter is served merged without it" in error
    assert where in refused(where, "+generator.lora.paths.a=/a")


@pytest.mark.parametrize(
    "setting", ["backend=triton", "max_chunk_size=16", "overlap_loading=false", "drain_wait_threshold_s=1.5"]
)
def test_a_servers_own_keys_of_adapters_are_refused_by_name(setting: str) -> None:
    assert f"generator.lora.{setting}" in refused("generator.lora.enabled=true", f"generator.lora.{setting}")


def test_adapters_that_fit_in_part_are_refused_and_strict_loading_is_what_there_is() -> None:
    assert "each tensor of an adapter is checked by name" in refused("generator.lora.strict_loading=false")
    load_config(["generator.lora.enabled=true", "generator.lora.strict_loading=true"])


def test_other_adapters_beside_pissas_shared_model_are_refused() -> None:
    paths = "+generator.lora.paths.a=/a"
    assert "taken its start out of" in refused(ON, f"{POLICY}.init_method=pissa", paths)
    load_config([ON, paths])
    load_config([ON, f"{POLICY}.init_method=pissa", "generator.lora.max_rank=8"])


def test_keys_of_adapters_without_adapters_have_no_effect_and_say_so() -> None:
    said = warned("generator.lora.enabled=false", "+generator.lora.paths.a=/a", "generator.lora.max_rank=4")
    assert "generator.lora.paths" in said and "generator.lora.max_rank=4" in said and "has no effect" in said


def test_every_key_reaches_the_engine() -> None:
    keys = ("max_rank=4", "target_modules=[q_proj]", "max_loras_per_batch=3", "max_loaded_loras=5")
    given = load_config(
        [
            *(f"generator.lora.{key}" for key in keys),
            "generator.lora.eviction_policy=fifo",
            "+generator.lora.paths.a=/a",
        ]
    )
    limits = LoraLimits(
        paths={"a": "/a"}, max_rank=4, target_modules=("q_proj",), max_in_batch=3, max_loaded=5, eviction_policy="fifo"
    )
    assert adapter_limits(given.config) == limits
    assert adapter_limits(load_config([]).config) is None
    assert adapter_limits(load_config(["generator.lora.enabled=true"]).config) == LoraLimits()
