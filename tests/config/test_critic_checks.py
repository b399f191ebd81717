"""Keys of the critic and of host memory: what contradicts is refused, what has no effect is said."""

from __future__ import annotations

import pytest

from skyrl_train.config import ConfigError, load_config

GAE = "trainer.algorithm.advantage_estimator=gae"
ON_A_GPU = "trainer.placement.policy_num_gpus_per_node=1"


def refused(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(list(argv))
    return str(caught.value)


def warned(*argv: str) -> str:
    return "\n".join(load_config(list(argv)).warnings)


@pytest.mark.parametrize(
    "override",
    [
        "trainer.critic.optimizer_config.lr=1e-4",
        "trainer.critic.model.path=other",
        "trainer.critic_mini_batch_size=32",
        "trainer.algorithm.value_clip=0.5",
        "trainer.algorithm.lambd=0.95",
        "trainer.algorithm.gamma=0.99",
    ],
)
def test_a_key_of_the_critic_without_a_critic_has_no_effect_and_says_so(override: str) -> None:
    path = override.split("=")[0]
    assert f"{path}=" in warned(override) and "advantage_estimator=gae, found grpo" in warned(override)
    assert path not in warned(override, GAE)


def test_an_estimator_of_ones_own_may_read_gamma_and_lambda() -> None:
    own = "trainer.algorithm.advantage_estimator=my.module.estimator"
    assert "lambd" not in warned(own, "trainer.algorithm.lambd=0.95")


def test_the_critics_mini_batch_must_divide_the_batch() -> None:
    message = refused(GAE, "trainer.train_batch_size=30", "trainer.critic_mini_batch_size=8")
    assert "trainer.critic_mini_batch_size=8" in message and "6 prompts of each step would be left over" in message


def test_the_critic_runs_where_the_policy_does() -> None:
    assert "the critic runs where the policy does, on 1 x 0 GPUs" in refused(
        GAE, "trainer.placement.critic_num_gpus_per_node=1"
    )
    assert "not built yet: training on several GPUs" in refused(GAE, "trainer.placement.critic_num_nodes=2")


def test_the_critics_warm_up_leaves_steps_for_its_schedule() -> None:
    message = refused(
        GAE,
        "trainer.max_steps=2",
        "trainer.critic.optimizer_config.scheduler=linear",
        "trainer.critic.optimizer_config.num_warmup_steps=50",
    )
    assert "trainer.critic.optimizer_config.num_warmup_steps=50 leaves nothing" in message


@pytest.mark.parametrize(
    "override",
    [
        "trainer.policy.optimizer_config.offload_after_step=true",
        "trainer.critic.optimizer_config.offload_after_step=true",
        "trainer.ref.offload_after_forward=true",
    ],
)
def test_host_memory_on_the_cpu_has_no_effect_and_says_so(override: str) -> None:
    with_all = (GAE, "trainer.algorithm.use_kl_loss=true")
    path = override.split("=")[0]
    assert f"{path}=true" in warned(override, *with_all)
    assert "in host memory already" in warned(override, *with_all)
    assert path not in warned(override, *with_all, ON_A_GPU)


def test_the_kl_controllers_keys_are_read_where_there_is_a_kl_to_steer() -> None:
    target, in_reward = "trainer.algorithm.kl_ctrl.kl_target=0.5", "trainer.algorithm.use_kl_in_reward=true"
    adaptive = "trainer.algorithm.kl_ctrl.type=adaptive"
    assert "kl_target=0.5" in warned(target) and "neither trainer.algorithm.use_kl_loss" in warned(target)
    assert "kl_ctrl.type is fixed" in warned(target, in_reward)
    assert "kl_target" not in warned(target, in_reward, adaptive)
    assert "can't be steered" in refused(in_reward, adaptive, "trainer.algorithm.kl_loss_coef=0")
