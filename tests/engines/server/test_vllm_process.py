"""ServerProcess over the real vLLM: its engine core is killed, which its API server may outlive."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from skyrl_train.engines.server.guard import command_line, descendants
from skyrl_train.engines.server.process import LaunchSpec, ServerProcess
from tests.engines.server.launching import is_alive
from tests.tiny import make_model, make_tokenizer

pytestmark = pytest.mark.engines


@pytest.mark.timeout(600)
async def test_a_killed_engine_core_is_noticed_at_once_and_nothing_is_left_after_a_stop(
    vllm_python: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    make_model("qwen3", hidden_size=128, head_dim=32).save_pretrained(model)
    make_tokenizer().save_pretrained(model)
    command = (str(vllm_python), "-m", "vllm.entrypoints.cli.main", "serve", str(model))
    server = ServerProcess(
        LaunchSpec(
            name="vllm-0",
            command=(*command, "--dtype", "float32", "--enforce-eager", "--max-model-len", "512"),
            environment={
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
                "VLLM_NO_USAGE_STATS": "1",
                "VLLM_CPU_KVCACHE_SPACE": "1",
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "VLLM_CACHE_ROOT": str(tmp_path / "cache"),
                "PATH": f"{vllm_python.parent}:{os.environ['PATH']}",
            },
            log_path=tmp_path / "vllm-0.log",
            startup_timeout_s=400,
        )
    )
    try:
        await server.start()
        assert server.pid is not None
        main, tree = server.pid, [process.pid for process in descendants(server.pid)]
        (core,) = (pid for pid in tree if command_line(pid).startswith("VLLM::EngineCore"))
        os.kill(core, signal.SIGKILL)
        text = await server.wait_dead()
        assert f"its process VLLM::EngineCore ({core}) is gone" in text
        assert "Application startup complete." in text
    finally:
        await server.stop()
    assert not any(is_alive(pid) for pid in (main, *tree))
