"""Policy losses, selections and the diagnosis on a CUDA device."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch

from skyrl_train.algorithms.kl import k3
from skyrl_train.algorithms.objective import PolicyObjective
from skyrl_train.algorithms.off_policy import Corrections
from skyrl_train.algorithms.policy_losses import POLICY_LOSSES
from skyrl_train.algorithms.reductions import sequence_mean
from skyrl_train.algorithms.selections import SELECTIONS
from skyrl_train.data.pack import pack
from skyrl_train.training.mismatch import EngineView, diagnose, first_mismatch
from skyrl_train.training.optimizer import OptimizerSettings
from skyrl_train.training.trainer import PolicyTrainer
from skyrl_train.types import SamplingParams
from tests.tiny import make_model
from tests.training.batches import as_sampled_by, make_samples

pytestmark = pytest.mark.gpu
SETTINGS = OptimizerSettings(lr=1e-3)
SELECT_OPTIONS: dict[str, dict[str, float]] = {
    "clip_cov": {"clip_cov_ratio": 0.2, "clip_cov_lb": 0.0, "clip_cov_ub": 100.0},
    "kl_cov": {"kl_cov_frac": 0.3},
}


@pytest.mark.parametrize("loss", POLICY_LOSSES)
def test_a_losss_gradient_in_float32_equals_the_cpus(loss: str) -> None:
    objective = PolicyObjective(
        policy_loss=POLICY_LOSSES[loss],
        reduction=sequence_mean,
        kl=k3,
        kl_loss_coef=0.1,
        entropy_loss_coef=0.01,
        select=partial(SELECTIONS[loss], **SELECT_OPTIONS[loss]) if loss in SELECTIONS else None,
        corrections=Corrections(
            tis_cap=2.0, sequence_mask="geometric", sequence_mask_low=0.01, sequence_mask_high=50.0
        ),
    )
    batch = pack(make_samples(), max_tokens_per_micro_batch=60)
    old = PolicyTrainer(make_model("qwen2", seed=0), SETTINGS).forward(batch)
    results: list[tuple[dict[str, float], list[torch.Tensor]]] = []
    for device in ("cpu", "cuda"):
        model: Any = make_model("qwen2").to(device)
        trainer = PolicyTrainer(model, SETTINGS, reference=make_model("qwen2", seed=1).to(device), version=5)
        metrics = trainer.forward_backward(
            batch,
            objective,
            old_logprobs=[(logprobs - 0.05).to(device) for logprobs in old],
            ref_logprobs=trainer.forward(batch, which="reference"),
        )
        results.append((metrics, [p.grad.to("cpu", copy=True) for p in model.parameters() if p.grad is not None]))
    (wanted, gradients), (found, found_gradients) = results
    assert found == pytest.approx(wanted, rel=1e-3, abs=1e-5)
    largest = max(float(gradient.abs().max()) for gradient in gradients)
    for a, b in zip(found_gradients, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * largest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_that_computes_something_else_is_named(dtype: torch.dtype) -> None:
    trainer = PolicyTrainer(make_model("qwen3").to("cuda", dtype), SETTINGS)
    engine = copy.deepcopy(trainer.model)
    engine.model.layers[1].self_attn.o_proj.register_forward_hook(lambda module, inputs, output: 1.5 * output)
    batch = pack(as_sampled_by(engine, make_samples()), max_tokens_per_micro_batch=33)
    first = first_mismatch(batch, trainer.forward(batch), 0.5)
    assert first is not None
    view = EngineView(
        logprob_space="temperature",
        sampling=SamplingParams(max_new_tokens=9),
        version=lambda: trainer.version,
        module=engine,
    )
    diagnosis = diagnose(first, batch, trainer, view)
    assert (diagnosis.cause, diagnosis.layer) == ("layer", "layers.1")
    assert "are equal (checksum" in diagnosis.weights
