"""A run stops where engine and trainer part, and says which of weights, tokens, space and layer it is."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from skyrl_train.algorithms.objective import PolicyObjective
from skyrl_train.data.pack import pack
from skyrl_train.engines.embedded.config import EmbeddedConfig
from skyrl_train.engines.embedded.engine import EmbeddedEngine
from skyrl_train.entrypoints.build_off_policy import watch_engine
from skyrl_train.errors import LogprobMismatchError
from skyrl_train.training.lora import Adapters, LoraSettings
from skyrl_train.training.mismatch import (
    EngineView,
    MismatchWatch,
    compare_weights,
    diagnose,
    first_mismatch,
    rows_before,
)
from skyrl_train.training.optimizer import OptimizerSettings
from skyrl_train.training.trainer import PolicyTrainer
from skyrl_train.training.update import update_policy
from skyrl_train.types import SamplingParams, TrainBatch, TrainingSample
from tests.tiny import make_model, make_tokenizer
from tests.training.batches import as_sampled_by, make_samples
from tests.training.test_engine_agreement import sample_groups

BOUND = 0.01


@pytest.fixture
def trainer() -> PolicyTrainer:
    return PolicyTrainer(make_model("qwen3"), OptimizerSettings(lr=1e-3), version=3)


def view(module: torch.nn.Module | None, **replaced: Any) -> EngineView:
    fields: dict[str, Any] = {
        "logprob_space": "temperature",
        "sampling": SamplingParams(max_new_tokens=9),
        "version": lambda: 3,
        "module": module,
    }
    return EngineView(**{**fields, **replaced})


def found_by(trainer: PolicyTrainer, samples: Sequence[TrainingSample], engine: EngineView | None) -> Any:
    batch = pack(samples, max_tokens_per_micro_batch=33)
    first = first_mismatch(batch, trainer.forward(batch), BOUND)
    assert first is not None
    return diagnose(first, batch, trainer, engine)


def corrupted(samples: Sequence[TrainingSample], sample: int, position: int, value: float) -> list[TrainingSample]:
    wrong = samples[sample].rollout_logprobs.clone()
    wrong[position] = value
    return [*samples[:sample], replace(samples[sample], rollout_logprobs=wrong), *samples[sample + 1 :]]


def test_within_the_bound_there_is_nothing(trainer: PolicyTrainer) -> None:
    batch = pack(as_sampled_by(trainer.model, make_samples()), max_tokens_per_micro_batch=33)
    assert first_mismatch(batch, trainer.forward(batch), BOUND) is None


def test_tokens_of_another_policy_are_not_judged(trainer: PolicyTrainer) -> None:
    samples = corrupted(as_sampled_by(trainer.model, make_samples()), 2, -1, -50.0)

    def found(version: int) -> Any:
        dated = [replace(s, policy_versions=torch.where(s.loss_mask, version, -1)) for s in samples]
        batch = pack(dated, max_tokens_per_micro_batch=33)
        return first_mismatch(batch, trainer.forward(batch), BOUND, version=trainer.version)

    assert found(trainer.version) is not None and found(trainer.version - 1) is None


@pytest.mark.parametrize("value", [-50.0, float("nan"), float("-inf")])
def test_a_wrong_logprob_is_found_at_its_token(trainer: PolicyTrainer, value: float) -> None:
    """Of two wrong samples the earlier one, whichever micro-batch they are in; its second turn has the wrong token."""
    samples = as_sampled_by(trainer.model, make_samples(seed=1))
    number = next(
        i for i, s in enumerate(samples) if not s.loss_mask[s.num_prompt_tokens :].all() and i < len(samples) - 1
    )
    sample = samples[number]
    position = int(sample.loss_mask.nonzero()[2])  # one token, two observed ones, then this is the second of the turn
    last = len(samples) - 1
    wrong = corrupted(corrupted(samples, number, position, value), last, len(samples[last].token_ids) - 1, -50.0)
    diagnosis = found_by(trainer, wrong, view(copy.deepcopy(trainer.model)))
    first = diagnosis.first
    assert (first.trajectory_id, first.position) == (sample.trajectory_id, position)
    assert (first.turn, first.turn_position) == (1, 1)
    assert first.token_id == int(sample.token_ids[position])
    assert first.trainer_logprob == pytest.approx(float(sample.rollout_logprobs[position]), abs=1e-5)
    assert first.num_over == 2
    assert diagnosis.cause == "rollout"
    assert "all 4 outputs agree" in diagnosis.layer_report and "is not the model" in diagnosis.layer_report
    text = str(diagnosis)
    assert f"token 1 of turn 1 of trajectory {sample.trajectory_id} (position {position}" in text
    assert "are equal (checksum" in text and "comparable (temperature, temperature 1)" in text


def test_a_changed_weight_is_named(trainer: PolicyTrainer) -> None:
    engine = copy.deepcopy(trainer.model)
    name = "model.layers.1.mlp.down_proj.weight"
    with torch.no_grad():
        engine.get_parameter(name)[3, 5] += 4.0
        engine.lm_head.weight[7] += 1.0
    diagnosis = found_by(trainer, as_sampled_by(engine, make_samples()), view(engine))
    assert (diagnosis.cause, diagnosis.tensor) == ("weights", name)
    assert "2 of 25 tensors differ" in diagnosis.weights and "by 4 at most" in diagnosis.weights
    assert "engine at version 3, trainer at 3" in diagnosis.weights
    assert diagnosis.layer == "layers.1"


def test_a_layer_that_computes_something_else_is_named(trainer: PolicyTrainer) -> None:
    """Equal weights, another function: a hook in the second layer of the engine's module scales its attention."""
    engine = copy.deepcopy(trainer.model)
    engine.model.layers[1].self_attn.o_proj.register_forward_hook(lambda module, inputs, output: 1.5 * output)
    diagnosis = found_by(trainer, as_sampled_by(engine, make_samples()), view(engine))
    assert (diagnosis.cause, diagnosis.tensor, diagnosis.layer) == ("layer", None, "layers.1")
    assert "layers.1 is the first whose outputs differ" in str(diagnosis)
    assert not trainer.model.model.layers[1]._forward_hooks, "nothing stays on the trainer's module"


def test_another_sampling_space_is_named(trainer: PolicyTrainer) -> None:
    engine = view(
        copy.deepcopy(trainer.model), logprob_space="raw", sampling=SamplingParams(max_new_tokens=9, temperature=0.5)
    )
    at_half = PolicyTrainer(trainer.model, OptimizerSettings(lr=1e-3), temperature=0.5)
    diagnosis = found_by(at_half, as_sampled_by(trainer.model, make_samples()), engine)
    assert diagnosis.cause == "sampling space"
    assert "at temperature 1, the trainer those at 0.5" in diagnosis.space


def test_what_is_not_in_this_process_is_said_to_be(trainer: PolicyTrainer) -> None:
    samples = corrupted(as_sampled_by(trainer.model, make_samples()), 0, -1, -50.0)
    for engine in (None, view(None)):
        diagnosis = found_by(trainer, samples, engine)
        assert diagnosis.cause == "rollout" and "not in this process" in diagnosis.weights
    own = found_by(trainer, samples, view(trainer.model))
    assert own.weights == "the engine runs the trainer's own tensors"


def test_weights_that_one_side_lacks_or_shapes_that_differ_are_named() -> None:
    one = {"a": torch.zeros(2), "b": torch.zeros(3)}
    assert compare_weights(one, {"a": torch.zeros(2)})[0] == "b"
    assert compare_weights({"a": torch.zeros(2)}, one)[0] == "b"
    name, text = compare_weights(one, {**one, "b": torch.zeros(3).double()})
    assert name == "b" and "torch.float64" in text
    assert compare_weights(one, copy.deepcopy(one))[0] is None


def test_rows_before_are_the_tokens_own_sequence(trainer: PolicyTrainer) -> None:
    samples = make_samples()
    (micro_batch,) = pack(samples, max_tokens_per_micro_batch=10_000).micro_batches[0]
    by_id = {sample.trajectory_id: sample for sample in samples}
    for index, row in enumerate(micro_batch.predict_rows.tolist()):
        rows = rows_before(micro_batch, row)
        sample = by_id[micro_batch.trajectory_ids[int(micro_batch.sample_index[index])]]
        assert micro_batch.token_ids[rows].tolist() == sample.token_ids[: len(rows)].tolist()
        assert int(sample.token_ids[len(rows)]) == int(micro_batch.target_ids[index])


def test_merged_adapters_are_compared_by_the_engines_names(objective: PolicyObjective) -> None:
    """The engine has the adapters of the start; after an update its adapted matrices are the stale ones."""
    model = make_model("qwen2")
    adapters = Adapters(model, LoraSettings(rank=4, target_modules=["q_proj"], init_method="gaussian"))
    trainer = PolicyTrainer(model, OptimizerSettings(lr=0.5), adapters=adapters)
    engine = trainer.engine_model
    samples = as_sampled_by(engine, make_samples())
    wrong = found_by(trainer, corrupted(samples, 0, -1, -50.0), view(engine))
    assert (wrong.cause, wrong.tensor, wrong.layer) == ("rollout", None, None)
    trainer.forward_backward(pack(samples, micro_batch_size=12), objective)
    trainer.optim_step()
    stale = found_by(trainer, samples, view(engine))
    assert (stale.cause, stale.tensor) == ("weights", "model.layers.0.self_attn.q_proj.weight")
    assert "2 of " in stale.weights and stale.layer == "layers.0"


def test_the_version_that_sampled_the_token_is_said(trainer: PolicyTrainer) -> None:
    samples = corrupted(as_sampled_by(trainer.model, make_samples()), 0, -1, -50.0)
    samples = [replace(s, policy_versions=torch.full((len(s.token_ids),), 2)) for s in samples]
    diagnosis = found_by(trainer, samples, view(trainer.model))
    assert diagnosis.first.version == 2 and "sampled by version 2" in str(diagnosis)


# In an update


def batches(samples: Sequence[TrainingSample], count: int) -> list[TrainBatch]:
    size = len(samples) // count
    return [pack(samples[i * size : (i + 1) * size], max_tokens_per_micro_batch=33) for i in range(count)]


@pytest.mark.parametrize("num_batches", [1, 3])
def test_the_update_stops_before_its_first_step(
    num_batches: int, trainer: PolicyTrainer, objective: PolicyObjective
) -> None:
    samples = as_sampled_by(trainer.model, make_samples())
    before = copy.deepcopy(trainer.model.state_dict())
    wrong = batches(corrupted(samples, len(samples) - 1, -1, -50.0), num_batches)
    with pytest.raises(LogprobMismatchError, match="trajectory p2/3/0"):
        update_policy(trainer, wrong, objective, watch=MismatchWatch(BOUND))
    assert trainer.version == 3
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())
    assert update_policy(trainer, wrong, objective, watch=MismatchWatch(60.0)).version == 3 + num_batches


async def test_an_engine_that_missed_an_update_is_caught(objective: PolicyObjective) -> None:
    """The engine has weights of its own and never got the trainer's."""
    trainer = PolicyTrainer(make_model("qwen3"), OptimizerSettings(lr=5e-2))
    watch = MismatchWatch(1e-3)
    engine = EmbeddedEngine(copy.deepcopy(trainer.model), make_tokenizer(), config=EmbeddedConfig(max_context_len=64))
    watch_engine(
        watch,
        EngineView(
            logprob_space=engine.info.logprob_space,
            sampling=SamplingParams(max_new_tokens=12),
            version=lambda: engine.core.policy_version,
            module=engine.core.model,
        ),
    )
    try:
        samples = await sample_groups(engine, temperature=1.0)
        update_policy(trainer, batches(samples, 1), objective, watch=watch)
        samples = await sample_groups(engine, temperature=1.0)
    finally:
        await engine.close()
    with pytest.raises(LogprobMismatchError, match=r"part \(weights\)") as caught:
        update_policy(trainer, batches(samples, 1), objective, watch=watch)
    assert "engine at version 0, trainer at 1: 25 of 25 tensors differ" in str(caught.value)
