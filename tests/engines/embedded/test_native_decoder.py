from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from skyrl_train.engines.embedded.core import EngineCore
from skyrl_train.engines.embedded.native_decoder import NativeDecoder
from skyrl_train.types import LocalWeights, WeightUpdate
from tests.engines.embedded.common import make_core, random_prompts, request, run
from tests.engines.embedded.test_twin import with_random_norms
from tests.tiny import make_model

HEAD_32 = {"hidden_size": 128, "head_dim": 32}
SAME_FORM = ("qwen2", "qwen3", "llama", "mistral")


def runner_of(core: EngineCore) -> Any:
    return core._runner


def direct(core: EngineCore) -> NativeDecoder | None:
    found: NativeDecoder | None = runner_of(core)._direct
    return found


def through_the_twin(core: EngineCore) -> EngineCore:
    runner_of(core)._direct = None
    return core


def logits_of_each_step(core: EngineCore, asked: Any) -> list[torch.Tensor]:
    seen: list[torch.Tensor] = []
    runner = runner_of(core)
    compute = runner.logits

    def noted(plan: Any) -> torch.Tensor:
        out: torch.Tensor = compute(plan)
        seen.append(out.clone())
        return out

    runner.logits = noted
    run(core, asked)
    return seen


@pytest.mark.parametrize("arch", SAME_FORM)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 9])
def test_a_step_in_one_call_computes_what_the_twin_computes(arch: str, dtype: torch.dtype, window: int | None) -> None:
    own = {"sliding_window": window, "use_sliding_window": True, "max_window_layers": 1} if arch == "qwen2" else {}
    if window is not None and arch != "qwen2":
        own = {"sliding_window": window} if arch == "mistral" else {}
    shape = {key: value for key, value in HEAD_32.items() if arch != "qwen2" or key != "head_dim"}
    prompts = random_prompts(3, 30, 11)
    asked = [request(str(i), prompt, 8, ignore_eos=True) for i, prompt in enumerate(prompts)]
    models = [with_random_norms(arch, **shape, **own).to(dtype) for _ in range(2)]
    quick, slow = make_core(models[0]), through_the_twin(make_core(models[1]))
    assert direct(quick) is not None
    for mine, theirs in zip(logits_of_each_step(quick, asked), logits_of_each_step(slow, asked), strict=True):
        rounding = 1e-6 if dtype == torch.float32 else 1 / 128
        assert torch.allclose(mine.float(), theirs.float(), atol=rounding * float(theirs.abs().max()))


@pytest.mark.parametrize("arch", ["gemma3_text", "olmo2", "phi3", "gpt2"])
def test_other_forms_go_through_the_twin(arch: str) -> None:
    assert direct(make_core(make_model(arch))) is None


def test_without_packed_weights_there_is_no_step_in_one_call() -> None:
    assert direct(make_core(make_model("llama", **HEAD_32), pack_weights=False)) is None
    assert direct(make_core(make_model("llama", **HEAD_32))) is not None


def test_every_update_reaches_the_next_step() -> None:
    """In place by the counter, behind it, a new parameter, new submodules: answers are those of a new engine."""
    model = make_model("llama", **HEAD_32)
    core = make_core(model)
    (prompt,) = random_prompts(9)
    layer = model.model.layers[0]

    def answer(engine: EngineCore) -> tuple[int, ...]:
        return run(engine, [request("a", prompt, 12, ignore_eos=True)])[0].token_ids

    def change(what: int) -> None:
        with torch.no_grad():
            if what == 0:
                layer.mlp.down_proj.weight.mul_(-3)
            elif what == 1:
                layer.self_attn.o_proj.weight.data.mul_(-3)
            elif what == 2:
                layer.input_layernorm.weight = nn.Parameter(torch.randn(128))
            elif what == 3:
                layer.self_attn.v_proj = nn.Linear(128, 64, bias=True)
            else:
                layer.mlp.up_proj = nn.Sequential(nn.Linear(128, 128, bias=False))

    seen = [answer(core)]
    for what in range(5):
        change(what)
        core.pause("keep")
        core.update_weights(WeightUpdate(version=what + 1, source=LocalWeights()))
        core.resume()
        assert (direct(core) is None) == (what == 4)
        seen.append(answer(core))
        assert seen[-1] == answer(through_the_twin(make_core(model)))
    assert len(set(seen)) == len(seen), "a change that changes nothing proves nothing"


def test_weights_of_another_type_go_through_the_twin() -> None:
    model = make_model("llama", **HEAD_32)
    core = make_core(model)
    model.model.layers[1].mlp.down_proj.to(torch.bfloat16)
    with pytest.raises(RuntimeError, match="dtype"):  # what the model itself says of it
        run(core, [request("a", (1, 2, 3), 2)])
