"""The KL in the reward: each token's reward loses coefficient x KL, the trajectory's score their sum."""

from __future__ import annotations

import math

import pytest
import torch

from skyrl_train.algorithms.advantages import AdvantageInputs
from skyrl_train.algorithms.kl import k1, k3
from skyrl_train.training.experience import ExperienceMaker, KlInReward
from skyrl_train.training.optimizer import OptimizerSettings
from skyrl_train.training.trainer import PolicyTrainer
from skyrl_train.types import Completion, Prompt, ScoredGroup, Trajectory, TrajectoryId, Turn, VersionSpan
from tests.tiny import make_model

PROMPTS = ((5, 6, 7), (8, 9))
ANSWERS = ((1, 2, 3), (4,)), ((11, 12), (13, 14, 15, 16))


def make_groups() -> list[ScoredGroup]:
    """Two prompts with two answers each; the first answer of each earns 1."""
    groups = []
    for p, (prompt, answers) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        trajectories = tuple(
            Trajectory(
                id=TrajectoryId(prompt_id=str(p), sample=s),
                turns=(
                    Turn(
                        prompt_token_ids=prompt,
                        completion=Completion(
                            request_id=f"{p}/{s}",
                            token_ids=answer,
                            logprobs=(-1.0,) * len(answer),
                            finish_reason="stop",
                            versions=(VersionSpan(version=0, start=0, end=len(answer)),),
                        ),
                    ),
                ),
                rewards=(float(s == 0),),
                status="completed",
            )
            for s, answer in enumerate(answers)
        )
        groups.append(
            ScoredGroup(
                prompt=Prompt(prompt_id=str(p), messages=(), environment="none"),
                trajectories=trajectories,
                rewards=tuple(t.reward for t in trajectories),
            )
        )
    return groups


def plain_logprobs(seed: int, temperature: float) -> list[float]:
    """Of all answers' tokens, one after the other, by transformers alone."""
    model = make_model(seed=seed, attn_implementation="eager")
    found = []
    for prompt, answers in zip(PROMPTS, ANSWERS, strict=True):
        for answer in answers:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + answer])).logits[0] / temperature
            found += [
                float(torch.log_softmax(logits[len(prompt) + i - 1], -1)[token]) for i, token in enumerate(answer)
            ]
    return found


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", ["k1", "k3"])
def test_each_token_pays_its_own_kl_and_the_score_pays_all(name: str, temperature: float) -> None:
    seen: list[AdvantageInputs] = []

    def rewards_as_advantages(inputs: AdvantageInputs) -> torch.Tensor:
        seen.append(inputs)
        return inputs.rewards

    trainer = PolicyTrainer(
        make_model(seed=0), OptimizerSettings(lr=1e-3), reference=make_model(seed=1), temperature=temperature
    )
    maker = ExperienceMaker(
        estimator=rewards_as_advantages,
        trainer=trainer,
        kl=KlInReward(estimator={"k1": k1, "k3": k3}[name], coefficient=lambda: 0.5),
        max_tokens_per_micro_batch=20,
    )
    experience = maker(make_groups())

    policy, reference = plain_logprobs(0, temperature), plain_logprobs(1, temperature)
    if name == "k1":
        kl = [p - r for p, r in zip(policy, reference, strict=True)]
    else:
        kl = [math.exp(r - p) - 1 - (r - p) for p, r in zip(policy, reference, strict=True)]
    earned = [0, 0, 1, 0, 0, 1, 0, 0, 0, 0]
    wanted = [e - 0.5 * k for e, k in zip(earned, kl, strict=True)]
    (inputs,) = seen
    assert inputs.rewards.tolist() == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    bounds = [(0, 3), (3, 4), (4, 6), (6, 10)]
    assert inputs.scores.tolist() == pytest.approx([sum(wanted[a:b]) for a, b in bounds], rel=1e-4, abs=1e-5)
    tokens = torch.cat([sample.advantages[sample.loss_mask] for sample in experience.samples])
    assert tokens.tolist() == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    assert experience.metrics["reward/kl_cost_mean"] == pytest.approx(0.5 * sum(kl) / 10, rel=1e-4)


def test_the_coefficient_is_asked_for_each_batch() -> None:
    coefficients = iter([0.0, 2.0])
    trainer = PolicyTrainer(make_model(seed=0), OptimizerSettings(lr=1e-3), reference=make_model(seed=1))
    maker = ExperienceMaker(
        estimator=lambda inputs: inputs.rewards,
        trainer=trainer,
        kl=KlInReward(estimator=k3, coefficient=lambda: next(coefficients)),
        max_tokens_per_micro_batch=20,
    )
    costs = [maker(make_groups()).metrics["reward/kl_cost_mean"] for _ in range(2)]
    assert costs[0] == 0 and costs[1] > 0
