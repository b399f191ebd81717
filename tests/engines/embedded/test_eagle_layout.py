"""Draft heads from and to folders: published names load, wrong ones are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from skyrl_train.engines.embedded.drafts.eagle.fresh import fresh_eagle3
from skyrl_train.engines.embedded.drafts.eagle.head import Eagle3Head, EagleHead, Target
from skyrl_train.engines.embedded.drafts.eagle.layout import default_taps, load_head, save_head
from skyrl_train.errors import ConfigError
from tests.contract import models
from tests.tiny import VOCAB_SIZE, make_model

WORDS = range(0, VOCAB_SIZE, 4)
EAGLE_3 = {
    "fc.weight": (64, 192),
    "midlayer.hidden_norm.weight": (64,),
    "midlayer.input_layernorm.weight": (64,),
    "midlayer.mlp.down_proj.weight": (64, 128),
    "midlayer.mlp.gate_proj.weight": (128, 64),
    "midlayer.mlp.up_proj.weight": (128, 64),
    "midlayer.post_attention_layernorm.weight": (64,),
    "midlayer.self_attn.k_proj.weight": (32, 128),
    "midlayer.self_attn.o_proj.weight": (64, 64),
    "midlayer.self_attn.q_proj.weight": (64, 128),
    "midlayer.self_attn.v_proj.weight": (32, 128),
    "norm.weight": (64,),
    "lm_head.weight": (75, 64),
    "d2t": (75,),
    "t2d": (300,),
}
"""Of SafeAILab/EAGLE's releases (yuhuili/EAGLE3-*), in the tiny model's sizes."""


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make_model("llama", seed=3, num_hidden_layers=8)


@pytest.fixture
def folder(model: PreTrainedModel, tmp_path: Path) -> Path:
    return save_head(fresh_eagle3(model, seed=1, word_ids=WORDS), tmp_path / "head", num_layers=8)


def load(folder: Path, model: PreTrainedModel, algorithm: Any = "eagle3") -> EagleHead | Eagle3Head:
    return load_head(folder, algorithm, Target.of(model), dtype=torch.float32)


def change(folder: Path, **changes: Any) -> None:
    """Keys of the config; None takes one out."""
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


def rewrite(folder: Path, change_tensors: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(change_tensors(tensors), folder / "model.safetensors")


def test_a_saved_head_has_the_published_names_and_shapes(folder: Path) -> None:
    assert {name: tuple(t.shape) for name, t in load_file(folder / "model.safetensors").items()} == EAGLE_3
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"] and config["draft_vocab_size"] == 75
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, 3, 4]
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5]


def test_a_head_comes_back_to_the_bit(folder: Path, model: PreTrainedModel) -> None:
    saved, loaded = fresh_eagle3(model, seed=1, word_ids=WORDS), load(folder, model)
    assert isinstance(loaded, Eagle3Head) and loaded.taps == saved.taps == (1, 3, 4)
    for name, tensor in saved.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_a_head_of_all_words_has_no_map(model: PreTrainedModel, tmp_path: Path) -> None:
    folder = save_head(fresh_eagle3(model, seed=1), tmp_path / "head", num_layers=8)
    assert not {"d2t", "t2d"} & load_file(folder / "model.safetensors").keys()
    head = load(folder, model)
    assert isinstance(head, Eagle3Head) and head.lm_head is not None and head.lm_head.out_features == VOCAB_SIZE


def test_older_and_newer_forms_of_the_files_load(folder: Path, model: PreTrainedModel) -> None:
    expected = load(folder, model).state_dict()
    embedding = {"embed_tokens.weight": torch.zeros(VOCAB_SIZE, 64)}
    rewrite(folder, lambda ts: {n.replace("midlayer", "layers.0"): t for n, t in ts.items() if n != "t2d"} | embedding)
    assert all(torch.equal(load(folder, model).state_dict()[name], tensor) for name, tensor in expected.items())
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert all(torch.equal(load(folder, model).state_dict()[name], tensor) for name, tensor in expected.items())


def test_without_layers_in_the_config_they_are_those_of_the_servers(folder: Path, model: PreTrainedModel) -> None:
    change(folder, eagle_config=None)
    assert load(folder, model).taps == (1, 3, 4)
    change(folder, eagle_aux_hidden_state_layer_ids=None)
    assert load(folder, model).taps == (1, 3, 4)
    assert default_taps(32) == (1, 15, 28)
    assert [default_taps(n) for n in (1, 2, 3, 4, 6)] == [(-1,), (-1, 0), (-1, 0, 1), (0, 1, 2), (0, 2, 4)]


@pytest.mark.parametrize(
    ("change_tensors", "message"),
    [
        (lambda ts: ts | {"fc.weight": torch.zeros(64, 128)}, r"fc\.weight \(wanted float32 \[64, 192\], found"),
        (lambda ts: {n: t for n, t in ts.items() if n != "norm.weight"}, r"1 missing: norm\.weight"),
        (
            lambda ts: ts | {"midlayer.self_attn.q_norm.weight": torch.ones(16)},
            r"1 unknown: midlayer\.self_attn\.q_norm",
        ),
        (lambda ts: ts | {"t2d": ts["t2d"].long()}, r"t2d \(wanted bool \[300\], found int64"),
        (lambda ts: ts | {"d2t": ts["d2t"].flip(0)}, "rising token ids below 300"),
        (lambda ts: ts | {"t2d": ~ts["t2d"]}, "d2t and t2d name different tokens"),
        (lambda ts: {n: t for n, t in ts.items() if n not in ("d2t", "t2d")}, "no d2t says which"),
        (lambda ts: {n: t for n, t in ts.items() if n != "lm_head.weight"}, "no lm_head.weight"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(
    folder: Path, model: PreTrainedModel, change_tensors: Any, message: str
) -> None:
    rewrite(folder, change_tensors)
    with pytest.raises(ConfigError, match=message):
        load(folder, model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 32}, "hidden_size is 32, the model's 64; it is for another model"),
        ({"vocab_size": 301}, "vocab_size is 301, the model's 300"),
        ({"num_hidden_layers": 2}, "has 2 layers"),
        ({"norm_before_residual": True}, "norm_before_residual makes it a variant"),
        ({"model_type": "qwen3"}, "model_type 'qwen3' is not built"),
        (
            {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 3, 8]}},
            r"layers \[1, 3, 8\], the model has layers",
        ),
    ],
)
def test_a_head_for_another_model_is_refused(
    folder: Path, model: PreTrainedModel, changes: dict[str, Any], message: str
) -> None:
    change(folder, **changes)
    with pytest.raises(ConfigError, match=message):
        load(folder, model)


def test_a_folder_without_a_head_is_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't read the draft head's"):
        load(tmp_path, model)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLMEagle", "LlamaForCausalLM"])
def test_the_head_that_sglang_and_vllm_take_loads_here(architecture: str, tmp_path: Path) -> None:
    """The contract suite starts both servers with it."""
    folder = models.save_eagle_head(tmp_path / "head", architecture)
    head = load(folder, models.policy(), "eagle")
    assert isinstance(head, EagleHead) and head.taps == (2,)
    assert (head.fc.bias is not None) == (architecture == "LlamaForCausalLMEagle")
    with pytest.raises(ConfigError, match="not those of an eagle3 head"):
        load(folder, models.policy(), "eagle3")
