"""SGLang's side of `rollouts`: the same works, in its own interpreter, sampled at temperature 1 with log-probabilities.

    python -m benchmarks.gpu_engine.peer --site DIR --out DIR

`--site` has SGLang's packages (scripts/gpu_engines.py says how they get there). Random weights of the same shape.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import machine
from benchmarks.gpu_engine.rollouts import WORKS
from benchmarks.gpu_engine.variants import Rows, parser_of, works
from benchmarks.models import SHAPES
from benchmarks.report import Report


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("python -m benchmarks.gpu_engine.peer", __doc__)
    parser.add_argument("--site", required=True, help="goes on the peer's PYTHONPATH; several with a colon between")
    parser.add_argument("--cases", type=works, default=works(WORKS))
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--memory", type=float, default=0.7, help="of the GPU's, for its weights and cache")
    args = parser.parse_args(argv)
    shape = SHAPES[args.shape]
    name = f"gpu-rollouts-sglang-{args.shape}-{machine.slug(args.device)}"
    report = Report(f"SGLang's rollouts of shape {args.shape}", name, args.out)
    rows = Rows(args.out / f"{name}.json", args.device)
    work_folder: Path = args.work / "sglang"
    work_folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "vocab_size": shape.vocab_size,
        "tie_word_embeddings": shape.tied,
        "max_position_embeddings": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
    }
    (work_folder / "config.json").write_text(json.dumps(config))
    largest = max(work.count for work in args.cases)
    spec = {
        "engine": {
            "model_path": str(work_folder),
            "skip_tokenizer_init": True,
            "attention_backend": "fa3",
            "sampling_backend": "pytorch",
            "dtype": "bfloat16",
            "mem_fraction_static": args.memory,
            "load_format": "dummy",
            "cuda_graph_max_bs_decode": largest,
            "disable_prefill_cuda_graph": True,
            "random_seed": 1,
            "log_level": "info",
        },
        "works": [
            {
                "name": str(work),
                "new": work.new,
                "prompts": [list(r.prompt_token_ids) for r in work.requests(shape.vocab_size, args.seed)],
            }
            for work in args.cases
        ],
        "repetitions": args.repetitions,
        "seconds": max(args.budget_s - 40, 20),
    }
    spec_path, result_path = work_folder / "spec.json", work_folder / "result.json"
    spec_path.write_text(json.dumps(spec))
    environment = {
        **os.environ,
        "PYTHONPATH": args.site,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/local/cuda/bin"]),
        "CUDA_MODULE_LOADING": "LAZY",
        "SGLANG_ENABLE_JIT_DEEPGEMM": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    script = Path(__file__).with_name("sglang_rollouts.py")
    report.log("SGLang starts")
    with (args.out / "sglang.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, str(script), str(spec_path), str(result_path)],
            env=environment,
            cwd=work_folder,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(timeout=args.budget_s)
        except subprocess.TimeoutExpired:
            report.log("over its time")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with its workers
            process.wait()
    found = json.loads(result_path.read_text()) if result_path.exists() else {"works": []}
    table = []
    for row in found["works"]:
        rows.add(work=row["name"], kernels="sglang", **{k: v for k, v in row.items() if k != "name"})
        if "error" in row:
            table.append([row["name"], row["error"][:150], ""])
            continue
        median = statistics.median(row["seconds"])
        spread = f"{median:.3f} ({min(row['seconds']):.3f} to {max(row['seconds']):.3f})"
        table.append([row["name"], f"{row['tokens'] / median:,.0f}", spread])
    if not table:
        table.append(["SGLang did not get to a work; see the end of sglang.log", "", ""])
    report.facts(machine.describe(args.device))
    report.table(["work", "tokens/s", "seconds (min to max)"], table)
    report.save()
    if not found["works"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
