"""A process that owns a small server, as the trainer does: started and killed by a test.

`trainer.py FOLDER [fork] [-- server options]`: starts the server, writes FOLDER/ready with its url, and waits. With
`fork`, a forked copy of it, with all its descriptors, lives on in FOLDER/pids/fork.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from pathlib import Path

from skyrl_train.engines.server.process import ServerProcess
from tests.engines.server.launching import small_server


async def main() -> None:
    folder, arguments = Path(sys.argv[1]), sys.argv[2:]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    server = ServerProcess(small_server(folder, *arguments[arguments.index("--") + 1 :]))
    url = await server.start()
    if arguments[0] == "fork" and os.fork() == 0:
        (folder / "pids" / "fork").write_text(str(os.getpid()))
        time.sleep(600)
    (folder / "ready.writing").write_text(url)
    (folder / "ready.writing").rename(folder / "ready")
    await server.wait_dead()


if __name__ == "__main__":
    asyncio.run(main())
