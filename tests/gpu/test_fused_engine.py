"""The embedded engine with cuda_kernels="fused": what it answers is what the plain kernels answer."""

import asyncio
from dataclasses import replace

import pytest
import torch

from skyrl_train.engines.embedded import fused_runner, prefix_groups
from skyrl_train.engines.embedded.cuda_runner import CudaRunner
from skyrl_train.engines.embedded.engine import EmbeddedEngine
from skyrl_train.engines.embedded.fused_runner import FusedRunner
from skyrl_train.types import Completion, LocalWeights, SamplingParams, WeightUpdate
from tests.gpu.test_engine_cuda import CONFIG, PROMPTS, run
from tests.tiny import make_model, make_tokenizer

pytestmark = pytest.mark.gpu

FUSED = replace(CONFIG, cuda_kernels="fused")
SHAPE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}


def both(arch: str, dtype: torch.dtype, sampling: SamplingParams, prompts=PROMPTS):
    model = make_model(arch, **SHAPE).to("cuda", dtype)
    plain = run(EmbeddedEngine(model, make_tokenizer(), config=CONFIG), sampling, prompts)
    engine = EmbeddedEngine(model, make_tokenizer(), config=FUSED)
    assert isinstance(engine.core._runner, FusedRunner)
    return plain, run(engine, sampling, prompts), engine


def common(a: Completion, b: Completion) -> int:
    """Tokens before the first difference."""
    pairs = zip(a.token_ids, b.token_ids, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a.token_ids), len(b.token_ids)))


@pytest.mark.parametrize(("arch", "temperature"), [("qwen2", 0.0), ("qwen3", 1.0), ("llama", 1.0), ("mistral", 0.0)])
def test_float32_tokens_are_the_plain_ones(arch: str, temperature: float) -> None:
    plain, fused, _ = both(arch, torch.float32, SamplingParams(max_new_tokens=40, temperature=temperature))
    same = [a.token_ids == b.token_ids for a, b in zip(plain, fused, strict=True)]
    assert sum(same) >= len(same) - 1, same  # a rounding at a boundary may turn one
    for a, b in zip(plain, fused, strict=True):
        n = common(a, b)
        assert torch.allclose(torch.tensor(a.logprobs[:n]), torch.tensor(b.logprobs[:n]), atol=2e-4)


@pytest.mark.parametrize("arch", ["qwen2", "qwen3"])
def test_bfloat16_log_probabilities_are_those_of_transformers(arch: str) -> None:
    sampling = SamplingParams(max_new_tokens=40, temperature=1.0, ignore_eos=True)
    _, fused, _ = both(arch, torch.bfloat16, sampling)
    reference = make_model(arch, attn_implementation="eager", **SHAPE).to("cuda", torch.bfloat16)
    worst, total, count = 0.0, 0.0, 0
    for ids, got in zip(PROMPTS, fused, strict=True):
        whole = torch.tensor([[*ids, *got.token_ids]], device="cuda")
        with torch.no_grad():
            logprobs = reference(whole).logits[0, len(ids) - 1 : -1].float().log_softmax(-1)
        wanted = logprobs.gather(1, whole[0, len(ids) :, None])[:, 0].cpu()
        difference = (torch.tensor(got.logprobs) - wanted).abs()
        worst, total, count = max(worst, float(difference.max())), total + float(difference.sum()), count + len(wanted)
    assert worst < 0.25 and total / count < 0.06, (worst, total / count)


@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 0.8},
        {"top_k": 5},
        {"min_p": 0.1},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.2},
        {"min_new_tokens": 30},
        {"min_new_tokens": 20, "stop_token_ids": tuple(range(80))},
        {"stop": ("a",)},
    ],
)
def test_sampling_rules_on_the_device_are_the_hosts(options) -> None:
    plain, fused, engine = both("qwen2", torch.float32, SamplingParams(max_new_tokens=40, **options))
    pairs = list(zip(plain, fused, strict=True))
    same = [
        (a.token_ids, a.finish_reason, a.stop_reason) == (b.token_ids, b.finish_reason, b.stop_reason) for a, b in pairs
    ]
    assert sum(same) >= len(same) - 1, same
    if "stop" not in options and "stop_token_ids" not in options:
        assert any(form.has_rules for form in engine.core._runner._steps)


def test_samples_of_one_prompt_read_it_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_runner, "MIN_SAVED_BYTES", 0)
    monkeypatch.setattr(prefix_groups, "MIN_LENGTH", 16)
    prompts = [PROMPTS[8]] * 7 + [PROMPTS[5]] * 5
    plain, fused, engine = both("qwen2", torch.float32, SamplingParams(max_new_tokens=40), prompts)
    assert any(form.shares for form in engine.core._runner._steps)
    same = [a.token_ids == b.token_ids for a, b in zip(plain, fused, strict=True)]
    assert sum(same) >= len(same) - 1, same


def test_graphs_follow_weights_in_place_and_in_new_memory() -> None:
    sampling = SamplingParams(max_new_tokens=8, temperature=0, ignore_eos=True)
    model = make_model("qwen2").to("cuda")
    engine = EmbeddedEngine(model, make_tokenizer(), config=FUSED)
    run(engine, sampling)
    for version, in_place in ((1, True), (2, False)):

        async def update(version: int = version, in_place: bool = in_place) -> None:
            await engine.pause()
            with torch.no_grad():
                for module in model.modules():
                    for name, parameter in list(module._parameters.items()):
                        if parameter is None:
                            continue
                        if in_place:
                            parameter.mul_(-0.5)
                        else:
                            module._parameters[name] = torch.nn.Parameter(parameter * 1.5)
            await engine.update_weights(WeightUpdate(version=version, source=LocalWeights()))
            await engine.resume()

        asyncio.run(update())
        after = run(engine, sampling)
        fresh = run(EmbeddedEngine(model, make_tokenizer(), config=CONFIG), sampling)
        assert [c.token_ids for c in after] == [c.token_ids for c in fresh]
    assert engine.core._runner.decoder.num_packed == 0  # type: ignore[attr-defined]


def test_a_model_of_another_form_is_served_by_the_plain_kernels() -> None:
    model = make_model("olmo2").to("cuda")
    with pytest.warns(UserWarning, match="plain ones do"):
        engine = EmbeddedEngine(model, make_tokenizer(), config=FUSED)
    assert type(engine.core._runner) is CudaRunner
    assert len(run(engine, SamplingParams(max_new_tokens=4, ignore_eos=True))) == len(PROMPTS)
