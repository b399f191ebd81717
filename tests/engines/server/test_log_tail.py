"""What servers really say when they end, and what we make of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from skyrl_train.engines.server.log_tail import MAX_LINE_CHARS, TAIL_BYTES, read_tail


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("ModuleNotFoundError: No module named 'vllm'", "interpreter that has vllm installed"),
        ("launch_server.py: error: unrecognized arguments: --kv-cash auto", "does not know --kv-cash auto"),
        ("FileNotFoundError: [Errno 2] No such file or directory: 'ninja'", "ninja is missing"),
        ("RuntimeError: Ninja is required to load C++ extensions", "ninja is missing"),
        ("FileNotFoundError: [Errno 2] No such file or directory: 'g++'", "C++ compiler is missing"),
        ("torch._inductor.exc.InvalidCxxCompiler: No working C++ compiler found", "C++ compiler is missing"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", "gpu_memory_utilization"),
        ("RuntimeError: Not enough memory. Please try to increase --mem-fraction-static.", "gpu_memory_utilization"),
        ("ValueError: Free memory on device cuda:0 (9/79 GiB) on startup is less than desired GPU memory utilization",
         "gpu_memory_utilization"),
        ("OSError: [Errno 28] No space left on device", "a disk is full"),
        ("OSError: /no/model is not a local folder and is not a valid model identifier", "policy.model.path"),
        ("OSError: [Errno 98] Address already in use", "a port is taken"),
    ],
)  # fmt: skip
def test_known_causes_have_a_hint(tmp_path: Path, line: str, hint: str) -> None:
    log = tmp_path / "log"
    log.write_text(f"some line\n{line}\nanother line\n")
    found = read_tail(log).hint()
    assert found is not None and hint in found


@pytest.mark.parametrize("line", ["waiting room is full", "killed", "max_total_num_tokens=20000, memory pool end"])
def test_other_lines_have_none(tmp_path: Path, line: str) -> None:
    log = tmp_path / "log"
    log.write_text(f"{line}\n")
    assert read_tail(log).hint() is None


def test_a_tail_is_the_last_lines_after_the_start_each_cut_to_length(tmp_path: Path) -> None:
    log = tmp_path / "log"
    earlier = "earlier\n"
    log.write_text(earlier + "".join(f"{i} {'y' * 500}\n" for i in range(1000)) + "\n\n")
    tail = read_tail(log, since=len(earlier))
    assert sum(map(len, tail.lines)) <= TAIL_BYTES and "earlier" not in tail.text
    assert all(len(line) <= MAX_LINE_CHARS for line in tail.lines)
    shown = tail.quoted().splitlines()[1:]
    assert [line.split()[1] for line in shown] == [str(i) for i in range(980, 1000)]
    log.write_text(earlier + "now\n")
    assert read_tail(log, since=len(earlier)).lines == ("now",)


def test_an_empty_log_and_one_that_is_gone_are_told(tmp_path: Path) -> None:
    assert "is empty" in read_tail(tmp_path / "log").quoted()
