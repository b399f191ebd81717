"""What the engines' benchmarks compute by themselves: no server is started here."""

from __future__ import annotations

import argparse
import hashlib
import io
import itertools
import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from benchmarks.engines import side_by_side
from benchmarks.engines.asking import accept_len_between, accept_len_of, common_prefix
from benchmarks.engines.example_job import overrides, write_data
from benchmarks.engines.folders import LOOP, constant_model, looping_model, next_in_loop, previous_in_loop, spread_model
from benchmarks.engines.harness import Setup, cell
from benchmarks.engines.processes import between, cpu_seconds, role_of
from benchmarks.engines.reference import logprob_difference
from benchmarks.engines.side_by_side import Entry, Store
from benchmarks.engines.speculation import draw
from benchmarks.models import ModelShape
from scripts import gpu_engines
from skyrl_train.config import load_config
from skyrl_train.engines.base import EngineStats
from skyrl_train.types import Completion, VersionSpan

MICRO = ModelShape(
    name="micro",
    hidden_size=64,
    intermediate_size=64,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    vocab_size=64 * LOOP,
    tied=False,
)
ON_CPU = {"device": "cpu", "dtype": torch.float32, "seed": 0}


def stats(generated: int, accept_len: float | None) -> EngineStats:
    return EngineStats(
        policy_version=0,
        paused=False,
        num_running=0,
        num_waiting=0,
        kv_used_frac=0.0,
        num_prompt_tokens_total=0,
        num_cached_tokens_total=0,
        num_generated_tokens_total=generated,
        num_retractions_total=0,
        num_evicted_tokens_total=0,
        num_steps_total=0,
        accept_len=accept_len,
    )


def test_the_accept_length_of_a_round_is_its_own_tokens_over_its_own_verifications():
    # 100 tokens in 50 steps, then 300 more in 75.
    assert accept_len_between(stats(100, 2.0), stats(400, 400 / 125)) == pytest.approx(4.0)
    assert accept_len_between(stats(0, None), stats(100, 2.0)) == pytest.approx(2.0)
    assert accept_len_between(stats(0, None), stats(100, None)) is None


def test_steps_without_a_draft_make_one_token_and_the_last_draft_may_have_more_than_there_was_room_for():
    assert accept_len_of(10, drafts=2, accepted=4) == pytest.approx(10 / 6)  # 3 and 3 tokens, then four of one
    assert accept_len_of(10, drafts=0, accepted=0) == 1.0
    assert accept_len_of(16, drafts=2, accepted=16) == 8.0


def test_a_spread_model_has_the_logits_of_a_trained_one_and_its_own_answers_are_no_difference():
    model = spread_model(MICRO, **ON_CPU)
    prompt = draw("noise", 1, 24, 1, MICRO.vocab_size, seed=3)[0].prompt_token_ids
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0]
    assert 2.0 < float(logits.std()) < 3.0
    rows = logits.log_softmax(-1)
    token = int(rows[-1].argmax())
    answer = completion((token,), (float(rows[-1, token]),))
    assert logprob_difference(model, [prompt], [answer]).largest < 1e-5
    wrong = completion((token,), (float(rows[-1, token]) - 0.5,))
    assert logprob_difference(model, [prompt], [wrong]).largest == pytest.approx(0.5, abs=1e-4)


def test_a_constant_model_answers_one_token_and_a_mixture_of_two_does_not():
    one, other = (constant_model(MICRO, token, direction=d, **ON_CPU) for token, d in ((70, 3), (90, 5)))
    ids = torch.tensor([draw("noise", 1, 16, 1, MICRO.vocab_size, seed=1)[0].prompt_token_ids])
    with torch.no_grad():
        assert (one(ids).logits.argmax(-1) == 70).all()
        assert (other(ids).logits.argmax(-1) == 90).all()
        one.lm_head.weight.copy_(other.lm_head.weight)
        assert one(ids).logits.softmax(-1).max() < 0.5


def test_a_looping_model_goes_through_the_tokens_of_a_block_for_ever():
    model = looping_model(MICRO, **ON_CPU)
    (request,) = draw("foreseen", 1, 40, 1, MICRO.vocab_size, seed=2)
    ids = request.prompt_token_ids
    with torch.no_grad():
        answers = model(torch.tensor([ids])).logits[0].argmax(-1).tolist()
    assert answers == [next_in_loop(token) for token in ids]
    assert all(next_in_loop(a) == b for a, b in itertools.pairwise(ids)) and ids[0] == ids[LOOP] == ids[2 * LOOP]
    assert [previous_in_loop(next_in_loop(token)) for token in range(3 * LOOP)] == list(range(3 * LOOP))


def test_rows_of_another_run_are_kept_and_those_of_another_workload_are_not(tmp_path: Path):
    path, key = tmp_path / "rows.json", {"machine": "a", "workload": "b"}
    Store.open(path, key=key).put([entry("embedded", 100.0), entry("sglang", 80.0)])
    later = Store.open(path, key=key)
    later.put([entry("vllm", 120.0), entry("sglang", 90.0)])
    assert sorted((e.engine, e.tokens_per_s) for e in Store.open(path, key=key).entries) == [
        ("embedded", 100.0),
        ("sglang", 90.0),
        ("vllm", 120.0),
    ]
    rows = side_by_side.table_rows(later.entries, "greedy")
    assert [row[1] for row in rows] == ["embedded 1", "sglang 1", "vllm 1"]
    assert [row[3] for row in rows] == ["0.83", "0.75", "1.00"], "over the fastest"
    assert Store.open(path, key={**key, "workload": "c"}).entries == []


def test_an_engine_that_failed_is_a_row_that_says_why():
    failed = side_by_side.failed_entry("vllm", "greedy", 4, side_by_side.Failed("not here"))
    assert side_by_side.table_rows([entry("embedded", 100.0), failed], "greedy")[1][:3] == ["4", "vllm", "not here"]


async def test_a_cell_that_fails_or_comes_too_late_is_a_text_and_the_others_go_on():
    lines: list[str] = []

    class Loud:
        def log(self, text: str) -> None:
            lines.append(text)

    class Short:
        report, left_s = Loud(), 60.0

    async def bad() -> None:
        raise ValueError("two | words\nand more")

    assert await cell(Short(), "bad", bad) == "ValueError: two / words"
    assert "and more" in lines[0], "the log has all of it"
    late = Short()
    late.left_s = 0.5
    assert "the time was over" in await cell(late, "late", bad)


def test_processor_seconds_are_of_descendants_by_role():
    assert role_of("sglang::scheduler_TP0") == "scheduler"
    assert role_of("python -m sglang.launch_server --port 1") == "HTTP server"
    assert role_of("sleep 1") == "other"
    code = "import time\nwhile time.process_time() < 0.25: pass\nprint(1, flush=True)\ninput()"
    before = cpu_seconds()
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline()
        used = between(before, cpu_seconds())
        without = between(before, cpu_seconds(leave_out="time.process_time()"))
        child.communicate(b"\n")
    assert used["other"] >= 0.15
    assert without.get("other", 0.0) < used["other"]


@pytest.mark.parametrize("variant", ["plain", "disk", "no prefix cache", "ngram", "group"])
@pytest.mark.parametrize("backend", ["sglang", "vllm"])
def test_every_variant_is_a_configuration_without_contradictions(variant: str, backend: str, tmp_path: Path):
    setup = Setup(
        shape=MICRO,
        device="cpu",
        dtype=torch.float32,
        seed=0,
        folder=tmp_path,
        work=tmp_path,
        pythons={},
        max_model_len=512,
        max_num_seqs=8,
    )
    config = setup.config(backend, variant)
    assert config.generator.backend == backend
    assert config.generator.weight_sync_backend == ("gloo" if variant == "group" else "disk")
    assert config.generator.speculative_decoding.enabled == (variant == "ngram")


@pytest.mark.parametrize("name", ["sglang_full_config_example", "sglang_speculative_decoding_example"])
def test_a_shipped_configuration_takes_the_jobs_keys(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    args = argparse.Namespace(
        config=Path("examples/sglang") / name,
        backend=None,
        work=tmp_path,
        device="cpu",
        dtype=None,
        shape="tiny",
        seed=0,
        prompts=2,
        samples=2,
        steps=1,
        new=8,
        set=["trainer.seed=7"],
    )
    monkeypatch.setattr("benchmarks.engines.example_job.model_folder", lambda *_, **__: tmp_path)
    config = load_config(overrides(args)).config
    assert (config.trainer.seed, config.trainer.max_steps, config.generator.model_dtype) == (7, 1, "float32")
    assert Path(config.data.train_data[0]).read_text().count("\n") == 2


def test_made_up_problems_have_the_form_of_gsm8k(tmp_path: Path):
    write_data(tmp_path, num_train=3, seed=0)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    for row in rows:
        first, more, lost = (int(word) for word in row["prompt"][0]["content"].split() if word.isdigit())
        assert row["reward_spec"]["ground_truth"] == str(first + more - lost)


def test_an_archive_in_parts_is_checked_joined_and_unpacked_once(tmp_path: Path):
    archive, site = tmp_path / "archive", tmp_path / "site"
    archive.mkdir()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz") as tar:
        data = b"value = 7\n" * 2000
        info = tarfile.TarInfo("package/module.py")
        info.size, info.mode = len(data), 0o444
        tar.addfile(info, io.BytesIO(data))
    whole = buffer.getvalue()
    half = len(whole) // 2
    for name, part in (("a.tar.xz.part00", whole[:half]), ("a.tar.xz.part01", whole[half:])):
        (archive / name).write_bytes(part)
    write_sums(archive)
    session = gpu_engines.Session(out=tmp_path, end=time.monotonic() + 60)
    gpu_engines.unpack(archive, site, session)
    assert (site / "package" / "module.py").read_text().count("7") == 2000
    (site / "package" / "module.py").write_text("")  # it may be written to
    (archive / "a.tar.xz.part01").write_bytes(b"damaged")
    gpu_engines.unpack(archive, site, session)
    assert (site / "package" / "module.py").read_text() == "", "a second time nothing is unpacked"
    with pytest.raises(SystemExit, match=r"part01 is damaged"):
        gpu_engines.unpack(archive, tmp_path / "other", session)


@pytest.mark.parametrize("engine", list(gpu_engines.PARTS))
def test_every_part_of_a_gpu_run_is_a_command_that_its_module_takes(engine: str, tmp_path: Path):
    args = argparse.Namespace(rehearse=True, shape=None)
    for part in gpu_engines.PARTS[engine]:
        words = gpu_engines.words_of(part, args, tmp_path, {"generator.max_num_seqs": "8"}, 60.0)
        assert not any("{" in word for word in words), words
        assert words[words.index("--set") + 1 :], words
        assert words.count("--budget-s") == 1
        assert (gpu_engines.ROOT / f"{words[0].replace('.', '/')}.py").exists()


def write_sums(folder: Path) -> None:
    lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}" for file in sorted(folder.glob("*.part*"))]
    (folder / "SHA256SUMS").write_text("\n".join(lines) + "\n")


def completion(token_ids: tuple[int, ...], logprobs: tuple[float, ...]) -> Completion:
    spans = (VersionSpan(version=0, start=0, end=len(token_ids)),)
    return Completion(request_id="one", token_ids=token_ids, logprobs=logprobs, finish_reason="length", versions=spans)


def entry(engine: str, tokens_per_s: float) -> Entry:
    return Entry(
        engine=engine,
        release="1",
        mode="greedy",
        requests=4,
        tokens_per_s=tokens_per_s,
        difference="",
        tokens=[[1, 2, 3]],
    )


def test_a_common_prefix_ends_at_the_first_difference():
    assert common_prefix((1, 2, 3), (1, 2, 4)) == 2
    assert common_prefix((1, 2), (1, 2, 4)) == 2
