"""Adapters: what is trained, what the engine serves, what is exported, and that a resume goes on to the bit."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from skyrl_train.algorithms.objective import PolicyObjective
from skyrl_train.data.pack import pack
from skyrl_train.engines.embedded.config import EmbeddedConfig
from skyrl_train.engines.embedded.engine import EmbeddedEngine
from skyrl_train.errors import CheckpointError, ConfigError, WeightUpdateError
from skyrl_train.training.critic import CriticTrainer, ValueNetwork
from skyrl_train.training.lora import Adapters, LoraSettings
from skyrl_train.training.model import load_model
from skyrl_train.training.optimizer import OptimizerSettings
from skyrl_train.training.trainer import PolicyTrainer
from skyrl_train.types import NamedWeights, TrainingSample, WeightUpdate
from skyrl_train.weight_sync.sync import sync_weights
from tests.engines.embedded.common import make_core, random_prompts, request
from tests.engines.embedded.common import run as run_core
from tests.tiny import make_model, make_tokenizer
from tests.training.batches import make_samples
from tests.training.test_critic import with_targets
from tests.training.test_engine_agreement import sample_groups

INITS = ("kaiming", "gaussian", "orthogonal", "pissa")
TOKENS = torch.tensor([[5, 9, 200, 31, 7, 7, 120]])


def make_trainer(
    arch: str = "qwen2",
    *,
    model: PreTrainedModel | None = None,
    reference: Any = None,
    lr: float = 1e-2,
    gradient_checkpointing: bool = False,
    base_path: str | None = None,
    **settings: Any,
) -> PolicyTrainer:
    model = make_model(arch) if model is None else model
    adapters = Adapters(model, LoraSettings(**{"rank": 4, **settings}), base_path=base_path)
    return PolicyTrainer(
        model,
        OptimizerSettings(lr=lr),
        adapters=adapters,
        reference=reference,
        gradient_checkpointing=gradient_checkpointing,
    )


def learn(trainer: PolicyTrainer, objective: PolicyObjective, steps: int = 2, first: int = 0) -> None:
    for step in range(first, first + steps):
        batch = pack(make_samples(seed=step), max_tokens_per_micro_batch=60)
        trainer.forward_backward(batch, objective, old_logprobs=trainer.forward(batch))
        trainer.optim_step()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """As plain transformers computes them."""
    model.set_attn_implementation("eager")
    result: torch.Tensor = model(TOKENS, use_cache=False).logits
    return result


@torch.no_grad()
def merged_by_peft(trainer: PolicyTrainer, objective: Any = None) -> PreTrainedModel:
    """peft's own merge, layer by layer, on a copy."""
    model = copy.deepcopy(trainer.model)
    for name, module in list(model.named_modules()):
        if isinstance(module, peft.tuners.lora.Linear):
            module.merge()
            model.set_submodule(name, module.base_layer)
    return model


def test_only_adapters_are_trained_and_the_rest_is_left_to_the_bit(objective: PolicyObjective) -> None:
    trainer = make_trainer("qwen3", target_modules=["q_proj", "down_proj"])
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    learn(trainer, objective)
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {
        f"model.layers.{layer}.{module}.lora_{matrix}.default.weight"
        for layer in (0, 1)
        for module in ("self_attn.q_proj", "mlp.down_proj")
        for matrix in "AB"
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_merged_matrix_by_the_chain_rule(
    dtype: torch.dtype, objective: PolicyObjective, samples: Sequence[TrainingSample]
) -> None:
    """W' = W + s B A: dL/dB = s G A^T and dL/dA = s B^T G, with G = dL/dW' from training all weights of W'."""
    trainer = make_trainer(model=make_model().to(dtype), alpha=6.0, target_modules=["v_proj"])
    learn(trainer, objective)
    batch = pack(samples, max_tokens_per_micro_batch=60)
    plain = copy.deepcopy(trainer.engine_model).float().requires_grad_(True)
    whole = PolicyTrainer(plain, OptimizerSettings(lr=1e-2))
    trainer.forward_backward(batch, objective)
    whole.forward_backward(batch, objective)
    layer = trainer.model.get_submodule("model.layers.1.self_attn.v_proj")
    g = whole.model.get_parameter("model.layers.1.self_attn.v_proj.weight").grad
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert a.dtype == b.dtype == torch.float32, "adapters are in float32 on any model"
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.05}
    for found, wanted in ((b.grad, 1.5 * g @ a.T), (a.grad, 1.5 * b.T @ g)):
        torch.testing.assert_close(found / wanted.abs().max(), wanted / wanted.abs().max(), **tolerance)
        assert wanted.abs().max() > 0


@pytest.mark.parametrize("init_method", INITS)
def test_before_the_first_update_the_model_is_the_one_it_adapts(init_method: Any) -> None:
    trainer = make_trainer(init_method=init_method)
    for model in (trainer.model, trainer.engine_model):
        torch.testing.assert_close(logits(model), logits(make_model()), rtol=1e-4, atol=1e-4)


def test_a_pissa_start_in_bfloat16_sums_to_the_weights_but_for_one_rounding() -> None:
    """What is left of W is rounded after the rounded adapters were taken off, so that no error of theirs stays."""
    model = make_model().bfloat16()
    names = Adapters(model, LoraSettings(rank=16, init_method="pissa")).module_names
    assert len(names) == 14
    for name in names:
        layer = model.get_submodule(name)
        rest = layer.base_layer.weight.float()
        found = rest + layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        wanted = make_model().bfloat16().get_parameter(f"{name}.weight").float()
        assert ((found - wanted).abs() <= 2**-8 * rest.abs() + 1e-6).all(), name


def test_the_same_seed_starts_the_same_adapters_and_the_global_random_state_stays() -> None:
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    first, second, third = (
        make_trainer(model=model, seed=seed).model.state_dict()
        for model, seed in ((_quiet(make_model()), 1), (_quiet(make_model()), 1), (_quiet(make_model()), 2))
    )
    name = "model.layers.0.mlp.up_proj.lora_A.default.weight"
    assert torch.equal(first[name], second[name]) and not torch.equal(first[name], third[name])
    assert torch.equal(torch.rand(2), wanted)


def _quiet(model: PreTrainedModel) -> PreTrainedModel:
    """The model, with the random state that `make_model` set put back to what this test expects."""
    torch.manual_seed(3)
    return model


@pytest.mark.parametrize("init_method", INITS)
@pytest.mark.parametrize("arch", ["qwen2", "gemma3_text"])
async def test_the_engine_serves_what_pefts_own_merge_gives(
    arch: str, init_method: Any, objective: PolicyObjective
) -> None:
    trainer = make_trainer(arch, init_method=init_method)
    core = make_core(trainer.engine_model)
    learn(trainer, objective, steps=3)
    update = trainer.export_weights(3)
    assert isinstance(update.source, NamedWeights)
    core.pause("keep")
    core.update_weights(update)
    core.resume()
    prompts = [request(str(i), prompt) for i, prompt in enumerate(random_prompts(5, 17, 30))]
    found = run_core(core, prompts)
    wanted = run_core(make_core(merged_by_peft(trainer)), prompts)
    start = run_core(make_core(make_model(arch)), prompts)
    assert [c.token_ids for c in found] == [c.token_ids for c in wanted]
    assert [c.token_ids for c in found] != [c.token_ids for c in start], "three steps change an answer"
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)


def test_the_engines_module_shares_all_that_has_no_adapter(objective: PolicyObjective) -> None:
    trainer = make_trainer(target_modules=["q_proj", "o_proj"])
    mine = {id(p) for p in trainer.model.parameters()}
    own = {name for name, p in trainer.engine_model.named_parameters() if id(p) not in mine}
    assert own == {f"model.layers.{i}.self_attn.{m}.weight" for i in (0, 1) for m in ("q_proj", "o_proj")}
    before = {name: p.clone() for name, p in trainer.engine_model.named_parameters()}
    learn(trainer, objective)
    assert all(torch.equal(p, before[name]) for name, p in trainer.engine_model.named_parameters()), (
        "training must not reach an engine that serves meanwhile"
    )


@pytest.mark.parametrize("tied", [False, True])
async def test_rollouts_and_trainer_agree_after_each_update(tied: bool, objective: PolicyObjective) -> None:
    trainer = make_trainer(model=make_model("qwen2", tie_word_embeddings=tied), alpha=32.0)
    engine = EmbeddedEngine(trainer.engine_model, make_tokenizer(), config=EmbeddedConfig(max_context_len=64))
    try:
        for step in range(3):
            batch = pack(await sample_groups(engine, temperature=1.0), max_tokens_per_micro_batch=100)
            metrics = trainer.forward_backward(batch, objective)
            assert metrics["policy/rollout_logprob_abs_diff_max"] < 2e-5
            await sync_weights(engine, trainer.export_weights(trainer.optim_step()))
            assert (await engine.stats()).policy_version == step + 1
    finally:
        await engine.close()


@pytest.mark.parametrize("what", ["name", "shape", "dtype"])
def test_a_wrong_update_is_refused_and_leaves_the_engine_untouched(what: str, objective: PolicyObjective) -> None:
    trainer = make_trainer()
    core = make_core(trainer.engine_model)
    learn(trainer, objective)
    tensors = dict(trainer.export_weights(2).source.tensors)  # type: ignore[union-attr]
    name = next(iter(reversed(tensors)))
    wrong = {"name": "model.layers.9.weight", "shape": name, "dtype": name}[what]
    tensors[wrong] = {"name": tensors[name], "shape": tensors[name][1:], "dtype": tensors[name].double()}[what]
    before = {name: p.clone() for name, p in trainer.engine_model.named_parameters()}
    core.pause("keep")
    with pytest.raises(WeightUpdateError, match="nothing was copied"):
        core.update_weights(WeightUpdate(version=2, source=NamedWeights(tensors=tensors)))
    assert all(torch.equal(p, before[name]) for name, p in trainer.engine_model.named_parameters())
    assert core.policy_version == 0
    core.resume()


@pytest.mark.parametrize("init_method", INITS)
def test_the_reference_is_the_start_without_a_second_model(
    init_method: Any, objective_with_kl: PolicyObjective, samples: Sequence[TrainingSample]
) -> None:
    trainer = make_trainer(init_method=init_method, reference="start")
    batch = pack(samples, max_tokens_per_micro_batch=60)
    wanted = PolicyTrainer(make_model(), OptimizerSettings(lr=1)).forward(batch)
    for _ in range(3):
        old, ref = trainer.forward(batch), trainer.forward(batch, which="reference")
        for found, right in zip(ref, wanted, strict=True):
            torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)
        trainer.forward_backward(batch, objective_with_kl, old_logprobs=old, ref_logprobs=ref)
        trainer.optim_step()
    assert all(p.requires_grad == ("lora_" in name) for name, p in trainer.model.named_parameters())
    moved = [(a - b).abs().max() for a, b in zip(trainer.forward(batch), wanted, strict=True)]
    assert max(moved) > 0.01


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")  # of peft, to transformers
@pytest.mark.parametrize("init_method", INITS)
@pytest.mark.parametrize("arch", ["qwen2", "llama"])
def test_the_export_loads_without_peft_and_its_adapter_with_peft(
    arch: str, init_method: Any, objective: PolicyObjective, tmp_path: Path
) -> None:
    make_model(arch, attn_implementation="eager").save_pretrained(tmp_path / "base")
    model = load_model(tmp_path / "base")
    trainer = make_trainer(model=model, init_method=init_method, alpha=10.0, base_path=str(tmp_path / "base"))
    learn(trainer, objective, steps=3)
    trainer.export(None, tmp_path / "export")
    wanted = logits(merged_by_peft(trainer))

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert [name for name, _ in plain.named_parameters()] == [name for name, _ in make_model(arch).named_parameters()]
    torch.testing.assert_close(logits(plain), wanted, rtol=1e-4, atol=1e-4)

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert (logits(base) - wanted).abs().max() > 0.1
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "export" / "adapter")
    torch.testing.assert_close(logits(adapted.base_model.model), wanted, rtol=1e-4, atol=1e-4)
    assert adapted.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")  # of peft, to transformers
def test_maps_that_are_stored_the_other_way_round(objective: PolicyObjective, tmp_path: Path) -> None:
    """GPT-2's are [in, out]."""
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 64, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    trainer = make_trainer(model=make_model("gpt2", **shape), rank=3)
    learn(trainer, objective)
    wanted = logits(merged_by_peft(trainer))
    trainer.export(None, tmp_path)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), wanted, rtol=1e-4, atol=1e-4)
    adapted = peft.PeftModel.from_pretrained(make_model("gpt2", **shape), tmp_path / "adapter")
    torch.testing.assert_close(logits(adapted.base_model.model), wanted, rtol=1e-4, atol=1e-4)


def test_weights_on_a_disk_are_the_merged_ones(objective: PolicyObjective, tmp_path: Path) -> None:
    trainer = make_trainer()
    learn(trainer, objective)
    update = trainer.export_weights(2, tmp_path)
    other = make_core(make_model(seed=4))
    other.pause("keep")
    other.update_weights(update)
    other.resume()
    prompts = [request("a", (5, 6, 7))]
    assert run_core(other, prompts)[0].token_ids == run_core(make_core(merged_by_peft(trainer)), prompts)[0].token_ids


@pytest.mark.parametrize("init_method", ["kaiming", "pissa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_state_goes_on_to_the_bit_dropout_and_all(
    dtype: torch.dtype, init_method: Any, objective: PolicyObjective, tmp_path: Path
) -> None:
    def trainer(seed: int) -> PolicyTrainer:
        return make_trainer(model=make_model().to(dtype), init_method=init_method, dropout=0.3, seed=seed)

    straight, first, second = trainer(1), trainer(1), trainer(1)
    learn(straight, objective, steps=5)
    learn(first, objective, steps=2)
    first.save(tmp_path)
    served = second.engine_model
    second.load(tmp_path)
    torch.rand(7)  # what else happens in a process
    assert second.version == 2
    for name, p in served.named_parameters():
        assert torch.equal(p, first.engine_model.get_parameter(name)), f"the engine starts from other weights: {name}"
    learn(second, objective, steps=3, first=2)
    for (name, a), b in zip(straight.model.state_dict().items(), second.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_checkpoint_has_the_adapters_only(objective: PolicyObjective, tmp_path: Path) -> None:
    whole = PolicyTrainer(make_model(), OptimizerSettings(lr=1e-2))
    learn(whole, objective)
    whole.save(tmp_path / "whole")
    trainer = make_trainer(rank=2)
    learn(trainer, objective)
    trainer.save(tmp_path / "adapters")
    sizes = [sum(file.stat().st_size for file in (tmp_path / name).iterdir()) for name in ("adapters", "whole")]
    assert sizes[0] < 0.3 * sizes[1]


@pytest.mark.parametrize("other", [{"rank": 8}, {"target_modules": ["q_proj"]}, {"init_method": "pissa"}])
def test_other_adapters_checkpoint_is_refused(other: dict[str, Any], tmp_path: Path) -> None:
    make_trainer().save(tmp_path)
    with pytest.raises(CheckpointError, match="adapters"):
        make_trainer(**other).load(tmp_path)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradient_checkpointing_changes_nothing_but_memory(
    dropout: float, objective: PolicyObjective, samples: Sequence[TrainingSample]
) -> None:
    """Frozen inputs and all: nothing but adapters has a gradient. Recomputed layers drop out the same numbers."""
    batch = pack(samples, max_tokens_per_micro_batch=60)
    found = []
    for gradient_checkpointing in (False, True):
        trainer = make_trainer("qwen3", gradient_checkpointing=gradient_checkpointing, dropout=dropout)
        calls: list[None] = []
        trainer.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(None))
        trainer.forward_backward(batch, objective)
        per_batch = len(calls) / len(batch.micro_batches[0])
        assert per_batch == (2 if gradient_checkpointing else 1) and not trainer.model.training
        found.append({name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad})
    assert all(torch.equal(gradient, found[1][name]) for name, gradient in found[0].items())
    assert any(gradient.abs().max() > 0 for gradient in found[0].values())


def test_dropout_is_in_the_gradient_pass_only_and_the_policy_is_still_its_own_old_one(
    objective: PolicyObjective, samples: Sequence[TrainingSample]
) -> None:
    batch = pack(samples, max_tokens_per_micro_batch=60)
    trainer, without = make_trainer(dropout=0.5), make_trainer()
    for each in (trainer, without):
        learn(each, objective, steps=1)
    without.model.load_state_dict(trainer.model.state_dict())
    for a, b in zip(trainer.forward(batch), without.forward(batch), strict=True):
        assert torch.equal(a, b), "log-probabilities that are compared have no dropout"

    def gradients(each: PolicyTrainer) -> tuple[dict[str, float], list[torch.Tensor]]:
        metrics = each.forward_backward(batch, objective)
        trained = [p for p in each.model.parameters() if p.requires_grad]
        result = [p.grad.clone() for p in trained if p.grad is not None]
        for p in trained:
            p.grad = None
        return metrics, result

    metrics, first = gradients(trainer)
    _, again = gradients(trainer)
    _, plain = gradients(without)
    assert metrics["policy/clip_frac"] == 0 and metrics["policy/ratio_mean"] == 1.0
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), "the masks are the version's"
    assert not all(torch.equal(a, b) for a, b in zip(first, plain, strict=True))
    trainer.version += 1
    _, later = gradients(trainer)
    assert not all(torch.equal(a, b) for a, b in zip(first, later, strict=True))


def test_the_models_own_dropout_is_still_refused() -> None:
    with pytest.raises(ConfigError, match="uses dropout"):
        Adapters(make_model(attention_dropout=0.1), LoraSettings(rank=2))


LINEAR = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["q_prj"]}, f"lora.target_modules: q_prj is no module of Qwen2ForCausalLM.* are {LINEAR}"),
        ({"target_modules": "proj"}, "proj is no module"),
        ({"target_modules": ["mlp"]}, "mlp is not a linear map"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens is not a linear map"),
        ({"target_modules": ["lm_head"]}, "lm_head is the head"),
        ({"exclude_modules": ["k_prj"]}, f"lora.exclude_modules: k_prj is no module.* are {LINEAR}"),
        ({"exclude_modules": LINEAR.split(", ")}, "leaves no module"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "leaves no module"),
    ],
)
def test_a_name_that_is_no_linear_map_is_refused_with_those_that_are(settings: dict[str, Any], message: str) -> None:
    model = make_model()
    with pytest.raises(ConfigError, match=message):
        Adapters(model, LoraSettings(rank=2, **settings))
    assert not any("lora" in name for name, _ in model.named_modules()), "the model is as it was"


def test_targets_and_exclusions_choose_the_modules() -> None:
    def names(**settings: Any) -> tuple[str, ...]:
        return Adapters(make_model(), LoraSettings(rank=2, **settings)).module_names

    assert len(names()) == 14, "seven maps in each of two layers, and not the head"
    assert names(target_modules="q_proj") == tuple(f"model.layers.{i}.self_attn.q_proj" for i in (0, 1))
    assert names(target_modules=["layers.1.mlp.up_proj"]) == ("model.layers.1.mlp.up_proj",)
    assert len(names(exclude_modules=["gate_proj", "layers.0.mlp.up_proj"])) == 11


def test_a_critic_of_adapters_trains_them_and_its_head_and_goes_on_to_the_bit(tmp_path: Path) -> None:
    def critic() -> CriticTrainer:
        network = ValueNetwork(make_model())
        adapters = Adapters(network.body, LoraSettings(rank=4, dropout=0.2))
        return CriticTrainer(network, OptimizerSettings(lr=1e-2), adapters=adapters)

    def train(trainer: CriticTrainer, steps: range) -> None:
        for step in steps:
            trainer.forward_backward(pack(with_targets(make_samples(seed=step)), max_tokens_per_micro_batch=60))
            trainer.optim_step()

    straight, first, second = critic(), critic(), critic()
    before = {name: p.detach().clone() for name, p in straight.network.named_parameters()}
    train(straight, range(4))
    changed = {name for name, p in straight.network.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "lora_" in name or name.startswith("head.")}
    train(first, range(2))
    first.save(tmp_path)
    second.load(tmp_path)
    train(second, range(2, 4))
    for (name, a), b in zip(straight.network.named_parameters(), second.network.parameters(), strict=True):
        assert torch.equal(a, b), name
