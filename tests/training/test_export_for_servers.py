"""What a server is given: names as in a checkpoint, tensors that say how long they hold, adapters in peft's form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, set_peft_model_state_dict
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from skyrl_train.algorithms.objective import PolicyObjective
from skyrl_train.training.hf_tensors import checkpoint_tensors
from skyrl_train.training.learner import Learner
from skyrl_train.training.model import load_model
from skyrl_train.training.optimizer import OptimizerSettings
from skyrl_train.training.trainer import PolicyTrainer
from skyrl_train.types import AdapterWeights, NamedWeights
from skyrl_train.weight_sync.plan import WeightPlan
from tests.tiny import make_model
from tests.training.test_lora import INITS, learn, logits, make_trainer, merged_by_peft

SETTINGS = OptimizerSettings(lr=1e-2)


def in_file(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", framework="pt") as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("arch", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("loaded", [False, True], ids=["made", "loaded"])
def test_names_and_values_are_those_of_a_checkpoint(arch: str, tied: bool, loaded: bool, tmp_path: Path) -> None:
    model = make_model(arch, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    if loaded:
        model = load_model(tmp_path)
    found, wanted = checkpoint_tensors(model), in_file(tmp_path)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert ("lm_head.weight" in found) is not tied
    plan = WeightPlan.of(found, dtype=torch.float32)
    assert [spec.name for spec in plan.specs] == list(found), "the plan finds no pair that is named twice"
    mine = {tensor.data_ptr() for tensor in model.parameters()}
    assert all(tensor.data_ptr() in mine for tensor in found.values()), "nothing is copied"


def test_a_module_that_keeps_experts_fused_names_them_as_its_checkpoint_does(tmp_path: Path) -> None:
    shape: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
    model = make_model("mixtral", attn_implementation="eager", **shape)
    model.save_pretrained(tmp_path)
    found, wanted = checkpoint_tensors(model), in_file(tmp_path)
    assert found.keys() == wanted.keys() and found.keys() != model.state_dict().keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_tensors_hold_until_an_update_begins_to_change_them(objective: PolicyObjective, tmp_path: Path) -> None:
    trainer = PolicyTrainer(make_model(), SETTINGS)
    first = trainer.export_tensors(0).source
    assert isinstance(first, NamedWeights) and first.still_valid()
    trainer.save(tmp_path)
    assert first.still_valid(), "a gradient and a checkpoint change nothing"
    seen: list[bool] = []
    step = trainer._optimizer.step
    trainer._optimizer.step = lambda: (seen.append(first.still_valid()), step())[1]  # type: ignore[method-assign]
    learn(trainer, objective, steps=1)
    assert seen == [False], "already when the first byte is about to change"
    second = trainer.export_tensors(1).source
    assert isinstance(second, NamedWeights)
    assert (first.still_valid(), second.still_valid()) == (False, True), "what is over stays over"
    trainer.load(tmp_path)
    assert not second.still_valid() and not first.still_valid()


@pytest.mark.parametrize("weights_for", ["module", "copy", "server", "adapter"])
def test_a_learner_gives_what_its_engine_takes(weights_for: Any, objective: PolicyObjective) -> None:
    trainer = make_trainer() if weights_for == "adapter" else PolicyTrainer(make_model(), SETTINGS)
    learner = Learner(
        trainer=trainer, loss_fn=objective, mini_batch_size=1, micro_batch_size=1, weights_for=weights_for
    )
    source = learner.export_weights().source
    kind = {"module": "LocalWeights", "adapter": "AdapterWeights"}.get(weights_for, "NamedWeights")
    assert type(source).__name__ == kind
    if weights_for == "copy":
        assert set(source.tensors) == set(trainer.model.state_dict())  # type: ignore[union-attr]


def test_with_adapters_a_server_may_also_get_the_merged_matrices(objective: PolicyObjective) -> None:
    trainer = make_trainer(target_modules=["q_proj"])
    learn(trainer, objective, steps=2)
    source = trainer.export_tensors(2).source
    assert isinstance(source, NamedWeights) and source.still_valid()
    assert sorted(source.tensors) == [f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)]
    before = {name: tensor.clone() for name, tensor in source.tensors.items()}
    learn(trainer, objective, steps=1)
    assert source.still_valid() and all(torch.equal(before[n], t) for n, t in source.tensors.items())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")  # of peft, to transformers
@pytest.mark.parametrize("init_method", INITS)
@pytest.mark.parametrize("arch", ["qwen2", "llama"])
def test_an_adapter_on_the_untouched_model_is_the_policy(
    arch: str, init_method: Any, objective: PolicyObjective, tmp_path: Path
) -> None:
    make_model(arch, attn_implementation="eager").save_pretrained(tmp_path)
    trainer = make_trainer(model=load_model(tmp_path), init_method=init_method, alpha=10.0)
    learn(trainer, objective, steps=3)
    source = trainer.export_adapter(3).source
    assert isinstance(source, AdapterWeights)
    config = json.loads(json.dumps(source.config))
    assert config == source.config, "plain values, as they travel"
    assert config["r"] == next(iter(source.tensors.values())).shape[0]
    base = AutoModelForCausalLM.from_pretrained(tmp_path)
    known = LoraConfig(**{name: config[name] for name in ("r", "lora_alpha", "target_modules", "task_type")})
    adapted = peft.get_peft_model(base, known)
    result = set_peft_model_state_dict(adapted, dict(source.tensors))
    assert not result.unexpected_keys
    torch.testing.assert_close(logits(adapted.base_model.model), logits(merged_by_peft(trainer)), rtol=1e-4, atol=1e-4)
    before = {name: tensor.clone() for name, tensor in source.tensors.items()}
    learn(trainer, objective, steps=1)
    assert source.still_valid() and all(torch.equal(before[n], t) for n, t in source.tensors.items())


def test_all_linear_is_written_by_the_last_part_of_the_names_where_that_says_the_same() -> None:
    short = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert make_trainer().export_adapter(0).source.config["target_modules"] == short  # type: ignore[union-attr]
    some = make_trainer(exclude_modules=["layers.0.mlp.up_proj"]).export_adapter(0).source
    targets = some.config["target_modules"]  # type: ignore[union-attr]
    assert "model.layers.1.mlp.up_proj" in targets and len(targets) == 13
