"""An engine beside the trainer: the frozen model is one and the same, the adapter is a snapshot."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from skyrl_train.algorithms.objective import PolicyObjective
from skyrl_train.attention import ATTENTION_NAME
from skyrl_train.data.pack import pack
from skyrl_train.engines.embedded.adapters.settings import LoraLimits
from skyrl_train.engines.embedded.config import EmbeddedConfig
from skyrl_train.engines.embedded.core import EngineCore
from skyrl_train.engines.embedded.engine import EmbeddedEngine
from skyrl_train.entrypoints.build_adapters import merged_view
from skyrl_train.training.trainer import PolicyTrainer
from skyrl_train.types import TrainingSample
from skyrl_train.weight_sync.sync import sync_weights
from tests.engines.embedded.common import make_core, random_prompts, request
from tests.engines.embedded.common import run as run_core
from tests.tiny import make_model, make_tokenizer
from tests.training.batches import as_sampled_by, make_samples
from tests.training.test_engine_agreement import sample_groups
from tests.training.test_lora import INITS, learn, make_trainer
from tests.training.test_mismatch import corrupted, found_by, view


def adapted_core(trainer: PolicyTrainer) -> EngineCore:
    core = make_core(trainer.frozen_base(), lora=LoraLimits())
    give(core, trainer)
    return core


def give(core: EngineCore, trainer: PolicyTrainer) -> None:
    core.pause("keep")
    core.update_weights(trainer.export_adapter(trainer.version, for_base_model=True))
    core.resume()


@pytest.mark.parametrize("init_method", INITS)
@pytest.mark.parametrize("arch", ["qwen2", "gemma3_text", "phi3"])
def test_the_engine_answers_as_the_merged_model(arch: str, init_method: Any, objective: PolicyObjective) -> None:
    trainer = make_trainer(arch, init_method=init_method)
    core = adapted_core(trainer)
    learn(trainer, objective, steps=3)
    give(core, trainer)
    prompts = [request(str(i), prompt) for i, prompt in enumerate(random_prompts(5, 17, 30))]
    found, wanted = run_core(core, prompts), run_core(make_core(trainer.engine_model), prompts)
    start = run_core(make_core(make_model(arch)), prompts)
    assert [c.token_ids for c in found] == [c.token_ids for c in wanted] != [c.token_ids for c in start]
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)


@pytest.mark.parametrize("init_method", INITS)
def test_every_tensor_is_the_trainers_and_training_reaches_none_that_is_served(
    init_method: Any, objective: PolicyObjective
) -> None:
    trainer = make_trainer(init_method=init_method)
    core = adapted_core(trainer)
    trained = {tensor.data_ptr() for tensor in (*trainer.model.parameters(), *trainer.model.buffers())}
    served = [*core.model.parameters(), *core.model.buffers()]
    assert {tensor.data_ptr() for tensor in served} <= trained
    assert core.adapters is not None and core.adapters.policy is not None
    served += [tensor for pair in core.adapters.policy.pairs.values() for tensor in (pair.low, pair.high)]
    before = [tensor.clone() for tensor in served]
    learn(trainer, objective)
    assert all(torch.equal(tensor, old) for tensor, old in zip(served, before, strict=True))


@pytest.mark.parametrize("init_method", ["kaiming", "pissa"])
async def test_rollouts_and_trainer_agree_after_each_update(init_method: Any, objective: PolicyObjective) -> None:
    trainer = make_trainer(model=make_model("qwen2", tie_word_embeddings=True), alpha=32.0, init_method=init_method)
    config = EmbeddedConfig(max_context_len=64, lora=LoraLimits())
    engine = EmbeddedEngine(trainer.frozen_base(), make_tokenizer(), config=config)
    try:
        await sync_weights(engine, trainer.export_adapter(0, for_base_model=True))
        for _ in range(3):
            batch = pack(await sample_groups(engine, temperature=1.0), max_tokens_per_micro_batch=100)
            metrics = trainer.forward_backward(batch, objective)
            assert metrics["policy/rollout_logprob_abs_diff_max"] < 2e-5
            await sync_weights(engine, trainer.export_adapter(trainer.optim_step(), for_base_model=True))
    finally:
        await engine.close()


@pytest.mark.parametrize("init_method", ["gaussian", "pissa"])
async def test_where_engine_and_trainer_part_the_adapter_is_looked_at_merged(
    init_method: Any, objective: PolicyObjective
) -> None:
    trainer = make_trainer(init_method=init_method, target_modules=["q_proj"], lr=0.5)
    config = EmbeddedConfig(max_context_len=64, lora=LoraLimits())
    engine = EmbeddedEngine(trainer.frozen_base(), make_tokenizer(), config=config)
    await sync_weights(engine, trainer.export_adapter(0, for_base_model=True))

    def diagnosis(samples: list[TrainingSample]) -> Any:
        return found_by(trainer, samples, view(None, make_module=lambda: merged_view(engine)))

    samples = as_sampled_by(trainer.engine_model, make_samples())
    wrong = diagnosis(corrupted(samples, 0, -1, -50.0))
    assert (wrong.cause, wrong.tensor, wrong.layer) == ("rollout", None, None)
    trainer.forward_backward(pack(samples, micro_batch_size=12), objective)
    trainer.optim_step()
    stale = diagnosis(samples)
    assert (stale.cause, stale.tensor) == ("weights", "model.layers.0.self_attn.q_proj.weight")
    assert "2 of " in stale.weights and stale.layer == "layers.0"
    await engine.close()


def test_maps_stored_the_other_way_round() -> None:
    """GPT-2's Conv1D holds [in, out]."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=300, n_positions=128, n_embd=64, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    model = GPT2LMHeadModel._from_config(config, attn_implementation=ATTENTION_NAME)
    trainer = make_trainer(model=model.eval())
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    core = adapted_core(trainer)
    prompts = [request(str(i), prompt) for i, prompt in enumerate(random_prompts(5, 17, 30))]
    found, wanted = run_core(core, prompts), run_core(make_core(trainer.engine_model), prompts)
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.token_ids == theirs.token_ids
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)
