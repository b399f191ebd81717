"""A server of the standard library alone that behaves as it is told: what ServerProcess is tested with.

It runs as a program. `GET /health` answers 200, or 503 while the file `--unhealthy-while` exists; `GET /variable/NAME`
answers with a variable of its environment. Every process that it starts writes its id into `--pids`, a folder.
"""

from __future__ import annotations

import argparse
import http.server
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path


def main() -> None:
    options = _options()
    _note(options.pids, "main")
    print(f"small server listens on {options.port} soon")
    if options.exit_at_once is not None:
        print(options.message, file=sys.stderr)
        sys.exit(options.exit_at_once)
    if options.ignore_sigterm:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if options.daemon:
        _start_daemon(options.pids)
    if options.scheduler:
        _start_scheduler(options.pids)
    if options.lose_bind_once is not None and not options.lose_bind_once.exists():
        options.lose_bind_once.touch()
        with socket.socket() as first, socket.socket() as second:
            first.bind((options.host, options.port))
            first.listen()
            second.bind((options.host, options.port))
    if options.hand_port_over_once is not None and not options.hand_port_over_once.exists():
        options.hand_port_over_once.write_text(str(options.port))
        time.sleep(600)
    time.sleep(options.ready_after)
    if options.exit_after is not None:
        threading.Timer(options.exit_after, os._exit, (4,)).start()
    server = http.server.ThreadingHTTPServer((options.host, options.port), _Handler)
    server.unhealthy = options.unhealthy_while  # type: ignore[attr-defined]
    server.serve_forever()


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        unhealthy: Path | None = self.server.unhealthy  # type: ignore[attr-defined]
        body = os.environ.get(self.path.removeprefix("/variable/"), "(unset)").encode()
        self.send_response(503 if self.path == "/health" and unhealthy is not None and unhealthy.exists() else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _start_daemon(pids: Path) -> None:
    """A grandchild in a session of its own whose parent is gone, and which does not leave on SIGTERM."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            _note(pids, "daemon")
            time.sleep(600)
        os._exit(0)
    os.wait()


def _start_scheduler(pids: Path) -> None:
    """A child with the title of SGLang's scheduler, which runs on its own."""
    if os.fork() == 0:
        _note(pids, "scheduler")
        os.execv("/bin/sleep", ["sglang::scheduler", "600"])


def _note(pids: Path, name: str) -> None:
    (pids / f"{name}.writing").write_text(str(os.getpid()))
    (pids / f"{name}.writing").rename(pids / name)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--pids", type=Path, required=True)
    parser.add_argument("--ready-after", type=float, default=0.0)
    parser.add_argument("--exit-at-once", type=int)
    parser.add_argument("--message", default="")
    parser.add_argument("--exit-after", type=float)
    parser.add_argument("--ignore-sigterm", action="store_true")
    parser.add_argument("--daemon", action="store_true")
    parser.add_argument("--scheduler", action="store_true")
    parser.add_argument("--unhealthy-while", type=Path)
    parser.add_argument("--lose-bind-once", type=Path)
    parser.add_argument("--hand-port-over-once", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
