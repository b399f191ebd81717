"""Models in and out of HF folders, and heads whose logits are more than a product."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from skyrl_train.data.pack import pack
from skyrl_train.errors import ConfigError
from skyrl_train.training.attention import packed_attention
from skyrl_train.training.model import PolicyHead, export_hf, load_model, refuse_dropout
from skyrl_train.types import TrainingSample
from tests.tiny import ARCHITECTURES, make_model, make_tokenizer

CPU = torch.device("cpu")


def wanted_logprobs(model: PreTrainedModel, samples: Sequence[TrainingSample], temperature: float) -> list[float]:
    """One sample at a time through transformers' own attention, in the order of sample and token."""
    found = []
    for sample in sorted(samples, key=lambda s: s.trajectory_id):
        with torch.no_grad():
            logits = model(input_ids=sample.token_ids[None]).logits[0].double()
        logp = torch.log_softmax(logits / temperature, dim=-1)
        found += [float(logp[at - 1, sample.token_ids[at]]) for at in sample.loss_mask.nonzero()[:, 0].tolist()]
    return found


def packed_logprobs(model: PreTrainedModel, samples: Sequence[TrainingSample], temperature: float) -> list[float]:
    """The same list from one packed row."""
    head = PolicyHead(model, temperature=temperature)
    ((m,),) = pack(sorted(samples, key=lambda s: s.trajectory_id), max_tokens_per_micro_batch=10_000).micro_batches
    with torch.no_grad():
        context = packed_attention(m, device=CPU, dtype=model.dtype)
        result = head(m.token_ids, m.position_ids, m.predict_rows, m.target_ids, context)
    rows = zip([m.trajectory_ids[i] for i in m.sample_index.tolist()], result.logprobs.tolist(), strict=True)
    return [logprob for _, logprob in sorted(rows, key=lambda row: row[0])]


@pytest.mark.parametrize(
    ("arch", "overrides"),
    [
        *((arch, {}) for arch in ARCHITECTURES),
        ("mistral", {"sliding_window": 5}),
        ("gemma3_text", {"sliding_window": 4, "final_logit_softcapping": 2.0}),
        ("cohere", {"logit_scale": 0.25, "tie_word_embeddings": True}),
        ("granite", {"logits_scaling": 4.0}),
        ("qwen2", {"tie_word_embeddings": True}),
    ],
)
def test_packed_logprobs_equal_transformers_one_sample_at_a_time(
    arch: str, overrides: dict[str, object], samples: Sequence[TrainingSample]
) -> None:
    ours = make_model(arch, **overrides)
    theirs = make_model(arch, attn_implementation="eager", **overrides)
    found = packed_logprobs(ours, samples, 0.8)
    torch.testing.assert_close(
        torch.tensor(found), torch.tensor(wanted_logprobs(theirs, samples, 0.8)), rtol=0, atol=2e-5
    )


def test_the_cap_is_seen_even_where_logits_are_small() -> None:
    """A probe with the model's own small logits would take Gemma's tanh for the identity."""
    model = make_model("gemma3_text", final_logit_softcapping=30.0, initializer_range=1e-4)
    assert PolicyHead(model, temperature=1.0)._transform.softcap == 30.0


def test_an_unknown_change_of_the_logits_is_refused_by_name() -> None:
    model = make_model("qwen2")
    forward = model.forward

    def shifted(*args: object, **kwargs: object) -> object:
        out = forward(*args, **kwargs)
        out.logits = out.logits.abs()
        return out

    model.forward = shifted  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match="Qwen2ForCausalLM: its logits are not its head's output"):
        PolicyHead(model, temperature=1.0)


def test_a_head_that_reads_something_else_is_refused_by_name() -> None:
    model = make_model("qwen2")
    model.lm_head.register_forward_pre_hook(lambda _, inputs: (inputs[0] / 2,))
    with pytest.raises(ConfigError, match="Qwen2ForCausalLM: its head does not read the last hidden state"):
        PolicyHead(model, temperature=1.0)


def test_soft_capped_attention_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"Gemma2ForCausalLM can't be trained here: .*soft-capped"):
        PolicyHead(make_model("gemma2", head_dim=16), temperature=1.0)


def test_training_at_temperature_0_is_refused() -> None:
    with pytest.raises(ConfigError, match="temperature > 0, found 0"):
        PolicyHead(make_model("qwen2"), temperature=0)


def test_dropout_is_refused_by_module() -> None:
    with pytest.raises(
        ConfigError, match=r"Qwen2ForCausalLM uses dropout in model\.layers\.0\.self_attn\.attention_dropout"
    ):
        refuse_dropout(make_model("qwen2", attention_dropout=0.1))


def test_an_export_loads_in_transformers_with_equal_logits(tmp_path: Path) -> None:
    model = make_model("qwen3", seed=3)
    folder = export_hf(model, make_tokenizer(), tmp_path / "export")
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    token_ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        wanted = make_model("qwen3", seed=3, attn_implementation="eager")(input_ids=token_ids).logits
        torch.testing.assert_close(theirs(input_ids=token_ids).logits, wanted, rtol=0, atol=1e-5)
    assert AutoTokenizer.from_pretrained(folder).decode([72, 105]) == make_tokenizer().decode([72, 105])
    again = load_model(folder)
    for (name, ours), exported in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, exported), name


def test_an_export_keeps_the_dtype(tmp_path: Path) -> None:
    folder = export_hf(make_model("llama").bfloat16(), None, tmp_path / "export")
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16


def test_an_export_replaces_an_older_one_and_leaves_nothing_beside(tmp_path: Path) -> None:
    export_hf(make_model("qwen2", seed=0), None, tmp_path / "export")
    (tmp_path / ".export.writing").mkdir()  # cut short earlier
    export_hf(make_model("qwen2", seed=1), None, tmp_path / "export")
    assert os.listdir(tmp_path) == ["export"]
    found = load_model(tmp_path / "export").get_input_embeddings().weight
    assert torch.equal(found, make_model("qwen2", seed=1).get_input_embeddings().weight)


def test_a_missing_model_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no model at .*nowhere"):
        load_model(tmp_path / "nowhere")
