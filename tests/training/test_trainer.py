"""The six verbs: gradients that ignore the cut, weights that keep their place, states that go on to the bit."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from skyrl_train.algorithms.objective import MicroBatchLoss, PolicyObjective
from skyrl_train.algorithms.policy_losses import LossInputs, ppo_clip
from skyrl_train.algorithms.reductions import Denominators, seq_mean_token_sum_norm, sequence_mean, token_mean
from skyrl_train.data.pack import pack
from skyrl_train.errors import CheckpointError
from skyrl_train.training.model import load_model
from skyrl_train.training.optimizer import OptimizerSettings
from skyrl_train.training.trainer import PolicyTrainer
from skyrl_train.types import DiskWeights, LocalWeights, TrainBatch, TrainingSample
from tests.tiny import make_model
from tests.training.batches import make_samples

SETTINGS = OptimizerSettings(lr=1e-3)


def in_one(samples: Sequence[TrainingSample]) -> TrainBatch:
    return pack(samples, max_tokens_per_micro_batch=10_000)


def gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_near(found: torch.Tensor, wanted: torch.Tensor, name: str) -> None:
    """To float32's rounding: transformers normalises in float32 even in a float64 model."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6 * float(wanted.abs().max()), msg=name)


def shuffled(samples: Sequence[TrainingSample]) -> list[TrainingSample]:
    return random.Random(1).sample(list(samples), len(samples))


@pytest.mark.parametrize("reduction", [token_mean, sequence_mean, partial(seq_mean_token_sum_norm, max_seq_len=9)])
def test_the_gradient_does_not_depend_on_how_the_batch_is_cut(
    reduction: Any, samples: Sequence[TrainingSample]
) -> None:
    objective = PolicyObjective(policy_loss=ppo_clip, reduction=reduction, entropy_loss_coef=0.01)
    samples = [
        *samples,
        replace(samples[0], loss_mask=torch.zeros_like(samples[0].loss_mask)),
    ]  # nothing to train in it
    cuts: list[tuple[Sequence[TrainingSample], dict[str, Any]]] = [
        (samples, {"max_tokens_per_micro_batch": 10_000}),
        (samples, {"max_tokens_per_micro_batch": 10_000, "share_prefix": False}),
        (samples, {"micro_batch_size": 1}),
        (samples, {"micro_batch_size": 5, "share_prefix": False}),
        (shuffled(samples), {"max_tokens_per_micro_batch": 33}),
        (shuffled(samples), {"micro_batch_size": 3}),
    ]
    results = []
    for part, options in cuts:
        model = make_model("qwen2").double()
        trainer = PolicyTrainer(model, SETTINGS)
        metrics = trainer.forward_backward(pack(part, **options), objective)
        results.append((gradients(model), metrics))
    wanted, wanted_metrics = results[0]
    assert all(g.abs().max() > 1e-6 for g in wanted.values())
    for found, metrics in results[1:]:
        assert metrics == pytest.approx(wanted_metrics, rel=1e-5, abs=1e-9)
        for name, gradient in wanted.items():
            assert_near(found[name], gradient, name)


def test_the_gradient_equals_that_of_plain_transformers(samples: Sequence[TrainingSample]) -> None:
    """On policy, PPO's gradient is that of -A log p, here summed sample by sample through eager attention."""
    objective = PolicyObjective(policy_loss=ppo_clip, reduction=token_mean)
    model = make_model("qwen3").double()
    PolicyTrainer(model, SETTINGS, temperature=0.7).forward_backward(in_one(samples), objective)
    plain = make_model("qwen3", attn_implementation="eager").double()
    num_loss_tokens = sum(int(s.loss_mask.sum()) for s in samples)
    for sample in samples:
        logp = torch.log_softmax(plain(input_ids=sample.token_ids[None]).logits[0, :-1] / 0.7, dim=-1)
        taken = logp.gather(1, sample.token_ids[1:, None])[:, 0]
        (-(taken * sample.advantages[1:]).sum() / num_loss_tokens).backward()
    wanted = gradients(plain)
    for name, gradient in gradients(model).items():
        assert_near(gradient, wanted[name], name)


def test_metrics_cover_all_micro_batches(samples: Sequence[TrainingSample], objective: PolicyObjective) -> None:
    batch = pack(samples, micro_batch_size=2)
    trainer = PolicyTrainer(make_model("qwen2"), SETTINGS)
    logprobs = torch.cat(trainer.forward(batch))
    old = [now - 0.1 * i for i, now in enumerate(trainer.forward(batch))]
    metrics = trainer.forward_backward(batch, objective, old_logprobs=old)
    rollout = torch.cat([m.rollout_logprobs for m in batch.micro_batches[0]])
    ratio = torch.exp(logprobs - torch.cat(old))
    difference = (torch.cat(old) - rollout).abs()
    assert metrics["policy/ratio_mean"] == pytest.approx(float(ratio.mean()), rel=1e-5)
    assert metrics["policy/approx_kl"] == pytest.approx(float((ratio - 1 - ratio.log()).mean()), rel=1e-4)
    assert metrics["policy/rollout_logprob_abs_diff_mean"] == pytest.approx(float(difference.mean()), rel=1e-5)
    assert metrics["policy/rollout_logprob_abs_diff_max"] == pytest.approx(float(difference.max()), rel=1e-5)
    ordered = sorted(difference.tolist())
    assert metrics["policy/rollout_logprob_abs_diff_p99"] == pytest.approx(ordered[int(0.99 * len(ordered))], rel=1e-5)
    assert metrics["policy/clip_frac"] > 0


def test_old_and_reference_logprobs_are_at_the_sampling_temperature(samples: Sequence[TrainingSample]) -> None:
    batch = in_one(samples)
    at = {
        t: PolicyTrainer(make_model("qwen2"), SETTINGS, reference=make_model("qwen2"), temperature=t)
        for t in (0.5, 1.0)
    }
    for trainer in at.values():
        assert torch.equal(trainer.forward(batch)[0], trainer.forward(batch, which="reference")[0])
    assert not torch.allclose(at[0.5].forward(batch)[0], at[1.0].forward(batch)[0])


def test_the_reference_never_moves(samples: Sequence[TrainingSample], objective_with_kl: PolicyObjective) -> None:
    reference = make_model("qwen2")
    before = {name: p.clone() for name, p in reference.named_parameters()}
    trainer = PolicyTrainer(make_model("qwen2"), SETTINGS, reference=reference)
    batch = in_one(samples)
    for _ in range(2):
        ref_logprobs = trainer.forward(batch, which="reference")
        metrics = trainer.forward_backward(batch, objective_with_kl, ref_logprobs=ref_logprobs)
        trainer.optim_step()
    assert metrics["policy/ref_kl"] > 0
    for name, parameter in reference.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is None


def test_steps_change_values_and_never_the_tensors(
    samples: Sequence[TrainingSample], objective: PolicyObjective
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = make_model("llama").to(dtype)
        places = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
        before = {name: p.clone() for name, p in model.named_parameters()}
        trainer = PolicyTrainer(model, OptimizerSettings(lr=2e-2), version=7)
        trainer.forward_backward(in_one(samples), objective)
        assert trainer.optim_step() == 8
        assert trainer.last_step is not None and trainer.last_step.grad_norm > 0
        assert {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()} == places
        assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters())
        assert all(p.grad is None for p in model.parameters())
        assert not model.training


def test_gradient_checkpointing_changes_nothing_but_memory(
    samples: Sequence[TrainingSample], objective: PolicyObjective
) -> None:
    found = []
    for gradient_checkpointing in (False, True):
        model = make_model("qwen3")
        trainer = PolicyTrainer(model, SETTINGS, gradient_checkpointing=gradient_checkpointing)
        calls = 0

        def count(*_: object) -> None:
            nonlocal calls
            calls += 1

        model.model.layers[0].mlp.register_forward_pre_hook(count)
        trainer.forward_backward(in_one(samples), objective)
        found.append(gradients(model))
        assert calls == (2 if gradient_checkpointing else 1)
        assert not model.training
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name


def test_local_weights_are_the_engines_own_tensors() -> None:
    trainer = PolicyTrainer(make_model("qwen2"), SETTINGS, version=4)
    update = trainer.export_weights(4)
    assert (update.version, update.source) == (4, LocalWeights())
    with pytest.raises(ValueError, match="version 3 was asked for, the trainer is at 4"):
        trainer.export_weights(3)


def test_disk_weights_are_a_folder_that_loads(tmp_path: Path) -> None:
    model = make_model("qwen2")
    update = PolicyTrainer(model, SETTINGS, version=4).export_weights(4, tmp_path)
    assert update.source == DiskWeights(path=str(tmp_path / "version_4"))
    loaded = load_model(tmp_path / "version_4")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_trainer_goes_on_to_the_bit(
    dtype: torch.dtype, tmp_path: Path, samples: Sequence[TrainingSample], objective: PolicyObjective
) -> None:
    settings = OptimizerSettings(lr=1e-2, num_warmup_steps=2, scheduler="cosine", num_steps=9, weight_decay=0.1)

    def train(trainer: PolicyTrainer, steps: range) -> None:
        for step in steps:
            batch = pack(make_samples(seed=step), max_tokens_per_micro_batch=60)
            trainer.forward_backward(batch, objective)
            trainer.optim_step()

    straight = make_model("qwen2", tie_word_embeddings=True).to(dtype)
    train(PolicyTrainer(straight, settings), range(6))

    first = PolicyTrainer(make_model("qwen2", tie_word_embeddings=True).to(dtype), settings)
    train(first, range(3))
    first.save(tmp_path)
    resumed = make_model("qwen2", tie_word_embeddings=True, seed=5).to(dtype)
    places = [p.data_ptr() for p in resumed.parameters()]
    second = PolicyTrainer(resumed, settings)
    second.load(tmp_path)
    assert (second.version, [p.data_ptr() for p in resumed.parameters()]) == (3, places)
    train(second, range(3, 6))
    for (name, a), b in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_another_models_state_is_refused(tmp_path: Path) -> None:
    PolicyTrainer(make_model("qwen2"), SETTINGS).save(tmp_path)
    with pytest.raises(CheckpointError, match="doesn't fit LlamaForCausalLM"):
        PolicyTrainer(make_model("llama", hidden_size=32), SETTINGS).load(tmp_path)
    with pytest.raises(CheckpointError, match=r"here torch.bfloat16 \[300, 64\], stored torch.float32 \[300, 64\]"):
        PolicyTrainer(make_model("qwen2").bfloat16(), SETTINGS).load(tmp_path)
    with pytest.raises(CheckpointError, match="nowhere"):
        PolicyTrainer(make_model("qwen2"), SETTINGS).load(tmp_path / "nowhere")


def test_gradients_of_half_precision_add_up_in_float32(
    samples: Sequence[TrainingSample], objective: PolicyObjective
) -> None:
    """300 micro-batches with a gradient of 1 each; bfloat16 would stop counting at 256."""
    model = make_model("qwen2").bfloat16()
    trainer = PolicyTrainer(model, OptimizerSettings(lr=1e-3, max_grad_norm=None))
    batch = pack([*samples] * 25, micro_batch_size=1)
    assert len(batch.micro_batches[0]) == 300

    def constant(inputs: LossInputs, denominators: Denominators) -> MicroBatchLoss:
        return MicroBatchLoss(loss=model.model.norm.weight.sum() + 0 * inputs.logprobs.sum(), token_metrics={})

    trainer.forward_backward(batch, constant)
    trainer.optim_step()
    assert trainer.last_step is not None
    wanted = len(batch.micro_batches[0]) * 64**0.5  # 64 weights, each with the number of micro-batches as gradient
    assert trainer.last_step.grad_norm == pytest.approx(wanted)


def test_a_verb_that_needs_a_reference_says_so(
    samples: Sequence[TrainingSample], objective_with_kl: PolicyObjective
) -> None:
    trainer = PolicyTrainer(make_model("qwen2"), SETTINGS)
    with pytest.raises(ValueError, match="no reference model"):
        trainer.forward(in_one(samples), which="reference")
    with pytest.raises(ValueError, match="no reference log-probabilities"):
        trainer.forward_backward(in_one(samples), objective_with_kl)


def test_scoring_is_the_models_own_log_softmax_at_temperature_1() -> None:
    ids = [5, 9, 2, 30, 7, 7]
    plain = make_model("qwen2", attn_implementation="eager")
    with torch.no_grad():
        logits = plain(torch.tensor([ids]), use_cache=False).logits[0, :-1]
    wanted = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    scored = PolicyTrainer(make_model("qwen2"), SETTINGS, temperature=0.5).score(ids)
    assert scored == pytest.approx(wanted.tolist(), abs=1e-5)
