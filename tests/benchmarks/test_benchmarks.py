"""The benchmark scripts run, at the smallest size; what they count is counted by hand here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import grpo_step, rollouts
from benchmarks.check import WrongOutput, check_outputs
from benchmarks.grpo.work import StepWork
from benchmarks.limits import Ceilings, rollout_limit, training_flops
from benchmarks.measure import time_once
from benchmarks.models import ModelShape, build_model, build_tokenizer, to_text, twin_on_same_weights
from benchmarks.tune import fastest_setting
from benchmarks.workload import LengthRange, Output, Request, draw_requests

MICRO = ModelShape(
    name="micro",
    hidden_size=4,
    intermediate_size=8,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    vocab_size=10,
    tied=True,
)


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def micro_model():
    return build_model(MICRO, attn_implementation="sdpa", device="cpu", dtype=torch.float32)


@pytest.mark.filterwarnings("default")
def test_the_rollout_benchmark_writes_a_table_and_its_log(tmp_path: Path, one_thread):
    size = ["--requests", "3", "--prompt", "2:4", "--new", "2:5", "--repetitions", "1", "--threads", "1"]
    narrow = ["--generate-batches", "3", "--generate-caches", "dynamic", "--concurrent", "3"]
    results = rollouts.main([*size, *narrow, "--out", str(tmp_path)])
    assert {r.name: r.error for r in results} == {"generate": "", "generate_batch": "", "skyrl_train": ""}
    (page,), (log,) = tmp_path.glob("*.md"), tmp_path.glob("*.log")
    assert page.stem == log.stem
    assert page.read_text().count("| skyrl_train |") == 2, "a row in each mode"
    assert "skyrl_train, greedy, repetition 0" in log.read_text()


@pytest.mark.filterwarnings("default")
def test_a_server_that_does_not_start_is_a_row_that_says_why(tmp_path: Path, one_thread, monkeypatch):
    monkeypatch.setenv("SKYRL_VLLM_PYTHON", str(tmp_path / "no-python"))
    size = ["--requests", "2", "--prompt", "2:4", "--new", "2:3", "--repetitions", "1", "--threads", "1"]
    results = rollouts.main([*size, "--engines", "vllm,skyrl_train", "--modes", "greedy", "--out", str(tmp_path)])
    (vllm, ours) = results
    assert "no-python" in vllm.error and not ours.error
    (page,) = tmp_path.glob("*.md")
    assert f"| vllm | {vllm.error} |" in page.read_text()


def test_processor_seconds_of_an_engine_elsewhere_are_its_own_and_not_others():
    spent = iter((10.0, 12.5))
    timing = time_once(lambda: None, "cpu", child_seconds=lambda: next(spent, 12.5))
    assert 2.5 <= timing.cpu_s < 2.6
    assert timing.others_frac in (0.0, None), "more than passed by the clock: nothing is left for others"


@pytest.mark.filterwarnings("default")
def test_the_grpo_benchmark_finds_the_same_gradient_on_both_sides(tmp_path: Path, one_thread):
    pytest.importorskip("trl")
    size = ["--prompts", "2", "--samples", "2", "--prompt", "2:4", "--new", "2:5", "--rounds", "1", "--steps", "1"]
    narrow = ["--threads", "1", "--trl-generation", "dynamic", "--trl-micro-batches", "4", "--micro-batch-tokens", "64"]
    results = grpo_step.main([*size, *narrow, "--out", str(tmp_path)])
    assert [(r.name, r.error, len(r.timings["step"])) for r in results] == [("TRL", "", 1), ("skyrl_train", "", 1)]
    (page,) = tmp_path.glob("*.md")
    assert "over TRL" in page.read_text()


def test_a_seed_fixes_the_workload():
    asked = {"prompt": LengthRange.parse("2:9"), "new": LengthRange.parse("3"), "vocab_size": 50}
    first = draw_requests(20, **asked, seed=1)
    assert first == draw_requests(20, **asked, seed=1) != draw_requests(20, **asked, seed=2)
    assert {len(r.prompt_token_ids) for r in first} <= set(range(2, 10))
    assert {r.max_new_tokens for r in first} == {3}


def test_the_limit_counts_weights_once_a_step_and_keys_once_a_token():
    # Layer: q 4*4, o 4*4, k and v 4*2 each, three of 4*8 -> 144; head 40. A cached token: 2 * 1 * 2 floats, 16 bytes.
    assert (MICRO.num_layer_weights, MICRO.num_step_weights) == (144, 184)
    assert MICRO.kv_bytes_per_token(torch.float32) == 16
    ceilings = Ceilings(copy_bytes=1, copy_bytes_per_s=1e3, matmul_size=1, matmul_flops_per_s=1e12, dtype=torch.float32)
    requests = [
        Request(prompt_token_ids=(1, 2, 3), max_new_tokens=2),
        Request(prompt_token_ids=(1,), max_new_tokens=1),
    ]
    limit = rollout_limit(MICRO, requests, ceilings)
    # Step 0 reads 3 + 1 cached tokens, step 1 the 4 of the request that is left.
    assert limit.kv_bytes == (4 + 4) * 16
    assert limit.seconds == pytest.approx((2 * 184 * 4 + limit.kv_bytes) / 1e3)
    assert limit.tokens_per_s == pytest.approx(3 / limit.seconds)


def test_training_counts_a_shared_prompt_once():
    work = StepWork(prompt_lens=(2,), completion_lens=((1, 3),), vocab_size=10, seed=0)
    # Rows 2 + 1 + 3; pairs: 1 + 2 in the prompt, 2 + 1 and 3 * 2 + (1 + 2 + 3) in the answers.
    assert training_flops(MICRO, work) == 6 * (144 * 6 + 40 * 4) + 3 * MICRO.attention_flops(1) * (3 + 3 + 12)


def test_twins_share_their_weights(micro_model):
    twin = twin_on_same_weights(micro_model, attn_implementation="eager")
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        micro_model.model.layers[0].mlp.up_proj.weight.mul_(2)
        torch.testing.assert_close(twin(ids).logits, micro_model(ids).logits)


def test_text_comes_back_as_the_same_ids_and_the_end_token_is_out_of_reach():
    tokenizer = build_tokenizer(10)
    assert tokenizer(to_text((3, 9, 1)))["input_ids"] == [3, 9, 1]
    assert tokenizer.eos_token_id == 10


def test_a_wrong_token_or_logprob_is_found(micro_model):
    request = Request(prompt_token_ids=(1, 2), max_new_tokens=2)
    tokens = micro_model.generate(torch.tensor([[1, 2]]), max_new_tokens=2, do_sample=False)[0]
    with torch.no_grad():
        logprobs = micro_model(tokens[None]).logits[0].log_softmax(-1)
    answer = tuple(tokens[2:].tolist())
    right = Output(token_ids=answer, logprobs=tuple(float(logprobs[1 + i, t]) for i, t in enumerate(answer)))
    assert check_outputs(micro_model, [request], [right], greedy=True).num_argmax == 2

    shifted = Output(token_ids=answer, logprobs=(right.logprobs[0] - 0.01, right.logprobs[1]))
    with pytest.raises(WrongOutput, match=r"differs by 0\.01"):
        check_outputs(micro_model, [request], [shifted], greedy=True)

    worst = int(logprobs[1].argmin())
    with torch.no_grad():
        after = micro_model(torch.tensor([[1, 2, worst]])).logits[0].log_softmax(-1)
    last = int(after[2].argmax())
    not_greedy = Output(token_ids=(worst, last), logprobs=(float(after[1, worst]), float(after[2, last])))
    check_outputs(micro_model, [request], [not_greedy], greedy=False)
    with pytest.raises(WrongOutput, match="below the best"):
        check_outputs(micro_model, [request], [not_greedy], greedy=True)


def test_tuning_keeps_the_best_value_of_an_axis_while_it_tries_the_next():
    tried = []

    def seconds(setting: tuple[int, int]) -> float:
        tried.append(setting)
        return {(1, 64): 5.0, (2, 64): 3.0, (2, 16): 4.0}[setting]

    best = fastest_setting(lambda threads, batch: (threads, batch), {"threads": (1, 2), "batch": (64, 16)}, seconds)
    assert best() == (2, 64)
    assert tried == [(1, 64), (2, 64), (2, 16)]


def test_prompts_differ_from_step_to_step_and_lengths_do_not():
    work = StepWork.draw(3, 2, prompt=LengthRange.parse("2:9"), new=LengthRange.parse("2:9"), vocab_size=500, seed=3)
    first, second = work.prompts(0), work.prompts(1)
    assert first == work.prompts(0) != second
    assert [len(p) for p in first] == [len(p) for p in second] == list(work.prompt_lens)
