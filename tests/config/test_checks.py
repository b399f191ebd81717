"""Contradictions between keys, each with its numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from skyrl_train.config import ConfigError, load_config

SGLANG = ("generator.backend=sglang",)
EIGHT = (*SGLANG, "trainer.placement.policy_num_gpus_per_node=8", "generator.num_inference_engines=8")


def refused(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(list(argv))
    return str(caught.value)


def warned(*argv: str) -> str:
    return "\n".join(load_config(list(argv)).warnings)


def with_model(tmp_path: Path, **shape: int) -> str:
    """A model folder of which only config.json exists."""
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "max_position_embeddings": 4096,
        **shape,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return f"trainer.policy.model.path={tmp_path}"


# Batches


def test_a_mini_batch_must_divide_the_batch() -> None:
    message = refused("trainer.train_batch_size=30", "trainer.policy_mini_batch_size=8")
    assert "trainer.policy_mini_batch_size=8 does not divide trainer.train_batch_size=30" in message
    assert "6 prompts of each step would be left over" in message


def test_a_micro_batch_must_divide_a_ranks_samples() -> None:
    message = refused(
        "trainer.train_batch_size=6",
        "trainer.policy_mini_batch_size=6",
        "generator.n_samples_per_prompt=5",
        "trainer.micro_train_batch_size_per_gpu=4",
    )
    assert "does not divide the 30 samples" in message


def test_samples_must_divide_over_data_parallel_ranks() -> None:
    message = refused(*EIGHT, "trainer.train_batch_size=3", "generator.n_samples_per_prompt=3")
    assert "9 samples of an optimizer step do not divide over 8 data-parallel ranks" in message


def test_two_ways_to_cut_micro_batches_are_one_too_many() -> None:
    message = refused("trainer.micro_train_batch_size_per_gpu=8", "trainer.max_tokens_per_micro_batch=4096")
    assert "trainer.max_tokens_per_micro_batch=4096" in message
    assert "trainer.micro_train_batch_size_per_gpu=8" in message


def test_a_micro_batch_holds_at_least_one_sample() -> None:
    message = refused(
        "trainer.max_tokens_per_micro_batch=100",
        "generator.max_input_length=90",
        "generator.sampling_params.max_generate_length=30",
    )
    assert "can't hold one sample" in message
    assert "= 120" in message


def test_the_built_in_data_has_at_least_one_step() -> None:
    message = refused("environment.arithmetic.num_train_prompts=8", "trainer.train_batch_size=16")
    assert "num_train_prompts=8 is less than trainer.train_batch_size=16" in message


def test_warm_up_that_never_ends_is_refused_where_the_steps_are_known() -> None:
    message = refused(
        "trainer.policy.optimizer_config.scheduler=cosine",
        "trainer.policy.optimizer_config.num_warmup_steps=20",
        "trainer.max_steps=5",
        "trainer.policy_mini_batch_size=128",
        "trainer.update_epochs_per_batch=2",
    )
    assert "the run has 10 optimizer steps" in message


# GPUs


def test_colocated_engines_take_exactly_the_policys_gpus() -> None:
    message = refused(
        *EIGHT[:2], "generator.num_inference_engines=3", "generator.inference_engine_tensor_parallel_size=2"
    )
    assert "1 nodes x 8 GPUs = 8" in message
    assert "3 engines x 2 GPUs" in message
    assert "= 6" in message
    assert "set generator.num_inference_engines=4" in message


def test_parallel_sizes_that_cannot_fit_get_no_impossible_advice() -> None:
    message = refused(*EIGHT[:2], "generator.inference_engine_tensor_parallel_size=3")
    assert "choose parallel sizes whose product divides 8" in message


def test_data_parallel_attention_takes_no_gpus_of_its_own() -> None:
    load_config(
        [
            *EIGHT[:2],
            "generator.inference_engine_tensor_parallel_size=8",
            "generator.inference_engine_data_parallel_size=8",
            "generator.attention.enable_dp_attention=true",
        ]
    )


def test_engines_beside_the_trainer_may_have_any_number_of_gpus() -> None:
    load_config([*EIGHT[:2], "trainer.placement.colocate_all=false", "generator.num_inference_engines=3"])


def test_tensor_parallel_must_divide_the_heads(tmp_path: Path) -> None:
    message = refused(
        *EIGHT[:2],
        with_model(tmp_path),
        "generator.inference_engine_tensor_parallel_size=8",
    )
    assert "does not divide the 14 attention heads" in message
    assert "possible: 1, 2, 7, 14" in message


def test_tensor_parallel_must_fit_the_key_value_heads(tmp_path: Path) -> None:
    message = refused(
        *EIGHT[:2],
        with_model(tmp_path, num_attention_heads=24, num_key_value_heads=6),
        "generator.inference_engine_tensor_parallel_size=8",
    )
    assert "neither divides nor is a multiple of the 6 key/value heads" in message


def test_the_embedded_engine_shares_the_trainers_gpus() -> None:
    assert "runs inside the trainer" in refused("trainer.placement.colocate_all=false")


# Context


def test_a_context_over_the_models_positions_is_refused(tmp_path: Path) -> None:
    message = refused(
        with_model(tmp_path),
        "generator.max_input_length=4000",
        "generator.sampling_params.max_generate_length=1000",
    )
    assert "a context of 5000 tokens" in message
    assert "4096 positions" in message


def test_a_set_context_must_hold_prompt_and_answer() -> None:
    message = refused("generator.max_model_len=50", "generator.max_input_length=64")
    assert "generator.max_model_len=50" in message


# Algorithm and sampling


def test_other_strategies_are_refused_with_the_reason() -> None:
    message = refused("trainer.strategy=megatron")
    assert "only fsdp2" in message
    assert "shards in place" in message


def test_the_kl_counts_once() -> None:
    # use_kl_in_reward is not built yet, which is said first; the rule is there for the day it lands.
    from skyrl_train.config.check_training import kl
    from skyrl_train.config.findings import Checked

    loaded = load_config(["trainer.algorithm.use_kl_loss=true"])
    trainer = loaded.config.trainer
    both = trainer.algorithm.model_copy(update={"use_kl_in_reward": True})
    config = loaded.config.model_copy(update={"trainer": trainer.model_copy(update={"algorithm": both})})
    findings = list(kl(Checked(config=config, sources=loaded.sources, engine_release="0.5.23")))
    assert [finding.is_error for finding in findings] == [True]
    assert "count twice" in findings[0].message


def test_kl_keys_without_a_kl_warn() -> None:
    assert "kl_loss_coef=0.1" in warned("trainer.algorithm.kl_loss_coef=0.1")
    assert warned("trainer.algorithm.kl_loss_coef=0.1", "trainer.algorithm.use_kl_loss=true") == ""


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("trainer.algorithm.advantage_estimator=grop", "grpo"),
        ("trainer.algorithm.policy_loss_type=dualclip", "dual_clip"),
        ("trainer.logger=[tensorbord]", "tensorboard"),
    ],
)
def test_unknown_names_get_the_nearest(override: str, meant: str) -> None:
    assert f"did you mean {meant}?" in refused(override)


def test_a_dotted_path_is_a_name_of_the_users_own() -> None:
    config = load_config(["trainer.algorithm.advantage_estimator=my.module.advantages"]).config
    assert config.trainer.algorithm.advantage_estimator == "my.module.advantages"


def test_a_group_of_one_teaches_nothing() -> None:
    assert "a group of one has advantage 0" in refused("generator.n_samples_per_prompt=1")


def test_a_group_of_one_is_left_to_an_agent_that_brings_branches() -> None:
    agent = "generator.agent=skyrl_train.rollout.tree_search.TreeSearch"
    config = load_config(["generator.n_samples_per_prompt=1", agent])
    assert any("branches of its own, as tree search does" in warning for warning in config.warnings)


def test_greedy_rollouts_teach_nothing() -> None:
    assert "is greedy" in refused("generator.sampling_params.temperature=0")


def test_truncated_sampling_warns_that_it_is_another_distribution() -> None:
    message = warned("generator.sampling_params.top_p=0.8", "generator.sampling_params.top_k=20")
    assert "generator.sampling_params.top_p=0.8, generator.sampling_params.top_k=20" in message


def test_more_tokens_than_there_may_be_are_refused() -> None:
    assert "min_new_tokens=99 is over" in refused("generator.sampling_params.min_new_tokens=99")


def test_an_empty_stop_text_is_refused() -> None:
    assert "empty text" in refused("generator.sampling_params.stop=['']")


def test_repeated_greedy_evaluation_warns() -> None:
    assert "the same answer each time" in warned("generator.eval_n_samples_per_prompt=4")


# Data and resuming


def test_an_environment_without_data_needs_files() -> None:
    assert "data.train_data is empty" in refused("environment.env_class=gsm8k")


def test_nothing_to_evaluate_on_warns() -> None:
    assert "data.val_data is empty" in warned("environment.env_class=gsm8k", "data.train_data=[a.jsonl]")


def test_resuming_from_a_path_needs_the_path_and_the_other_way_round() -> None:
    assert "needs trainer.resume_path" in refused("trainer.resume_mode=from_path")
    assert "from_path only" in refused("trainer.resume_path=x")


def test_quickstart_numbers_with_a_real_model_warn() -> None:
    message = warned("trainer.policy.model.path=Qwen/Qwen2.5-0.5B")
    assert "trainer.policy.optimizer_config.lr=" in message
    assert "tuned for the built-in tiny model" in message


# Engines


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (("generator.weight_sync_backend=nccl",), "runs the trainer's own tensors"),
        ((*SGLANG, "generator.weight_sync_backend=local"), "a process of its own"),
        ((*SGLANG, "generator.weight_sync_backend=nccl"), "needs GPUs"),
        ((*EIGHT, "generator.weight_sync_backend=nccl"), "can't join two processes on one GPU"),
        (
            (*EIGHT, "trainer.placement.colocate_all=false", "generator.weight_sync_backend=cuda_ipc"),
            "needs trainer.placement.colocate_all=true",
        ),
        (
            (*SGLANG, "generator.use_overlapped_weight_sync=true", "generator.weight_sync_backend=gloo"),
            "needs weight_sync_backend=disk, found gloo",
        ),
        (
            (
                *SGLANG,
                "generator.weight_sync_backend=gloo",
                "generator.inference_engine_data_parallel_size=2",
            ),
            "found pipeline and data parallel sizes 1 and 2",
        ),
    ],
)
def test_weight_sync_that_cannot_work_is_refused(argv: tuple[str, ...], why: str) -> None:
    assert why in refused(*argv)


def test_remote_engines_need_one_url_each() -> None:
    remote = (*SGLANG, "generator.run_engines_locally=false", "trainer.placement.colocate_all=false")
    assert "found 1 generator.remote_inference_engine_urls" in refused(
        *remote, "generator.num_inference_engines=2", "generator.remote_inference_engine_urls=['a:1']"
    )
    load_config([*remote, "generator.remote_inference_engine_urls=['a:1']"])
    assert "needs generator.run_engines_locally=false" in refused(
        *SGLANG, "generator.remote_inference_engine_urls=['a:1']"
    )


def test_the_embedded_engine_has_the_trainers_type() -> None:
    assert "they have one type" in refused("generator.model_dtype=bfloat16")
    load_config(["trainer.policy.model.dtype=bfloat16"])


def test_the_embedded_engine_holds_a_token_for_each_request() -> None:
    assert "can't hold one token for each" in refused("generator.max_num_batched_tokens=100")


def test_the_embedded_engine_leaves_memory_to_the_trainer() -> None:
    assert "set less than 1" in refused("generator.gpu_memory_utilization=1.0")


def test_fused_kernels_want_a_gpu() -> None:
    assert "cuda_kernels=fused wants a GPU" in refused("generator.engine_init_kwargs.cuda_kernels=fused")
    load_config(["generator.engine_init_kwargs.cuda_kernels=plain"])


def test_the_embedded_engines_kwargs_are_known() -> None:
    load_config(["generator.engine_init_kwargs.kv_cache_tokens=4096"])
    assert "the embedded engine takes" in refused("generator.engine_init_kwargs.kv_tokens=4096")


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (("generator.multi_node.nnodes=2",), "needs generator.multi_node.dist_init_addr"),
        (("generator.multi_node.node_rank=1",), "must be under generator.multi_node.nnodes=1"),
        (("generator.lora.enabled=true", "generator.lora.max_loaded_loras=2"), "is under"),
        (
            ("generator.lora.enabled=true", "generator.lora.overlap_loading=true"),
            "at most 2 x max_loras_per_batch = 16",
        ),
        (("generator.metrics.export_to_file.enabled=true",), "needs generator.metrics.export_to_file.directory"),
        (
            ("generator.metrics.enabled=true", "generator.metrics.buckets.time_to_first_token=[0.1,0.1]"),
            "must rise",
        ),
        (
            ("generator.hierarchical_cache.enabled=true", "generator.enable_prefix_caching=false"),
            "generator.enable_prefix_caching=false",
        ),
        (
            (
                "generator.hierarchical_cache.enabled=true",
                "generator.hierarchical_cache.ratio=2",
                "generator.hierarchical_cache.size_gb=8",
            ),
            "both size the host pool",
        ),
        (("generator.kv_cache.quantization_param_path=s.json",), "scales an fp8 cache"),
        (
            ("generator.cuda_graph.disable_padding=true", "generator.torch_compile.enabled=true"),
            "does not go with generator.torch_compile.enabled",
        ),
        (
            ("generator.cuda_graph.config={decode: {max_bs: 8}}", "generator.cuda_graph.max_bs_decode=16"),
            "write the same settings",
        ),
        (
            ("generator.deterministic_inference.enabled=true", "generator.attention.backend=torch_native"),
            "is not batch-invariant",
        ),
    ],
)
def test_server_options_that_contradict_each_other(overrides: tuple[str, ...], why: str) -> None:
    assert why in refused(*SGLANG, *overrides)


def test_all_contradictions_are_listed_at_once() -> None:
    message = refused("generator.n_samples_per_prompt=1", "generator.sampling_params.temperature=0")
    assert "2 settings contradict" in message


def test_the_embedded_engines_kwargs_are_those_that_have_no_key() -> None:
    from dataclasses import fields

    from skyrl_train.config.check_engine import EMBEDDED_KWARGS
    from skyrl_train.engines.embedded.config import EmbeddedConfig

    with_keys = {
        "max_num_seqs",
        "max_num_batched_tokens",
        "max_context_len",
        "kv_cache_frac",
        "deterministic",
        "enable_prefix_caching",
        "host_cache_gb",
        "host_cache_ratio",
        "seed",
        "grammar_backend",
        "json_whitespace",
        "logit_processors",
        "low_priority_values_first",
        "preemption_threshold",
        "scheduling_policy",
        "lora",
    }
    assert {field.name for field in fields(EmbeddedConfig)} - with_keys == set(EMBEDDED_KWARGS)
