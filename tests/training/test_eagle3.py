"""Training of EAGLE-3 heads: the unrolled forward is what the drafter does, and a resumed run goes on to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from skyrl_train.engines.embedded.drafts.eagle.fresh import fresh_eagle3
from skyrl_train.engines.embedded.drafts.eagle.head import Target
from skyrl_train.engines.embedded.drafts.eagle.layout import load_head
from skyrl_train.errors import CheckpointError
from skyrl_train.training.eagle3 import AnsweredSequence, Eagle3Settings, Eagle3Trainer
from skyrl_train.training.eagle3_loss import Unrolled, policy_view, unrolled_loss
from skyrl_train.training.optimizer import OptimizerSettings
from tests.engines.embedded.test_eagle import make_head, reference_logits
from tests.tiny import VOCAB_SIZE, make_model

SETTINGS = Eagle3Settings(optimizer=OptimizerSettings(lr=3e-3), num_unrolled=3, max_tokens=64)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make_model("qwen3", seed=3, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1)


def sequences(count: int = 6, seed: int = 0) -> list[AnsweredSequence]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(8, 20, (count,), generator=generator).tolist()
    return [
        AnsweredSequence(
            token_ids=torch.randint(3, 250, (n,), generator=generator), is_answer=torch.arange(n) >= n // 2
        )
        for n in lengths
    ]


@pytest.mark.parametrize("few_words", [False, True])
def test_an_unrolled_step_is_what_the_drafter_does_after_so_many_guesses(
    model: PreTrainedModel, few_words: bool
) -> None:
    """Row t of step s: the head after tokens 0 to t + 1 and the s tokens that follow as guesses."""
    head = make_head(model, "eagle3", words=range(0, VOCAB_SIZE, 2) if few_words else None)
    target, tokens = Target.of(model), [5, 9, 33, 60, 61, 8, 12, 44]
    token_ids = torch.tensor([tokens, tokens[::-1]])
    view = policy_view(model, token_ids, head.taps)
    losses = []
    for answer in range(2, len(tokens)):
        is_answer = torch.zeros(2, len(tokens), dtype=torch.bool)
        is_answer[0, answer] = True
        with torch.no_grad():
            losses.append(unrolled_loss(head, target, view, token_ids, is_answer, num_steps=3, decay=0.5))
    chances = view.logits[0].softmax(-1)
    for answer, found in zip(range(2, len(tokens)), losses, strict=True):
        expected, words = 0.0, head.t2d if few_words else torch.ones(VOCAB_SIZE, dtype=torch.bool)
        assert words is not None
        wanted = torch.where(words, chances[answer - 1], 0)
        counts = bool(words[chances[answer - 1].argmax()])
        for step in range(min(3, answer - 1)):
            known = answer - step
            logits = reference_logits(model, head, tokens[:known], tokens[known:answer])[words]
            expected -= 0.5**step * float((wanted[words] / wanted.sum() * logits.log_softmax(-1)).sum()) * counts
        assert float(found.total) == pytest.approx(expected, rel=1e-4)
        assert found.counted.tolist() == [int(counts and step < answer - 1) for step in range(3)]


def test_a_row_sees_the_known_tokens_and_its_own_former_selves() -> None:
    """Not what other rows guessed: at inference those are other futures."""
    context, generator = Unrolled(1, 5), torch.Generator().manual_seed(0)
    first = [torch.randn(5, 2, 16, generator=generator) for _ in range(3)]
    context.attend(0, *first, scaling=0.25, sliding_window=None)
    second = [torch.randn(5, 2, 16, generator=generator) for _ in range(3)]
    before = context.attend(0, *second, scaling=0.25, sliding_window=None)
    other = Unrolled(1, 5)
    other.attend(0, *first, scaling=0.25, sliding_window=None)
    changed = [x.clone() for x in second]
    for x in changed:
        x[3] += 1.0
    after = other.attend(0, *changed, scaling=0.25, sliding_window=None)
    assert torch.equal(before[[0, 1, 2, 4]], after[[0, 1, 2, 4]]) and not torch.allclose(before[3], after[3])


def test_micro_batches_do_not_change_a_step(model: PreTrainedModel) -> None:
    results = []
    for max_tokens in (40, 10_000):
        head = fresh_eagle3(model, seed=1)
        settings = Eagle3Settings(optimizer=OptimizerSettings(lr=1e-3), num_unrolled=3, max_tokens=max_tokens)
        metrics = Eagle3Trainer(model, head, settings).step(sequences())
        results.append((metrics, head.state_dict()))
    (small, small_state), (whole, whole_state) = results
    assert small == pytest.approx(whole, rel=1e-4)
    for name, tensor in small_state.items():
        assert torch.allclose(tensor, whole_state[name], atol=2e-4), name


def test_it_learns_what_the_policy_says(model: PreTrainedModel) -> None:
    trainer = Eagle3Trainer(model, fresh_eagle3(model, seed=1), SETTINGS)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = trainer.step(sequences())
    for _ in range(40):
        last = trainer.step(sequences())
    assert last["eagle3/loss"] < first["eagle3/loss"]
    assert max(first[f"eagle3/agree_{step}"] for step in (1, 2, 3)) < 0.1
    assert min(last[f"eagle3/agree_{step}"] for step in (1, 2, 3)) > 0.4
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_resumed_run_goes_on_to_the_bit(model: PreTrainedModel, tmp_path: Path) -> None:
    words = range(0, VOCAB_SIZE, 2)
    whole = Eagle3Trainer(model, fresh_eagle3(model, seed=1, word_ids=words), SETTINGS)
    for seed in range(2):
        whole.step(sequences(seed=seed))
    whole.save(tmp_path / "head")
    resumed = Eagle3Trainer(model, fresh_eagle3(model, seed=2, word_ids=words), SETTINGS)
    resumed.load(tmp_path / "head")
    assert resumed.num_steps_done == 2
    assert whole.step(sequences(seed=2)) == resumed.step(sequences(seed=2))
    for name, tensor in whole.head.state_dict().items():
        assert torch.equal(tensor, resumed.head.state_dict()[name]), name
    loaded = load_head(tmp_path / "head", "eagle3", Target.of(model), dtype=torch.float32)
    assert loaded.taps == whole.head.taps


def test_another_heads_folder_is_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    Eagle3Trainer(model, fresh_eagle3(model, seed=1), SETTINGS).save(tmp_path / "head")
    other = Eagle3Trainer(model, fresh_eagle3(model, seed=1, word_ids=range(9)), SETTINGS)
    with pytest.raises(CheckpointError, match="can't go on as this EAGLE-3 head"):
        other.load(tmp_path / "head")
    with pytest.raises(CheckpointError, match=r"can't read the draft head's"):
        other.load(tmp_path / "nowhere")


def test_without_an_answer_there_is_nothing_to_learn(model: PreTrainedModel) -> None:
    trainer = Eagle3Trainer(model, fresh_eagle3(model, seed=1), SETTINGS)
    silent = [AnsweredSequence(token_ids=torch.arange(9), is_answer=torch.zeros(9, dtype=torch.bool))]
    assert trainer.step(silent) == {} and trainer.num_steps_done == 0
