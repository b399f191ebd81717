"""The main job as a user runs it, on real SGLang and vLLM: what a command leaves, and what it says when it can't."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from skyrl_train.engines.server.guard import Process, command_line, descendants, look_up
from skyrl_train.entrypoints.main_generate import main as generate
from skyrl_train.observability.metrics import read_metrics
from skyrl_train.observability.request_export import read_request_export
from skyrl_train.training.builtin_model import prepare_builtin
from tests.engines.server.launching import is_alive
from tests.interpreters import engine_python

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
SMALL = (
    "trainer.train_batch_size=8",
    "trainer.policy_mini_batch_size=8",
    "trainer.policy.optimizer_config.lr=1e-4",
    "trainer.policy.optimizer_config.num_warmup_steps=0",
    "trainer.rollout_log_interval=1",
    "trainer.logger=[console,jsonl]",
    "environment.arithmetic.num_eval_prompts=64",
    "environment.calculator.num_eval_prompts=64",
)
LONG_ANSWERS = ("generator.sampling_params.ignore_eos=true",)
"""The built-in model's own are over in five tokens: nothing could happen in the middle of them."""
WAIT_S = 240


class Job:
    """The command in a process group of its own, as a terminal starts it. Its output is a file beside the run."""

    def __init__(self, run: Path, backend: str, *more: str, python: Path | None = None) -> None:
        self.run = run
        self._output = run.with_suffix(".out")
        python = python or engine_python(backend)
        command = [
            *(sys.executable, "-m", "skyrl_train.entrypoints.main_base", f"trainer.run_path={run}"),
            *(f"generator.backend={backend}", f"generator.engine_python={python}", *SMALL, *more),
        ]
        with self._output.open("w") as output:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            )

    @property
    def output(self) -> str:
        return self._output.read_text()

    def end(self) -> int:
        """Its exit code."""
        try:
            return self.process.wait(WAIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise AssertionError(f"no end within {WAIT_S} s\n{self.output}") from None

    def finish(self) -> list[dict[str, Any]]:
        """The rows of a run that ends well."""
        assert self.end() == 0, self.output
        return self.rows()

    def rows(self) -> list[dict[str, Any]]:
        path = self.run / "metrics.jsonl"
        return list(read_metrics(path)) if path.exists() else []

    def until(self, what: str, seen: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WAIT_S
        while not seen():
            assert self.process.poll() is None, f"it ended before {what}\n{self.output}"
            assert time.monotonic() < deadline, f"no {what}\n{self.output}"
            time.sleep(0.05)

    def until_step(self, step: int) -> None:
        self.until(f"step {step}", lambda: any(row["step"] >= step for row in self.rows()))

    def until_decoding(self, engine: str) -> None:
        """SGLang is in the middle of answers that were not there when this was called."""
        log = self.run / "engines" / f"{engine}.log"
        before = log.read_text().count("Decode batch")
        self.until("answers being sampled", lambda: log.read_text().count("Decode batch") > before)

    def tree(self) -> list[Process]:
        return descendants(self.process.pid)


def until_gone(processes: list[Process]) -> None:
    deadline = time.monotonic() + 60
    while left := [one for one in processes if (now := look_up(one.pid)) and now.start == one.start]:
        left = [one for one in left if is_alive(one.pid)]
        if not left:
            return
        assert time.monotonic() < deadline, [command_line(one.pid) for one in left]
        time.sleep(0.05)


def answers(path: Path) -> dict[str, str]:
    """Trajectory -> its whole text."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({record["trajectory_id"] for record in records}) == len(records)
    return {record["trajectory_id"]: record["response"] for record in records}


def embedded_answers(model: Path | str, folder: Path, *more: str) -> dict[str, str]:
    """Greedy, of the embedded engine on the held-out prompts."""
    command = [f"trainer.run_path={folder}", f"trainer.policy.model.path={model}", *SMALL, *more]
    assert generate(command) == 0
    return answers(folder / "generate" / "rollouts" / "eval_000000.jsonl")


def assert_engine_and_trainer_agree(row: dict[str, Any]) -> None:
    assert row["policy/rollout_logprob_abs_diff_max"] < 1e-3, row
    assert row["rollout/num_failed"] == 0


# Slow, and apart from the others: that an update meets a request is a matter of how fast the two are here.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "sync"),
    [
        ("sglang", ("generator.weight_sync_backend=disk", "generator.use_overlapped_weight_sync=true")),
        # Room for a whole context in a step: prompts that were split over steps would end this server, see its traits.
        ("vllm", ("generator.weight_sync_backend=gloo", "generator.max_num_batched_tokens=128")),
    ],
    ids=["sglang-disk", "vllm-gloo"],
)
def test_requests_are_in_flight_over_updates(backend: str, sync: tuple[str, ...], tmp_path: Path) -> None:
    job = Job(
        tmp_path / "run",
        backend,
        "trainer.max_steps=5",
        "trainer.eval_interval=5",
        "trainer.fully_async.enabled=true",
        "trainer.fully_async.max_staleness_steps=1",
        "trainer.fully_async.deterministic=false",
        # Sampling is slower than training then, so that an update meets it.
        "trainer.fully_async.num_parallel_generation_workers=16",
        "generator.sampling_params.max_generate_length=64",
        *LONG_ANSWERS,
        *sync,
    )
    rows = job.finish()
    steps = [row for row in rows if row["step"]]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert_engine_and_trainer_agree(steps[0])  # all of it is on the policy
    for row in steps:
        assert row["rollout/num_failed"] == 0 and row["engine/restarts"] == 0, row
        assert row["async/staleness_steps"] == (row["step"] > 1)
        assert 1 <= row["async/version_lag_mean"] <= row["async/version_lag_max"] <= 2
    crossed = sum(row["async/num_requests_over_versions"] for row in steps)
    assert crossed > 0, "no request met an update"
    found = 0
    for step in range(1, 6):
        lines = (job.run / "rollouts" / f"step_{step:06d}.jsonl").read_text().splitlines()
        for record in map(json.loads, lines):
            versions = record["versions"]
            found += len(versions) > 1
            assert [span["start"] for span in versions] == [0, *(span["end"] for span in versions[:-1])]
            assert versions[-1]["end"] == record["num_response_tokens"] == 64
            assert [span["version"] for span in versions] in ([step - 1], [step - 2], [step - 2, step - 1])
    assert found == crossed
    held_out = embedded_answers(job.run / "export", tmp_path / "embedded")
    assert answers(job.run / "rollouts" / "eval_000005.jsonl") == held_out


def test_one_of_two_engines_is_killed_in_the_middle_of_a_step_and_nothing_is_lost(tmp_path: Path) -> None:
    job = Job(
        tmp_path / "run",
        "sglang",
        "trainer.max_steps=3",
        "trainer.eval_interval=3",
        "generator.num_inference_engines=2",
        "generator.sampling_params.max_generate_length=300",
        "generator.metrics.export_to_file.enabled=true",
        f"generator.metrics.export_to_file.directory={tmp_path / 'exported'}",
        *LONG_ANSWERS,
    )
    job.until_step(1)
    job.until_decoding("sglang-0")
    port = (job.run / "engines" / "sglang-0.log").read_text().split("starts on port ")[-1].split()[0]
    (server,) = [
        one
        for one in job.tree()
        if f"--port {port}" in command_line(one.pid) and "guard.py" not in command_line(one.pid)
    ]
    tree = [server, *descendants(server.pid)]
    os.kill(server.pid, signal.SIGKILL)
    rows = job.finish()
    until_gone(tree)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert [row["engine/restarts"] for row in rows[1:]] == [0, 1, 0] and rows[2]["engine/resent"] > 0
    for row in rows[1:]:
        assert_engine_and_trainer_agree(row)
        written = answers(job.run / "rollouts" / f"step_{row['step']:06d}.jsonl")
        prompts = {name.rsplit("/", 2)[0] for name in written}
        assert len(written) == 64 and len(prompts) == 8 and row["rollout/num_trajectories"] == 64
    assert job.output.count("is started again") == 1 and "Traceback" not in job.output.split("is started again")[0]
    engines = defaultdict(set)
    for request in read_request_export(tmp_path / "exported"):
        engines[request.trajectory_id.rsplit("/", 2)[0], request.weight_version].add(request.engine)
    assert all(len(of_prompt) == 1 for of_prompt in engines.values()), "the samples of a prompt share its cache"
    for version in "013":
        assert {one for (_, at), of_prompt in engines.items() if at == version for one in of_prompt} == {
            "sglang-0",
            "sglang-1",
        }
    held_out = embedded_answers(job.run / "export", tmp_path / "embedded")
    assert answers(job.run / "rollouts" / "eval_000003.jsonl") == held_out


def test_a_trainer_that_is_killed_leaves_no_server_and_goes_on_with_its_own_weights(tmp_path: Path) -> None:
    more = (
        "trainer.max_steps=4",
        "trainer.ckpt_interval=2",
        "trainer.eval_interval=4",
        "generator.sampling_params.max_generate_length=200",
        *LONG_ANSWERS,
    )
    job = Job(tmp_path / "run", "sglang", *more)
    job.until_step(3)
    job.until_decoding("sglang-0")
    tree = job.tree()
    assert sum("sglang::" in command_line(one.pid) for one in tree) >= 2
    job.process.kill()
    job.process.wait()
    until_gone(tree)
    before = {row["step"]: row for row in job.rows()}
    job = Job(tmp_path / "run", "sglang", *more)
    rows = job.finish()
    assert "resumed after step 2" in job.output
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["policy/version"] for row in rows[1:]] == [1, 2, 3, 4]
    assert all(rows[step] == before[step] for step in (0, 1, 2)) and rows[3] != before[3]
    for row in rows[1:]:
        assert_engine_and_trainer_agree(row)
    held_out = embedded_answers(job.run / "export", tmp_path / "embedded")
    assert answers(job.run / "rollouts" / "eval_000004.jsonl") == held_out


@pytest.mark.parametrize("backend", ["sglang", "vllm"])
def test_ctrl_c_while_the_server_starts_leaves_nothing_behind(backend: str, tmp_path: Path) -> None:
    job = Job(tmp_path / "run", backend)
    log = job.run / "engines" / f"{backend}-0.log"
    job.until("a line of the server", lambda: log.exists() and log.read_text().count("\n") > 3)
    interrupted(job)
    assert not (job.run / "checkpoints").exists() and job.rows() == []


def test_ctrl_c_in_a_step_ends_after_it_with_a_checkpoint(tmp_path: Path) -> None:
    job = Job(
        tmp_path / "run",
        "sglang",
        *("trainer.max_steps=9", "trainer.ckpt_interval=-1", "trainer.eval_interval=-1"),
        "generator.sampling_params.max_generate_length=100",
        *LONG_ANSWERS,
    )
    job.until_step(1)
    interrupted(job)
    assert "stopping after this step, with a checkpoint" in job.output
    (checkpoint,) = (job.run / "checkpoints").iterdir()
    assert checkpoint.name == f"global_step_{job.rows()[-1]['step']}"


def interrupted(job: Job) -> None:
    """As the terminal does it: every process of the group gets the signal."""
    tree = job.tree()
    os.killpg(job.process.pid, signal.SIGINT)
    assert job.end() == 130, job.output
    until_gone(tree)
    what = "goes on from the last checkpoint" if (job.run / "checkpoints").exists() else "starts anew"
    assert f"stopped; the same command {what}" in job.output
    assert "Traceback" not in job.output and "error" not in job.output.lower()


@pytest.mark.parametrize("served", ["adapter", "merged"])
def test_a_policy_that_is_an_adapter_is_served_as_one_or_merged(served: str, tmp_path: Path) -> None:
    job = Job(
        tmp_path / "run",
        "sglang",
        "trainer.max_steps=3",
        "trainer.eval_interval=3",
        "trainer.policy.model.lora.rank=8",
        "trainer.policy.optimizer_config.lr=1e-2",
        *(() if served == "adapter" else ("generator.lora.enabled=false",)),
    )
    rows = job.finish()
    for row in rows[1:]:
        assert_engine_and_trainer_agree(row)
    log = (job.run / "engines" / "sglang-0.log").read_text()
    assert log.count('"POST /load_lora_adapter') == (4 if served == "adapter" else 0)
    assert log.count('"POST /update_weights_from_disk') == (0 if served == "adapter" else 4)
    held_out = embedded_answers(job.run / "export", tmp_path / "embedded")
    assert answers(job.run / "rollouts" / "eval_000003.jsonl") == held_out
    untrained = answers(job.run / "rollouts" / "eval_000000.jsonl")
    assert untrained != held_out


def test_sessions_give_the_answers_of_whole_prompts_and_are_closed(tmp_path: Path) -> None:
    more = (
        "trainer.policy.model.path=builtin:calculator",
        "environment.env_class=calculator",
        "generator.max_turns=3",
        "generator.max_input_length=256",
        "generator.sampling_params.max_generate_length=24",
        "generator.eval_sampling_params.max_generate_length=24",
    )
    job = Job(
        tmp_path / "run",
        "sglang",
        *("trainer.max_steps=2", "trainer.eval_interval=2", "generator.sessions.enabled=true"),
        *more,
    )
    rows = job.finish()
    for row in rows[1:]:
        assert_engine_and_trainer_agree(row)
        assert row["rollout/turns_max"] > 1 and row["engine/sessions"] == 0
        # What a session holds is not computed again; of a whole prompt it would be in the cache only by luck.
        assert 0.5 < row["engine/cache_hit_frac"] < 1
    log = (job.run / "engines" / "sglang-0.log").read_text()
    opened = log.count('"POST /open_session')
    assert opened == log.count('"POST /close_session') == 2 * 64 + 2 * 64
    whole = embedded_answers("builtin:calculator", tmp_path / "untrained", *more[1:])
    assert answers(job.run / "rollouts" / "eval_000000.jsonl") == whole
    whole = embedded_answers(job.run / "export", tmp_path / "trained", *more[1:])
    assert answers(job.run / "rollouts" / "eval_000002.jsonl") == whole


def test_a_server_that_was_started_by_hand_is_trained_and_left_running(tmp_path: Path) -> None:
    model = shutil.copytree(prepare_builtin("builtin:arithmetic", seed=42, on_progress=lambda *_: None), tmp_path / "m")
    more = ("trainer.max_steps=2", "trainer.eval_interval=2", f"trainer.policy.model.path={model}")
    with started_by_hand(tmp_path, *more) as (server, url):
        attach = ("generator.run_engines_locally=false", f"generator.remote_inference_engine_urls=[{url}]")
        job = Job(tmp_path / "run", "sglang", *more, *attach)
        for row in job.finish()[1:]:
            assert_engine_and_trainer_agree(row)
        assert "somebody else runs it" in job.output
        assert server.poll() is None
        with urllib.request.urlopen(f"http://{url}/model_info", timeout=30) as answer:
            assert json.load(answer)["weight_version"] == "2"
        held_out = embedded_answers(job.run / "export", tmp_path / "embedded")
        assert answers(job.run / "rollouts" / "eval_000002.jsonl") == held_out
        # The next run's weights are its own, whatever the server has.
        job = Job(tmp_path / "next", "sglang", *more, *attach)
        assert job.finish()[0]["step"] == 0
        untrained = embedded_answers(model, tmp_path / "untrained")
        assert answers(job.run / "rollouts" / "eval_000000.jsonl") == untrained != held_out


@contextmanager
def started_by_hand(folder: Path, *more: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """The server whose command and environment --explain prints, with an address that we choose."""
    job = Job(folder / "look", "sglang", *more, "--explain")
    assert job.end() == 0, job.output
    (command,) = [line.partition(": ")[2] for line in job.output.splitlines() if line.strip().startswith("sglang-0: ")]
    (needed,) = [line.split()[5] for line in job.output.splitlines() if "started by hand it needs" in line]
    name, _, value = needed.partition("=")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = f"{engine_python('sglang').parent}{os.pathsep}{os.environ['PATH']}"
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(
            ["bash", "-c", f"exec {command} --host 127.0.0.1 --port {port}"],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", name: value},
        )
    try:
        deadline = time.monotonic() + WAIT_S
        while True:
            assert server.poll() is None and time.monotonic() < deadline, (folder / "server.log").read_text()
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except OSError:
                time.sleep(0.2)
        yield server, f"127.0.0.1:{port}"
    finally:
        tree = descendants(server.pid)
        server.terminate()
        try:
            server.wait(20)
        finally:
            for one in tree:
                if (now := look_up(one.pid)) and now.start == one.start:
                    os.kill(one.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("backend", "more", "said"),
    [
        ("sglang", ("generator.max_model_len=40",), "generator.max_model_len=40"),
        ("vllm", ("generator.hierarchical_cache.enabled=true",), "vLLM has no such option under this key"),
        ("vllm", ("+generator.engine_init_kwargs.max_num_seq=3",), "the nearest is --max-num-seqs"),
        ("sglang", ("+generator.engine_init_kwargs.max_running_request=3",), "has no max_running_request"),
    ],
)
def test_what_cant_be_started_is_said_in_one_message_before_anything_is(
    backend: str, more: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    job = Job(tmp_path / "run", backend, *more)
    assert job.end() == 2 and said in job.output, job.output
    assert job.output.count("error:") == 1 and "Traceback" not in job.output
    assert not (job.run / "engines").exists()


def test_an_interpreter_without_the_engine_is_said_with_how_to_get_one(tmp_path: Path) -> None:
    job = Job(tmp_path / "run", "sglang", python=engine_python("vllm"))
    assert job.end() == 2
    assert f"needs sglang in generator.engine_python={engine_python('vllm')}" in job.output
    assert "pip install" in job.output and "Traceback" not in job.output


def test_a_port_of_somebody_else_is_said_before_the_server_starts(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        more = ("generator.metrics.enabled=true", f"generator.metrics.endpoint_port={port}")
        job = Job(tmp_path / "run", "sglang", *more)
        assert job.end() == 2 and f"generator.metrics.endpoint_port={port} can't be served" in job.output, job.output
        assert not (job.run / "engines").exists()
    job = Job(
        tmp_path / "attached",
        "sglang",
        f"trainer.policy.model.path={prepare_builtin('builtin:arithmetic', seed=42, on_progress=lambda *_: None)}",
        *("generator.run_engines_locally=false", f"generator.remote_inference_engine_urls=[127.0.0.1:{port}]"),
    )
    assert job.end() == 3 and f"http://127.0.0.1:{port}" in job.output and "Traceback" not in job.output
