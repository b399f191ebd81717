"""How many GPUs each role takes, and whether the numbers add up."""

from __future__ import annotations

from dataclasses import dataclass

from skyrl_train.config.schema import Config


@dataclass(frozen=True, kw_only=True)
class GpuCount:
    """GPUs of each role; `total` counts shared ones once. All 0 is a run on the CPU."""

    policy: int
    ref: int
    critic: int
    engines: int
    total: int
    colocated: bool

    def __str__(self) -> str:
        roles = {"policy": self.policy, "reference": self.ref, "critic": self.critic, "engines": self.engines}
        text = ", ".join(f"{role} {count}" for role, count in roles.items() if count)
        return f"{text}, sharing the same ones" if self.colocated and self.engines and self.policy else text


def needs_reference(config: Config) -> bool:
    return config.trainer.algorithm.use_kl_loss or config.trainer.algorithm.use_kl_in_reward


def needs_critic(config: Config) -> bool:
    return config.trainer.algorithm.advantage_estimator == "gae"


def gpus_per_engine(config: Config) -> int:
    """With data-parallel attention the copies live inside the tensor-parallel group and take no GPUs of their own."""
    generator = config.generator
    copies = 1 if generator.attention.enable_dp_attention else generator.inference_engine_data_parallel_size
    return generator.inference_engine_tensor_parallel_size * generator.inference_engine_pipeline_parallel_size * copies


def count_gpus(config: Config) -> GpuCount:
    placement, generator = config.trainer.placement, config.generator
    policy = placement.policy_num_nodes * placement.policy_num_gpus_per_node
    if policy == 0:
        # The trainer is on the CPU, and so are its engines: a GPU for the engines alone is not planned for.
        return GpuCount(policy=0, ref=0, critic=0, engines=0, total=0, colocated=placement.colocate_all)
    ref = placement.ref_num_nodes * (placement.ref_num_gpus_per_node or 0) if needs_reference(config) else 0
    critic = placement.critic_num_nodes * (placement.critic_num_gpus_per_node or 0) if needs_critic(config) else 0
    if generator.backend == "embedded":
        engines = policy
    else:
        engines = generator.num_inference_engines * gpus_per_engine(config) if generator.run_engines_locally else 0
    if placement.colocate_all or generator.backend == "embedded":
        total = max(policy, ref, critic, engines)
    else:
        total = policy + critic + engines + (0 if placement.colocate_policy_ref else ref)
    return GpuCount(
        policy=policy, ref=ref, critic=critic, engines=engines, total=total, colocated=placement.colocate_all
    )


def take_turns(config: Config) -> bool:
    """Whether a server and the trainer share GPUs: one sleeps while the other works."""
    placement = config.trainer.placement
    return bool(
        config.generator.backend != "embedded" and placement.colocate_all and placement.policy_num_gpus_per_node
    )
