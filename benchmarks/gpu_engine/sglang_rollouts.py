"""SGLang on the same works, in its own interpreter. Imports nothing of this project.

    PYTHON sglang_rollouts.py SPEC.json RESULT.json

SPEC.json: `engine`, the keywords of sgl.Engine; `works`, each with a name, prompts and how many new tokens each gets;
`repetitions`; `seconds`, after which no further work is begun. RESULT.json has the seconds of each work, and is
written after each one. The prefix cache is emptied before each run.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any


def main() -> None:
    spec_path, result_path = sys.argv[1:]
    with open(spec_path) as file:
        spec = json.load(file)
    end = time.monotonic() + spec["seconds"]
    import sglang as sgl

    start = time.perf_counter()
    engine: Any = sgl.Engine(**spec["engine"])
    results: dict[str, Any] = {"start_s": time.perf_counter() - start, "works": []}
    for work in spec["works"]:
        if time.monotonic() > end:
            break
        row: dict[str, Any] = {"name": work["name"], "tokens": work["new"] * len(work["prompts"])}
        try:
            one_run(engine, work, 8)
            row["seconds"] = [one_run(engine, work, work["new"]) for _ in range(spec["repetitions"])]
        except Exception as exc:  # one work that fails is a row
            row["error"] = f"{type(exc).__name__}: {exc}"
        results["works"].append(row)
        with open(result_path, "w") as file:
            json.dump(results, file)
        print(row, flush=True)
    engine.shutdown()


def one_run(engine: Any, work: dict[str, Any], new: int) -> float:
    engine.flush_cache()
    sampling = {"max_new_tokens": new, "temperature": 1.0, "ignore_eos": True}
    start = time.perf_counter()
    answers = engine.generate(input_ids=work["prompts"], sampling_params=sampling, return_logprob=True)
    seconds = time.perf_counter() - start
    assert all(len(answer["meta_info"]["output_token_logprobs"]) == new for answer in answers)
    return seconds


if __name__ == "__main__":  # SGLang's workers import this file again
    main()
