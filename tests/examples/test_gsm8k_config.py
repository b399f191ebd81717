"""examples/gsm8k as it is documented: prepared data and the shipped configuration, on a model that fits here."""

import json
import os
import subprocess
import sys
from pathlib import Path

from skyrl_train.observability.metrics import read_metrics
from tests.tiny import make_model, make_tokenizer

ROOT = Path(__file__).parents[2]


def test_the_shipped_configuration_trains_on_prepared_data(tmp_path: Path) -> None:
    source = tmp_path / "raw"
    source.mkdir()
    rows = [json.dumps({"question": f"What is {i} and {i}?", "answer": f"{i}+{i}\n#### {2 * i}"}) for i in range(4)]
    for split in ("train", "test"):
        (source / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    make_model(attn_implementation="eager").save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    prepare = [sys.executable, "examples/gsm8k/prepare.py", "--source", str(source), "--out", str(tmp_path / "data")]
    subprocess.run(prepare, cwd=ROOT, check=True, capture_output=True)
    command = [
        *(sys.executable, "-m", "skyrl_train.entrypoints.main_base"),
        *("--config-path", "examples/gsm8k", "--config-name", "gsm8k_qwen2.5"),
        "trainer.placement.policy_num_gpus_per_node=0",
        f"trainer.policy.model.path={tmp_path / 'model'}",
        f"data.train_data=[{tmp_path / 'data/train.parquet'}]",
        f"data.val_data=[{tmp_path / 'data/test.parquet'}]",
        f"trainer.run_path={tmp_path / 'run'}",
        *("trainer.train_batch_size=4", "trainer.policy_mini_batch_size=4", "trainer.epochs=1"),
        *("generator.sampling_params.max_generate_length=16", "generator.eval_sampling_params.max_generate_length=16"),
        "generator.max_num_seqs=64",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "CI": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    rows_logged = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows_logged] == [0, 1]
    assert rows_logged[1]["rollout/num_trajectories"] == 32 and rows_logged[1]["eval/num_failed"] == 0
