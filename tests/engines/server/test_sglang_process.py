"""ServerProcess over the real SGLang: its scheduler is killed, and it is noticed before its main process leaves."""

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
async def test_a_killed_scheduler_is_noticed_at_once_and_a_restart_serves_again(
    sglang_python: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    make_model("qwen3", hidden_size=128, head_dim=32).save_pretrained(model)
    make_tokenizer().save_pretrained(model)
    flags = "--device cpu --dtype float32 --attention-backend torch_native --sampling-backend pytorch"
    flags += " --disable-cuda-graph --max-total-tokens 2000 --mem-fraction-static 0.3 --sleep-on-idle"
    server = ServerProcess(
        LaunchSpec(
            name="sglang-0",
            command=(str(sglang_python), "-m", "sglang.launch_server", "--model-path", str(model), *flags.split()),
            environment={
                "SGLANG_USE_CPU_ENGINE": "1",
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
                "SGLANG_CPU_OMP_THREADS_BIND": None,
                "PATH": f"{sglang_python.parent}:{os.environ['PATH']}",
            },
            log_path=tmp_path / "sglang-0.log",
            startup_timeout_s=240,
        )
    )
    try:
        await server.start()
        assert server.pid is not None
        main, tree = server.pid, [process.pid for process in descendants(server.pid)]
        (scheduler,) = (pid for pid in tree if command_line(pid).startswith("sglang::scheduler"))
        os.kill(scheduler, signal.SIGKILL)
        text = await server.wait_dead()
        assert f"its process sglang::scheduler ({scheduler}) is gone" in text
        assert "The server is fired up and ready to roll!" in text
        assert is_alive(main), "SGLang's main process takes 5 seconds to leave; we must not need that long"
        await server.stop()
        assert not any(is_alive(pid) for pid in (main, *tree))
        await server.start()
        assert server.is_running and server.pid != main
        tree = [process.pid for process in descendants(server.pid)]
    finally:
        await server.stop()
    assert not any(is_alive(pid) for pid in tree)
