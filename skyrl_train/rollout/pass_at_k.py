"""pass@k: the chance that at least one of k answers to a prompt is right."""

from __future__ import annotations

from math import comb

from skyrl_train.rollout.groups import Rollouts


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Unbiased from n >= k samples: 1 - C(n - c, k) / C(n, k). Chen et al. (arXiv:2107.03374), equation 1.

    n 4, c 1, k 2: 3 of the 6 pairs have the right one, 0.5. (1 - (1 - c / n)^k would say 0.4375.)
    """
    if not 0 <= num_right <= num_samples or not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} needs 0 <= right <= samples and k <= samples, found {num_right} of {num_samples}")
    return 1 - comb(num_samples - num_right, k) / comb(num_samples, k)


def pass_at_k_metrics(rollouts: Rollouts, *, num_samples: int, full_reward: float = 1.0) -> dict[str, float]:
    """`eval/pass_at_<k>`, the mean over prompts, for k = 1, 2, 4, ... up to `num_samples`, which is included.

    A trajectory is right when its score, all turns together, reaches `full_reward`; one that failed is not.
    """
    right: dict[str, int] = {group.prompt.prompt_id: 0 for group in (*rollouts.groups, *rollouts.failed)}
    for group in rollouts.groups:
        right[group.prompt.prompt_id] += sum(reward >= full_reward for reward in group.rewards)
    if not right:
        return {}
    powers = [2**i for i in range(num_samples.bit_length()) if 2**i < num_samples]
    return {
        f"eval/pass_at_{k}": sum(pass_at_k(num_samples, count, k) for count in right.values()) / len(right)
        for k in (*powers, num_samples)
    }
