from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from skyrl_train.entrypoints.serve import KEY_VARIABLE, main
from skyrl_train.serving.auth import is_loopback
from tests.serving.running import Served, environment, served

KEY = "sk-test-key"
CALLS = (("POST", "/v1/completions"), ("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/x"))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line that the command says when it exits with code 2."""
    assert main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


def test_a_folder_that_is_not_there_is_one_line_and_code_2(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "no model at" in refused(capsys, tmp_path / "nothing", "--port", "0")


def test_a_port_in_use_is_found_before_the_model_is_loaded(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, taken_port: int
) -> None:
    message = refused(capsys, tmp_path / "nothing", "--port", str(taken_port))
    assert f"can't listen on 127.0.0.1:{taken_port}" in message and "--port" in message


def test_an_interface_that_others_reach_needs_a_key(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for host in ("0.0.0.0", "::", ""):
        message = refused(capsys, tmp_path, "--host", host, "--port", "0")
        assert "there is no key" in message and "--api-key" in message
    assert "no model at" in refused(capsys, tmp_path, "--host", "0.0.0.0", "--port", "0", "--api-key", KEY)


def test_keys_that_no_header_can_carry_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for key in ("", "two words", "ключ"):
        assert "visible ASCII" in refused(capsys, tmp_path, "--api-key", key)


def test_a_folder_that_cannot_be_loaded_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model_folder: Path
) -> None:
    (tmp_path / "config.json").write_text((model_folder / "config.json").read_text())
    assert "can't load" in refused(capsys, tmp_path, "--port", "0", "--device", "cpu")
    assert "can't load" in refused(capsys, model_folder, "--port", "0", "--device", "meltdown")


def test_limits_that_contradict_each_other_are_one_line(capsys: pytest.CaptureFixture[str], model_folder: Path) -> None:
    message = refused(capsys, model_folder, "--port", "0", "--device", "cpu", "--max-model-len", "9999")
    assert "over the model's 2048 positions" in message
    message = refused(capsys, model_folder, "--port", "0", "--max-num-seqs", "64", "--max-num-batched-tokens", "8")
    assert "max_num_batched_tokens" in message


def test_loopback_is_known_by_address() -> None:
    assert is_loopback("127.0.0.1") and is_loopback("127.9.9.9") and is_loopback("::1") and is_loopback("localhost")
    assert not is_loopback("0.0.0.0") and not is_loopback("::") and not is_loopback("192.0.2.1")


@pytest.fixture(scope="module")
def guarded(model_folder: Path) -> Iterator[Served]:
    """Its key comes from the environment, where other users of the machine don't see it."""
    with served(model_folder, "--host", "0.0.0.0", **{KEY_VARIABLE: KEY}) as running:
        yield running


def local(guarded: Served) -> str:
    return guarded.url.replace("0.0.0.0", "127.0.0.1")


def test_with_a_key_requests_need_it_and_probes_do_not(guarded: Served) -> None:
    with httpx.Client(base_url=local(guarded)) as client:
        assert client.get("/health").status_code == 200
        wrong = ["", "Bearer", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Basic {KEY}", KEY, "Bearer ÿ"]
        for header in [None, *wrong]:
            headers = {} if header is None else {"Authorization": header.encode("latin-1")}
            for method, path in (
                ("POST", "/v1/completions"),
                ("GET", "/v1/models"),
                ("GET", "/metrics"),
                ("GET", "/x"),
            ):
                response = client.request(method, path, headers=headers)
                assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
                assert response.headers["www-authenticate"] == "Bearer"
        answer = client.post(
            "/v1/completions", json={"prompt": "a", "max_tokens": 1}, headers={"Authorization": f"Bearer {KEY}"}
        )
        assert answer.status_code == 200


def test_openais_client_brings_its_key(guarded: Served) -> None:
    with openai.OpenAI(base_url=f"{local(guarded)}/v1", api_key=KEY, max_retries=0) as api:
        [model] = api.models.list()
        assert api.completions.create(model=model.id, prompt="a", max_tokens=1).usage is not None
    with (
        openai.OpenAI(base_url=f"{local(guarded)}/v1", api_key="wrong", max_retries=0) as api,
        pytest.raises(openai.AuthenticationError),
    ):
        api.models.list()


def test_the_model_is_named_as_its_folder_was_given(guarded: Served, model_folder: Path) -> None:
    with openai.OpenAI(base_url=f"{local(guarded)}/v1", api_key=KEY) as api:
        assert [model.id for model in api.models.list()] == [str(model_folder)]


def test_sigterm_drains_and_exits_with_code_0(model_folder: Path) -> None:
    """The answer that is being streamed when the signal comes is streamed to its end."""
    with served(model_folder) as running:
        body = {"prompt": "12+7=", "max_tokens": 1500, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{running.url}/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            running.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]" and '"finish_reason":"length"' in rest[-2]
        assert running.process.wait(60) == 0
        assert running.process.stdout is not None and running.process.stdout.read() == "stopped\n"


def test_ctrl_c_exits_with_code_0_and_aborts_what_outlasts_the_drain(model_folder: Path) -> None:
    body = {"prompt": "12+7=", "max_tokens": 1900, "ignore_eos": True, "n": 32}
    with served(model_folder, "--drain-s", "0") as running:
        failed: list[Exception] = []

        def ask() -> None:
            try:
                httpx.post(f"{running.url}/v1/completions", json=body, timeout=60).raise_for_status()
            except httpx.HTTPError as exc:
                failed.append(exc)

        asking = threading.Thread(target=ask)
        asking.start()
        while 'skyrl_requests_running{engine="embedded-0"} 32' not in httpx.get(f"{running.url}/metrics").text:
            assert asking.is_alive()
        running.process.send_signal(signal.SIGINT)
        assert running.process.wait(30) == 0
        asking.join(30)
        assert len(failed) == 1


def test_training_does_not_import_the_server() -> None:
    modules = "skyrl_train.engines.embedded, skyrl_train.training.trainer, skyrl_train.rollout.groups"
    check = f"import sys, {modules}; assert not {{'fastapi', 'uvicorn', 'prometheus_client'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True, env=environment())
