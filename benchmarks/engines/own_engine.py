"""SGLang's own in-process Engine, timed in its interpreter: the other side of rollouts_vs_own_engine.

    PYTHON own_engine.py WORK.json -- SERVER ARGUMENTS

Runs inside SGLang's environment and imports nothing of this project. WORK.json has the prompts and how many new tokens
each gets. The server arguments are the very words that the server of the other side was started with. Each line on
stdin, `gather 0.0` or `batch 1.0` (how, temperature), is one round; its figures come back as a line that starts with
MARK. An empty line or the end of stdin ends it.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

MARK = "@@ "


def say(**figures: Any) -> None:
    print(MARK + json.dumps(figures), flush=True)


def main() -> None:
    work_path, dashes, *argv = sys.argv[1:]
    assert dashes == "--", sys.argv
    with open(work_path) as file:
        work = json.load(file)
    prompts, budgets = work["prompts"], work["budgets"]
    import sglang as sgl
    from sglang.srt.server_args import prepare_server_args

    start = time.perf_counter()
    engine = sgl.Engine(server_args=prepare_server_args(argv))
    say(start_s=time.perf_counter() - start)
    loop = getattr(engine, "loop", None) or asyncio.get_event_loop()
    for line in sys.stdin:
        if not line.strip():
            break
        how, temperature = line.split()
        params = [
            {"max_new_tokens": budget, "temperature": float(temperature), "ignore_eos": True} for budget in budgets
        ]
        try:
            engine.flush_cache()
            wall, cpu = time.perf_counter(), time.process_time()
            if how == "gather":
                answers = loop.run_until_complete(gather(engine, prompts, params))
            else:
                answers = loop.run_until_complete(
                    engine.async_generate(input_ids=prompts, sampling_params=params, return_logprob=True)
                )
            wall_s, cpu_s = time.perf_counter() - wall, time.process_time() - cpu
            say(
                wall_s=wall_s,
                cpu_s=cpu_s,
                num_tokens=sum(len(answer["output_ids"]) for answer in answers),
                num_logprobs=sum(len(answer["meta_info"]["output_token_logprobs"]) for answer in answers),
                first=answers[0]["output_ids"],
            )
        except Exception as exc:
            say(error=f"{type(exc).__name__}: {exc}")
    engine.shutdown()


async def gather(engine: Any, prompts: list[list[int]], params: list[dict[str, Any]]) -> list[Any]:
    """One call a request, as a rollout makes them."""
    return await asyncio.gather(
        *(
            engine.async_generate(input_ids=prompt, sampling_params=sampling, return_logprob=True)
            for prompt, sampling in zip(prompts, params, strict=True)
        )
    )


if __name__ == "__main__":  # SGLang's workers import this file again
    main()
