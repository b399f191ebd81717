"""What doesn't fit is refused by name, before anything is served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from skyrl_train.engines.embedded.adapters.adapter import make_adapter
from skyrl_train.engines.embedded.adapters.folder import read_adapter_folder
from skyrl_train.engines.embedded.adapters.settings import LoraLimits
from skyrl_train.engines.embedded.adapters.sites import find_sites
from skyrl_train.errors import ConfigError, WeightUpdateError
from skyrl_train.types import AdapterWeights
from tests.engines.embedded.adapters.common import base, make_adapted, random_adapter, save

SITES = find_sites(base(), None)


def refusal(weights: AdapterWeights, **limits: Any) -> str:
    with pytest.raises(WeightUpdateError) as caught:
        make_adapter("mine", 1, weights, SITES, **{"max_rank": None, **limits})
    assert str(caught.value).startswith("adapter mine: ")
    return str(caught.value)


def changed(config: dict[str, Any] | None = None, **tensors: torch.Tensor | None) -> AdapterWeights:
    """A good one with other keys in its config, tensors that end so replaced, or (None) left out."""
    good = random_adapter(1)
    kept = {name: tensor for name, tensor in good.tensors.items() if not any(name.endswith(end) for end in tensors)}
    new = {f"base_model.model.{end}": tensor for end, tensor in tensors.items() if tensor is not None}
    return AdapterWeights(tensors={**kept, **new}, config={**good.config, **(config or {})})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is IA3"),
        ({"bias": "all"}, "bias is 'all', only \"none\""),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is ['lm_head']"),
        ({"use_dora": True}, "use_dora is True"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern is"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
        ({"r": None}, "needs r, a rank"),
        ({"lora_alpha": "high"}, "needs lora_alpha, a number; found 'high'"),
        ({"r": 8}, "the model and the rank ask for"),
    ],
)
def test_a_config_that_means_something_else(config: dict[str, Any], message: str) -> None:
    assert message in refusal(changed(config))


def test_tensors_that_are_no_pair_of_a_linear_map() -> None:
    q = "model.layers.0.self_attn.q_proj"
    assert f"{q} has no .lora_B.weight" in refusal(changed(**{f"{q}.lora_B.weight": None}))
    assert "lora_A and lora_B are ((4, 7)" in refusal(changed(**{f"{q}.lora_A.weight": torch.zeros(4, 7)}))
    nan = torch.full((4, 64), float("nan"))
    assert f"{q} has numbers that are not finite" in refusal(changed(**{f"{q}.lora_A.weight": nan}))
    unknown = {"model.embed_tokens.lora_embedding_A": torch.zeros(4, 300)}
    assert "no lora_A or lora_B of a linear map: base_model.model.model.embed" in refusal(changed(**unknown))
    head = {"lm_head.lora_A.weight": torch.zeros(4, 64), "lm_head.lora_B.weight": torch.zeros(300, 4)}
    assert "can't be changed here: lm_head; adapters may change down_proj" in refusal(changed(**head))
    assert "has no pair" in refusal(AdapterWeights(tensors={}, config=random_adapter(1).config))


def test_a_rank_over_the_bound() -> None:
    assert "its rank is 4, generator.lora.max_rank is 3" in refusal(random_adapter(1), max_rank=3)


def test_modules_outside_of_those_that_may_change(tmp_path: Path) -> None:
    folder = save(random_adapter(1), tmp_path / "a")
    with pytest.raises(ConfigError, match=r"generator.lora.paths.mine: adapter mine: .* may change q_proj, v_proj"):
        make_adapted(LoraLimits(paths={"mine": folder}, target_modules=("q_proj", "v_proj")))
    with pytest.raises(ConfigError, match=r"q_prj is no linear map of Qwen3ForCausalLM .* it has down_proj"):
        make_adapted(LoraLimits(target_modules=("q_prj",)))


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(WeightUpdateError, match=r"no such folder"):
        read_adapter_folder(str(tmp_path / "absent"))
    with pytest.raises(WeightUpdateError, match=r"has no adapter_config.json and no adapter_model.safetensors"):
        read_adapter_folder(str(tmp_path))
    save(random_adapter(1), tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(WeightUpdateError, match="save it with safe_serialization=True"):
        read_adapter_folder(str(tmp_path))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(WeightUpdateError, match="can't read the adapter"):
        read_adapter_folder(str(tmp_path))
    save(random_adapter(1), tmp_path)
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(WeightUpdateError, match="holds list, a mapping is needed"):
        read_adapter_folder(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(WeightUpdateError, match="can't read the adapter"):
        read_adapter_folder(str(tmp_path))


def test_what_it_was_made_from_may_change_afterwards(tmp_path: Path) -> None:
    weights = random_adapter(1)
    made = make_adapter("mine", 1, weights, SITES, max_rank=None)
    site = next(iter(made.pairs))
    before = made.pairs[site].low.clone()
    for tensor in weights.tensors.values():
        tensor.zero_()
    assert torch.equal(made.pairs[site].low, before) and json.dumps(dict(weights.config))


@pytest.mark.parametrize("name", ["max_rank", "max_in_batch", "max_loaded"])
def test_limits_are_at_least_one(name: str) -> None:
    with pytest.raises(ConfigError, match=f"lora.{name} must be at least 1, found 0"):
        LoraLimits(**{name: 0})
