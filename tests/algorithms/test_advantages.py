"""Advantages against slow scalar references: one trajectory, one token at a time, on ragged masks."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl_train.algorithms.advantages import ADVANTAGE_ESTIMATORS, AdvantageInputs, gae, grpo, remax, rloo
from skyrl_train.algorithms.advantages import reinforce_plus_plus as rpp
from skyrl_train.algorithms.advantages import reinforce_plus_plus_baseline as rpp_baseline
from skyrl_train.algorithms.normalize import normalize
from skyrl_train.algorithms.scan import scan_backwards


@dataclass(frozen=True, kw_only=True)
class Walk:
    """A trajectory, token by token: (loss mask, reward, value). Rewards and values of masked tokens are noise."""

    group: int
    tokens: tuple[tuple[bool, float, float], ...]
    baseline: float = 0.0

    @property
    def sampled(self) -> list[tuple[float, float]]:
        return [(reward, value) for mask, reward, value in self.tokens if mask]

    @property
    def score(self) -> float:
        return sum(reward for reward, _ in self.sampled)


def inputs_of(walks: Sequence[Walk]) -> AdvantageInputs:
    return AdvantageInputs(
        rewards=torch.tensor([reward for walk in walks for reward, _ in walk.sampled]),
        scores=torch.tensor([walk.score for walk in walks]),
        trajectory_index=torch.tensor([i for i, w in enumerate(walks) for _ in w.sampled], dtype=torch.int64),
        group_index=torch.tensor([walk.group for walk in walks], dtype=torch.int64),
        values=torch.tensor([value for walk in walks for _, value in walk.sampled]),
        baselines=torch.tensor([walk.baseline for walk in walks]),
    )


def outcomes(scores: Sequence[float], groups: Sequence[int], **more: torch.Tensor) -> AdvantageInputs:
    """One token a trajectory."""
    return AdvantageInputs(
        rewards=torch.tensor(scores),
        scores=torch.tensor(scores),
        trajectory_index=torch.arange(len(scores)),
        group_index=torch.tensor(groups, dtype=torch.int64),
        **more,
    )


# Scalar references: per trajectory and sampled token


def slow_compared(walks: Sequence[Walk], kind: str) -> list[list[float]]:
    found = []
    for walk in walks:
        mine = [w.score for w in walks if w.group == walk.group]
        advantage = 0.0
        if len(set(mine)) > 1:
            advantage = walk.score - statistics.fmean(mine)
            if kind == "std":
                advantage /= statistics.stdev(mine) + 1e-6
            if kind == "leave_one_out":
                others = list(mine)
                others.remove(walk.score)
                advantage = walk.score - statistics.fmean(others)
        found.append([advantage] * len(walk.sampled))
    return found


def slow_to_go(walks: Sequence[Walk], gamma: float) -> list[list[float]]:
    return [
        [sum(gamma ** (u - t) * walk.sampled[u][0] for u in range(t, n)) for t in range(n)]
        for walk in walks
        for n in [len(walk.sampled)]
    ]


def slow_gae(walks: Sequence[Walk], gamma: float, lambd: float) -> list[list[float]]:
    """The sum of equation 16, written out: A_t = sum over u >= t of (gamma lambd)^(u - t) delta_u."""
    found = []
    for walk in walks:
        steps = walk.sampled
        values = [value for _, value in steps] + [0.0]
        deltas = [reward + gamma * values[t + 1] - values[t] for t, (reward, _) in enumerate(steps)]
        found.append(
            [sum((gamma * lambd) ** (u - t) * deltas[u] for u in range(t, len(steps))) for t in range(len(steps))]
        )
    return found


def slow_normalized(rows: list[list[float]]) -> list[list[float]]:
    flat = [value for row in rows for value in row]
    if len(set(flat)) <= 1:
        return [[0.0] * len(row) for row in rows]
    mean, std = statistics.fmean(flat), statistics.pstdev(flat)
    return [[(value - mean) / (std + 1e-8) for value in row] for row in rows]


REFERENCES: dict[
    str, tuple[Callable[[AdvantageInputs], torch.Tensor], Callable[[Sequence[Walk]], list[list[float]]]]
] = {
    "grpo": (grpo, lambda w: slow_compared(w, "std")),
    "dr_grpo": (lambda x: grpo(x, grpo_norm_by_std=False), lambda w: slow_compared(w, "mean")),
    "rloo": (rloo, lambda w: slow_compared(w, "leave_one_out")),
    "remax": (remax, lambda w: [[walk.score - walk.baseline] * len(walk.sampled) for walk in w]),
    "reinforce++": (lambda x: rpp(x, gamma=0.9), lambda w: slow_normalized(slow_to_go(w, 0.9))),
    "reinforce++_baseline": (rpp_baseline, lambda w: slow_normalized(slow_compared(w, "mean"))),
    "gae": (lambda x: gae(x, gamma=0.9, lambd=0.8), lambda w: slow_gae(w, 0.9, 0.8)),
}

eighths = st.integers(-16, 16).map(lambda n: n / 8)  # exact in float32, so that equal scores are equal in both
walks_of = st.lists(
    st.builds(
        Walk,
        group=st.integers(0, 3),
        tokens=st.lists(st.tuples(st.booleans(), eighths, eighths), max_size=7).map(tuple),
        baseline=eighths,
    ),
    min_size=1,
    max_size=9,
)


@pytest.mark.parametrize("name", REFERENCES)
@settings(deadline=None, max_examples=60)
@given(walks_of)
def test_ragged_trajectories_equal_the_scalar_reference(name: str, walks: list[Walk]) -> None:
    estimator, reference = REFERENCES[name]
    found = estimator(inputs_of(walks))
    assert found.dtype == torch.float32
    wanted = torch.tensor([value for row in reference(walks) for value in row])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", REFERENCES)
@settings(deadline=None, max_examples=40)
@given(walks_of, st.randoms(use_true_random=False))
def test_the_order_of_trajectories_does_not_matter(name: str, walks: list[Walk], random: object) -> None:
    estimator, _ = REFERENCES[name]
    order = list(range(len(walks)))
    random.shuffle(order)  # type: ignore[attr-defined]
    sizes = [len(walk.sampled) for walk in walks]
    before = estimator(inputs_of(walks)).split(sizes)
    after = estimator(inputs_of([walks[i] for i in order])).split([sizes[i] for i in order])
    for place, i in enumerate(order):
        torch.testing.assert_close(after[place], before[i], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", REFERENCES)
@settings(deadline=None, max_examples=40)
@given(walks_of, st.data())
def test_observations_are_as_if_they_were_not_there(name: str, walks: list[Walk], data: st.DataObject) -> None:
    """Wherever they stand, at the place where one turn ends and the next begins or in another sequence."""
    noise = (False, 1e6, -1e6)
    longer = []
    for walk in walks:
        at = data.draw(st.integers(0, len(walk.tokens)))
        longer.append(replace(walk, tokens=walk.tokens[:at] + (noise,) * 3 + walk.tokens[at:]))
    estimator, _ = REFERENCES[name]
    assert torch.equal(estimator(inputs_of(longer)), estimator(inputs_of(walks)))


@pytest.mark.parametrize("estimator", [grpo, rloo, rpp_baseline])
@settings(deadline=None, max_examples=40)
@given(walks_of, eighths)
def test_a_baseline_of_the_group_takes_out_what_all_its_members_got(
    estimator: Callable[[AdvantageInputs], torch.Tensor], walks: list[Walk], shift: float
) -> None:
    inputs = inputs_of(walks)
    shifted = replace(inputs, scores=inputs.scores + shift * (inputs.group_index + 1))
    torch.testing.assert_close(estimator(shifted), estimator(inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("estimator", [grpo, rloo])
@settings(deadline=None, max_examples=40)
@given(walks_of)
def test_other_groups_change_nothing(estimator: Callable[[AdvantageInputs], torch.Tensor], walks: list[Walk]) -> None:
    alone = [walk for walk in walks if walk.group == walks[0].group]
    among = estimator(inputs_of(walks)).split([len(walk.sampled) for walk in walks])
    found = torch.cat([row for row, walk in zip(among, walks, strict=True) if walk.group == walks[0].group])
    torch.testing.assert_close(found, estimator(inputs_of(alone)), rtol=1e-5, atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(walks_of)
def test_advantages_of_a_group_add_up_to_0(walks: list[Walk]) -> None:
    one_token = [Walk(group=walk.group, tokens=((True, walk.score, 0.0),)) for walk in walks]
    for estimator in (grpo, rloo):
        sums = torch.zeros(4).index_add_(0, inputs_of(one_token).group_index, estimator(inputs_of(one_token)))
        torch.testing.assert_close(sums, torch.zeros(4), rtol=0, atol=1e-4)


# By hand


def test_grpo_of_four_answers_by_hand() -> None:
    inputs = outcomes([1.0, 0, 0, 1, 5], [0, 0, 0, 0, 1])
    # mean 1/2, squared distances 4 * 1/4, over n - 1 = 3: std = sqrt(1/3), advantage = 0.5 * sqrt(3)
    torch.testing.assert_close(grpo(inputs), torch.tensor([0.866, -0.866, -0.866, 0.866, 0]), rtol=0, atol=1e-3)
    assert grpo(inputs, grpo_norm_by_std=False).tolist() == [0.5, -0.5, -0.5, 0.5, 0.0]


def test_rloo_of_four_answers_by_hand() -> None:
    # For a right answer the others have (0 + 0 + 1) / 3, for a wrong one (1 + 0 + 1) / 3.
    found = rloo(outcomes([1.0, 0, 0, 1, 5], [0, 0, 0, 0, 1]))
    torch.testing.assert_close(found, torch.tensor([2 / 3, -2 / 3, -2 / 3, 2 / 3, 0]))


def test_remax_by_hand_and_without_greedy_answers() -> None:
    found = remax(outcomes([1.0, 0.0, 1.0], [0, 0, 1], baselines=torch.tensor([1.0, 1.0, 0.25])))
    assert found.tolist() == [0.0, -1.0, 0.75]
    with pytest.raises(ValueError, match=r"greedy answer, and no baselines were given"):
        remax(outcomes([1.0], [0]))


def test_reinforce_plus_plus_by_hand() -> None:
    inputs = AdvantageInputs(
        rewards=torch.tensor([0.0, 0, 1, 0, -1]),
        scores=torch.tensor([1.0, -1.0]),
        trajectory_index=torch.tensor([0, 0, 0, 1, 1]),
        group_index=torch.tensor([0, 1]),
    )
    to_go = [0.25, 0.5, 1.0, -0.5, -1.0]
    assert scan_backwards(inputs.rewards, inputs.trajectory_index, 0.5).tolist() == to_go
    # mean 0.05; squares 0.04 + 0.2025 + 0.9025 + 0.3025 + 1.1025 = 2.55, over 5: std sqrt(0.51)
    wanted = torch.tensor([0.2, 0.45, 0.95, -0.55, -1.05]) / 0.51**0.5
    torch.testing.assert_close(rpp(inputs, gamma=0.5), wanted)


def test_reinforce_plus_plus_baseline_shares_one_deviation_between_groups() -> None:
    # centred 1 -1 | 0.5 -0.5: mean 0, squares 1 1 .25 .25 over 4 = 0.625
    found = rpp_baseline(outcomes([4.0, 2.0, 1.0, 0.0], [0, 0, 1, 1]))
    torch.testing.assert_close(found, torch.tensor([1.0, -1.0, 0.5, -0.5]) / 0.625**0.5)
    torch.testing.assert_close(
        grpo(outcomes([4.0, 2.0, 1.0, 0.0], [0, 0, 1, 1])), torch.tensor([1.0, -1, 1, -1]) / 2**0.5, rtol=1e-5, atol=0
    )


def test_gae_of_two_trajectories_by_hand() -> None:
    inputs = AdvantageInputs(
        rewards=torch.tensor([0.0, 1.0, 2.0]),
        scores=torch.tensor([1.0, 2.0]),
        trajectory_index=torch.tensor([0, 0, 1]),
        group_index=torch.tensor([0, 0]),
        values=torch.tensor([0.5, 0.25, 4.0]),
    )
    # deltas 0 + .25 - .5, 1 + 0 - .25 | 2 + 0 - 4: the second trajectory's value is not the first one's next
    assert gae(inputs, lambd=0.5).tolist() == [0.125, 0.75, -2.0]
    assert gae(inputs, lambd=0.0).tolist() == [-0.25, 0.75, -2.0]
    # lambd 1: rewards to go minus values
    assert gae(inputs).tolist() == [0.5, 0.75, -2.0]
    # gamma 0.5, lambd 1: first delta 0 + 0.125 - 0.5
    assert gae(inputs, gamma=0.5).tolist() == [0.0, 0.75, -2.0]


def test_gae_without_a_critic_says_so() -> None:
    with pytest.raises(ValueError, match="critic's values"):
        gae(outcomes([1.0], [0]))


@settings(deadline=None, max_examples=40)
@given(walks_of)
def test_a_perfect_critic_leaves_no_advantage(walks: list[Walk]) -> None:
    to_go = torch.tensor([value for row in slow_to_go(walks, 0.9) for value in row])
    found = gae(replace(inputs_of(walks), values=to_go), gamma=0.9, lambd=0.7)
    torch.testing.assert_close(found, torch.zeros(len(to_go)), rtol=0, atol=1e-5)


def test_a_long_trajectory_keeps_float64s_digits() -> None:
    """Summed up in float32 one after the other, these 20000 would be wrong in the fifth digit."""
    rewards = torch.full((20_000,), 0.1)
    found = gae(
        AdvantageInputs(
            rewards=rewards,
            scores=rewards.sum(0, keepdim=True),
            trajectory_index=torch.zeros(20_000, dtype=torch.int64),
            group_index=torch.zeros(1, dtype=torch.int64),
            values=torch.zeros(20_000),
        )
    )
    exact = float(rewards[0].double()) * 20_000
    assert float(found[0]) == pytest.approx(exact, rel=1e-7)


@pytest.mark.parametrize("estimator", [grpo, rloo, rpp_baseline, lambda x: grpo(x, grpo_norm_by_std=False)])
@pytest.mark.parametrize("reward", [0.0, 0.1, 1e9, -3.3])
def test_a_group_that_agrees_has_advantage_exactly_0(
    estimator: Callable[[AdvantageInputs], torch.Tensor], reward: float
) -> None:
    for size in (1, 3, 7):
        assert estimator(outcomes([reward] * size, [0] * size)).tolist() == [0.0] * size


def test_a_trajectory_without_a_loss_token_still_counts_in_the_baseline() -> None:
    inputs = AdvantageInputs(
        rewards=torch.tensor([1.0]),
        scores=torch.tensor([1.0, 0.0]),
        trajectory_index=torch.tensor([0]),
        group_index=torch.tensor([0, 0]),
    )
    assert grpo(inputs, grpo_norm_by_std=False).tolist() == [0.5]
    assert rloo(inputs).tolist() == [1.0]


@pytest.mark.parametrize("name", ADVANTAGE_ESTIMATORS)
def test_no_samples_have_no_advantages(name: str) -> None:
    none = outcomes([], [], values=torch.zeros(0), baselines=torch.zeros(0))
    none = replace(none, rewards=torch.zeros(0), scores=torch.zeros(0))
    assert ADVANTAGE_ESTIMATORS[name](none).shape == (0,)


def test_scores_per_token_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must be \[B\]"):
        AdvantageInputs(
            rewards=torch.zeros(3),
            scores=torch.zeros(2, 3),
            trajectory_index=torch.zeros(3, dtype=torch.int64),
            group_index=torch.zeros(2, dtype=torch.int64),
        )


# Over the batch


def test_normalized_by_hand() -> None:
    # mean 2, squares 1 1 1 9 over 4 = 3
    found = normalize(torch.tensor([1.0, 1.0, 1.0, 5.0]))
    torch.testing.assert_close(found, torch.tensor([-1.0, -1, -1, 3], dtype=torch.float64) / 3**0.5)
    assert normalize(torch.full((3,), 0.1)).tolist() == [0.0] * 3
    assert normalize(torch.zeros(0)).shape == (0,)


def test_every_token_weighs_the_same_in_the_normalization() -> None:
    """Not every trajectory: three tokens of one and one of another have the mean (3 * 1 + 5) / 4."""
    inputs = AdvantageInputs(
        rewards=torch.tensor([0.0, 0, 1, 5]),
        scores=torch.tensor([1.0, 5.0]),
        trajectory_index=torch.tensor([0, 0, 0, 1]),
        group_index=torch.tensor([0, 1]),
    )
    torch.testing.assert_close(rpp(inputs), torch.tensor([-1.0, -1, -1, 3]) / 3**0.5)
