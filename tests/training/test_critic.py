"""The critic: which state a value belongs to, gradients that ignore the cut, states that go on to the bit."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from skyrl_train.algorithms.objective import PolicyObjective
from skyrl_train.data.pack import pack
from skyrl_train.errors import CheckpointError, ConfigError
from skyrl_train.training.critic import CriticTrainer, ValueNetwork, update_critic
from skyrl_train.training.experience import Experience, in_sample_order
from skyrl_train.training.learner import Learner
from skyrl_train.training.optimizer import OptimizerSettings
from skyrl_train.training.trainer import PolicyTrainer
from skyrl_train.types import TrainBatch, TrainingSample
from tests.algorithms.test_value_loss import slow
from tests.tiny import ARCHITECTURES, make_model
from tests.training.batches import make_samples

SETTINGS = OptimizerSettings(lr=1e-3)


def make_network(arch: str = "qwen2", *, seed: int = 0, **overrides: Any) -> ValueNetwork:
    """With a head that is not 0, so that values differ and the body has gradients."""
    network = ValueNetwork(make_model(arch, seed=seed, **overrides))
    torch.nn.init.normal_(network.head.weight, std=0.1, generator=torch.Generator().manual_seed(seed))
    return network


def with_targets(samples: Sequence[TrainingSample], seed: int = 0) -> list[TrainingSample]:
    generator = torch.Generator().manual_seed(seed)

    def draw(sample: TrainingSample) -> torch.Tensor:
        return torch.randn(len(sample.token_ids), generator=generator) * sample.loss_mask

    return [replace(sample, returns=draw(sample), values=0.3 * draw(sample)) for sample in samples]


@pytest.fixture
def batch_samples(samples: Sequence[TrainingSample]) -> list[TrainingSample]:
    return with_targets(samples)


def in_one(samples: Sequence[TrainingSample]) -> TrainBatch:
    return pack(samples, max_tokens_per_micro_batch=10_000)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_value_is_that_of_the_state_before_the_token(arch: str, samples: Sequence[TrainingSample]) -> None:
    """Token for token as plain transformers computes the hidden state of the row before, observations and all."""
    network = make_network(arch)
    batch = pack(samples, max_tokens_per_micro_batch=40)
    found = in_sample_order(batch, CriticTrainer(network, SETTINGS).forward(batch))
    plain = make_model(arch, attn_implementation="eager").base_model
    wanted = []
    for sample in samples:
        with torch.no_grad():
            hidden = plain(input_ids=sample.token_ids[None]).last_hidden_state[0]
            wanted.append(network.head(hidden[:-1])[sample.loss_mask[1:], 0])
    torch.testing.assert_close(found, torch.cat(wanted), rtol=1e-4, atol=1e-5)
    assert found.std() > 0.01


def test_it_starts_at_zero_and_leaves_the_language_model_head_behind() -> None:
    network = ValueNetwork(make_model("llama"))
    names = [name for name, _ in network.named_parameters()]
    assert not any("lm_head" in name for name in names) and "head.weight" in names
    (values,) = CriticTrainer(network, SETTINGS).forward(in_one(make_samples()))
    assert (values == 0).all()


def test_the_head_is_in_float32_on_a_body_in_bfloat16(batch_samples: list[TrainingSample]) -> None:
    network = ValueNetwork(make_model("qwen2").bfloat16())
    assert network.head.weight.dtype == torch.float32
    critic = CriticTrainer(network, SETTINGS)
    critic.forward_backward(in_one(batch_samples))
    critic.optim_step()
    (values,) = critic.forward(in_one(batch_samples))
    assert values.dtype == torch.float32 and values.abs().max() > 0


def test_the_gradient_does_not_depend_on_how_the_batch_is_cut(batch_samples: list[TrainingSample]) -> None:
    nothing = replace(batch_samples[0], loss_mask=torch.zeros_like(batch_samples[0].loss_mask))
    samples = [*batch_samples, nothing]
    shuffled = random.Random(1).sample(samples, len(samples))
    cuts: list[tuple[list[TrainingSample], dict[str, Any]]] = [
        (samples, {"max_tokens_per_micro_batch": 10_000}),
        (samples, {"max_tokens_per_micro_batch": 10_000, "share_prefix": False}),
        (samples, {"micro_batch_size": 1}),
        (shuffled, {"max_tokens_per_micro_batch": 33}),
        (shuffled, {"micro_batch_size": 3}),
    ]
    results = []
    for part, options in cuts:
        network = make_network().double()
        metrics = CriticTrainer(network, SETTINGS, value_clip=0.1).forward_backward(pack(part, **options))
        results.append((metrics, {name: p.grad for name, p in network.named_parameters()}))
    wanted_metrics, wanted = results[0]
    assert 0 < wanted_metrics["critic/clip_frac"] < 1
    for metrics, gradients in results[1:]:
        assert metrics == pytest.approx(wanted_metrics, rel=1e-5)
        for name, gradient in wanted.items():
            assert gradient is not None and gradients[name] is not None
            torch.testing.assert_close(
                gradients[name], gradient, rtol=0, atol=2e-6 * float(gradient.abs().max()), msg=name
            )


def test_the_loss_is_the_scalar_references_mean_over_all_loss_tokens(batch_samples: list[TrainingSample]) -> None:
    """Ragged samples, some with observations between the tokens that count."""
    critic = CriticTrainer(make_network(), SETTINGS, value_clip=0.1)
    batch = pack(batch_samples, micro_batch_size=2)
    values = in_sample_order(batch, critic.forward(batch)).tolist()
    rows = []
    for sample in batch_samples:
        assert sample.values is not None and sample.returns is not None
        for at in sample.loss_mask.nonzero()[:, 0].tolist():
            rows.append(slow(values[len(rows)], float(sample.values[at]), float(sample.returns[at]), 0.1))
    assert len(rows) == batch.num_loss_tokens
    metrics = critic.forward_backward(batch)
    assert metrics["critic/loss"] == pytest.approx(sum(loss for loss, _ in rows) / len(rows), rel=1e-5)
    assert metrics["critic/clip_frac"] == pytest.approx(sum(clipped for _, clipped in rows) / len(rows))


def test_gradient_checkpointing_changes_nothing_but_memory(batch_samples: list[TrainingSample]) -> None:
    found = []
    for gradient_checkpointing in (False, True):
        network = make_network("qwen3")
        critic = CriticTrainer(network, SETTINGS, gradient_checkpointing=gradient_checkpointing)
        calls: list[None] = []
        network.body.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(None))
        critic.forward_backward(in_one(batch_samples))
        assert len(calls) == (2 if gradient_checkpointing else 1) and not network.training
        found.append({name: p.grad for name, p in network.named_parameters()})
    for name, gradient in found[0].items():
        assert gradient is not None and torch.equal(gradient, found[1][name]), name


def test_it_learns_what_the_returns_are(samples: Sequence[TrainingSample]) -> None:
    """A state's return is here its token's parity: 40 steps explain most of it."""
    taught = [
        replace(s, returns=torch.roll(s.token_ids % 2, 1).float() * s.loss_mask, values=torch.zeros(len(s.token_ids)))
        for s in samples
    ]
    critic = CriticTrainer(ValueNetwork(make_model()), OptimizerSettings(lr=5e-3), value_clip=100.0)
    losses = [update_critic(critic, [in_one(taught)])["critic/loss"] for _ in range(40)]
    assert losses[-1] < 0.05 * losses[0]


def test_an_update_is_one_step_for_each_mini_batch_and_epoch(batch_samples: list[TrainingSample]) -> None:
    critic = CriticTrainer(make_network(), OptimizerSettings(lr=1e-3, num_warmup_steps=4))
    metrics = update_critic(critic, [in_one(batch_samples[:4]), in_one(batch_samples[4:])], num_epochs=2)
    assert critic.last_step is not None and critic.last_step.lr == pytest.approx(1e-3)
    assert metrics["critic/lr"] == pytest.approx(1e-3 * (0.25 + 0.5 + 0.75 + 1) / 4)
    assert metrics.keys() == {"critic/loss", "critic/clip_frac", "critic/grad_norm", "critic/lr"}


def test_the_learner_cuts_the_critics_mini_batches_by_their_own_size(
    batch_samples: list[TrainingSample], objective: PolicyObjective
) -> None:
    """Three prompts: three policy updates of one prompt, two critic updates of two and of one, twice each."""
    critic = CriticTrainer(make_network(), OptimizerSettings(lr=1e-3, num_warmup_steps=8))
    learner = Learner(
        trainer=PolicyTrainer(make_model(), SETTINGS),
        loss_fn=objective,
        mini_batch_size=1,
        num_epochs=2,
        max_tokens_per_micro_batch=10_000,
        critic=critic,
        critic_mini_batch_size=2,
    )
    metrics = learner.update(Experience(samples=tuple(batch_samples), advantages={}, metrics={}))
    assert metrics["policy/version"] == 6
    assert critic.last_step is not None and critic.last_step.lr == pytest.approx(1e-3 * 4 / 8)
    assert metrics["critic/loss"] > 0
    assert learner.parts().keys() == {"policy", "critic"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_critic_goes_on_to_the_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    settings = OptimizerSettings(lr=1e-2, num_warmup_steps=2, scheduler="cosine", num_steps=9, weight_decay=0.1)

    def network(seed: int) -> ValueNetwork:
        return ValueNetwork(make_model(seed=seed, tie_word_embeddings=True).to(dtype))

    def train(critic: CriticTrainer, steps: range) -> None:
        for step in steps:
            update_critic(critic, [pack(with_targets(make_samples(seed=step)), max_tokens_per_micro_batch=60)])

    straight = CriticTrainer(network(0), settings)
    train(straight, range(6))
    first = CriticTrainer(network(0), settings)
    train(first, range(3))
    first.save(tmp_path)
    second = CriticTrainer(network(5), settings)
    second.load(tmp_path)
    train(second, range(3, 6))
    for (name, a), b in zip(straight.network.named_parameters(), second.network.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_another_models_state_is_refused(tmp_path: Path) -> None:
    CriticTrainer(make_network(), SETTINGS).save(tmp_path)
    with pytest.raises(CheckpointError, match="doesn't fit a critic on LlamaModel"):
        CriticTrainer(make_network("llama", hidden_size=32), SETTINGS).load(tmp_path)


def test_samples_without_returns_are_refused(samples: Sequence[TrainingSample]) -> None:
    with pytest.raises(ValueError, match="made without a critic"):
        CriticTrainer(make_network(), SETTINGS).forward_backward(in_one(samples))


def test_dropout_is_refused() -> None:
    with pytest.raises(ConfigError, match="uses dropout"):
        ValueNetwork(make_model("qwen2", attention_dropout=0.1))
