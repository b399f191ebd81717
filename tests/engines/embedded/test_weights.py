from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from skyrl_train.engines.embedded import weights
from skyrl_train.errors import WeightUpdateError
from skyrl_train.types import DiskWeights, LocalWeights, VersionSpan, WeightUpdate
from tests.engines.embedded.common import greedy_reference, make_core, random_prompts, request, run
from tests.engines.embedded.test_generation import constant_model
from tests.tiny import make_model


def disk(version: int, folder: Path) -> WeightUpdate:
    return WeightUpdate(version=version, source=DiskWeights(path=str(folder)))


def local(version: int) -> WeightUpdate:
    return WeightUpdate(version=version, source=LocalWeights())


@pytest.fixture
def new_weights(tmp_path: Path) -> Path:
    make_model(seed=1).save_pretrained(tmp_path / "new")
    return tmp_path / "new"


def test_weights_from_disk_are_served_after_resume(new_weights: Path) -> None:
    core = make_core(make_model(seed=0))
    (prompt,) = random_prompts(9)
    (before,) = run(core, [request("a", prompt, 12)])
    core.pause("keep")
    core.update_weights(disk(3, new_weights))
    core.resume()
    (after,) = run(core, [request("b", prompt, 12)])
    assert before.token_ids == greedy_reference(make_model(seed=0, attn_implementation="eager"), prompt, 12)
    assert after.token_ids == greedy_reference(make_model(seed=1, attn_implementation="eager"), prompt, 12)
    assert after.num_cached_tokens == 0  # the old weights' keys are gone
    assert after.versions == (VersionSpan(version=3, start=0, end=len(after.token_ids)),)


def test_local_weights_are_the_callers_tensors() -> None:
    model = make_model(seed=0)
    core = make_core(model)
    core.pause("keep")
    with torch.no_grad():
        for mine, new in zip(model.parameters(), make_model(seed=1).parameters(), strict=True):
            mine.copy_(new)
    core.update_weights(local(1))
    core.resume()
    (prompt,) = random_prompts(9)
    (answer,) = run(core, [request("a", prompt, 12)])
    assert answer.token_ids == greedy_reference(make_model(seed=1, attn_implementation="eager"), prompt, 12)


def test_no_token_comes_from_a_mixture_of_two_versions() -> None:
    """Version v always says token 10 + v, with certainty. Each token of each answer must match its span's version."""
    model = constant_model(10)
    head = model.lm_head.bias
    core = make_core(model, kv_cache_tokens=150, max_num_batched_tokens=40)
    prompts = random_prompts(8, 20, 3, 14, 30, 5)
    for i, prompt in enumerate(prompts):
        core.add(request(str(i), prompt, 40, temperature=1.0, ignore_eos=True))
    answers, version, steps = [], 0, 0
    while core.has_work:
        answers += [item.completion for item in core.step()]
        core.check_integrity()
        steps += 1
        if steps % 7 == 0:
            core.pause("keep")
            version += 1
            with torch.no_grad():
                head.zero_()
                head[10 + version] = 20.0
            core.update_weights(local(version))
            core.check_integrity()
            core.resume()
    assert version > 5 and len(answers) == 6
    for answer in answers:
        assert len(answer.versions) > 1
        for span in answer.versions:
            assert set(answer.token_ids[span.start : span.end]) == {10 + span.version}
    assert core.scheduler.cache.num_flushes_total == version


def test_a_running_request_is_recomputed_under_the_new_weights(new_weights: Path) -> None:
    """After the update the answer goes on as if prompt and partial answer had been sent to the new model."""
    core = make_core(make_model(seed=0))
    (prompt,) = random_prompts(12)
    core.add(request("a", prompt, 20, ignore_eos=True))
    for _ in range(8):
        core.step()
    core.pause("keep")
    core.update_weights(disk(1, new_weights))
    core.check_integrity()
    core.resume()
    (answer,) = [item.completion for _ in range(20) for item in core.step()]
    old, new = answer.token_ids[:8], answer.token_ids[8:]
    assert old == greedy_reference(make_model(seed=0, attn_implementation="eager"), prompt, 8)
    assert new == greedy_reference(make_model(seed=1, attn_implementation="eager"), (*prompt, *old), 12)
    assert answer.versions == (VersionSpan(version=0, start=0, end=8), VersionSpan(version=1, start=8, end=20))


def test_an_update_needs_a_pause() -> None:
    core = make_core()
    with pytest.raises(WeightUpdateError, match="only while it is paused"):
        core.update_weights(local(1))
    core.add(request("a", (1, 2), 5))
    core.step()
    core.pause("wait")
    with pytest.raises(WeightUpdateError, match="draining"):
        core.update_weights(local(1))


def test_a_version_never_goes_back() -> None:
    core = make_core()
    core.pause("keep")
    core.update_weights(local(4))
    with pytest.raises(WeightUpdateError, match="version 3 is older"):
        core.update_weights(local(3))


def tamper(folder: Path, **changes: Any) -> None:
    """Rewrite the folder's weights: a tensor replaces, None removes."""
    path = folder / "model.safetensors"
    tensors = load_file(path) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({NORM: None}, f"1 missing: {NORM}"),
        ({"surprise": torch.zeros(2)}, "1 unknown: surprise"),
        ({NORM: torch.zeros(65)}, rf"1 different: {NORM} \(model float32 \[64\], file float32 \[65\]\)"),
        ({NORM: torch.zeros(64, dtype=torch.bfloat16)}, r"file bfloat16 \[64\]"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_the_first_byte(
    new_weights: Path, changes: dict[str, Any], message: str
) -> None:
    tamper(new_weights, **changes)
    model = make_model(seed=0)
    core = make_core(model)
    core.pause("keep")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(WeightUpdateError, match=message):
        core.update_weights(disk(1, new_weights))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert core.policy_version == 0
    core.resume()  # the old weights are whole


def test_a_missing_or_broken_folder_is_refused(tmp_path: Path) -> None:
    core = make_core()
    core.pause("keep")
    with pytest.raises(WeightUpdateError, match=r"neither model\.safetensors nor"):
        core.update_weights(disk(1, tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"not a header")
    with pytest.raises(WeightUpdateError, match="can't read the weights"):
        core.update_weights(disk(1, tmp_path))


def test_a_copy_that_fails_half_way_keeps_the_engine_paused_until_a_whole_update(
    new_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = make_core(make_model(seed=0))
    core.pause("keep")
    with monkeypatch.context() as patched:
        # The disk fails between two tensors: no real file system does that on command.
        real = torch.Tensor.copy_
        calls = iter(range(100))

        def failing(self: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
            if next(calls) == 3:
                raise OSError("input/output error")
            return real(self, other)

        patched.setattr(torch.Tensor, "copy_", failing)
        with pytest.raises(WeightUpdateError, match=r"copied only in part.*input/output error"):
            core.update_weights(disk(1, new_weights))
    with pytest.raises(WeightUpdateError, match="failed half way"):
        core.resume()
    assert not core.has_work
    core.update_weights(disk(1, new_weights))
    core.resume()
    (prompt,) = random_prompts(5)
    (answer,) = run(core, [request("a", prompt, 6)])
    assert answer.token_ids == greedy_reference(make_model(seed=1, attn_implementation="eager"), prompt, 6)


def test_sharded_and_tied_weights_are_read(tmp_path: Path) -> None:
    make_model(seed=1, tie_word_embeddings=True).save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model = make_model(seed=0, tie_word_embeddings=True)
    weights.copy_disk_weights(model, weights.plan_disk_weights(model, str(tmp_path)))
    expected = make_model(seed=1, tie_word_embeddings=True).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
