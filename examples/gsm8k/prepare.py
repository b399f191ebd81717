"""GSM8K to training files: `python examples/gsm8k/prepare.py --out data/gsm8k`.

Downloads `openai/gsm8k` through the `datasets` library, or reads a copy that is already here:

    python examples/gsm8k/prepare.py --out data/gsm8k --source path/to/gsm8k

where the folder holds train.jsonl and test.jsonl (or .parquet) with the columns `question` and `answer`.
Writes train.parquet and test.parquet: one row a problem, in the form that the `gsm8k` environment reads.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import datasets

INSTRUCTION = 'Let\'s think step by step and output the final answer after "####".'


def make_row(question: str, answer: str, *, split: str, index: int) -> dict[str, Any]:
    """One row; raises ValueError when the worked answer has no `####`."""
    worked, separator, result = answer.rpartition("####")
    if not separator or not result.strip():
        raise ValueError(f"{split} row {index}: the answer has no '####' with a result after it: {answer[-60:]!r}")
    return {
        "prompt": [{"role": "user", "content": f"{question.strip()} {INSTRUCTION}"}],
        "env_class": "gsm8k",
        "reward_spec": {"method": "rule", "ground_truth": result.strip().replace(",", "")},
        "extra_info": {"split": split, "index": index, "question": question, "answer": worked.strip()},
    }


def load_split(source: str | None, split: str) -> datasets.Dataset:
    """The raw split, from a folder of files or from the hub."""
    if source is None:
        return datasets.load_dataset("openai/gsm8k", "main", split=split)
    for suffix, kind in ((".jsonl", "json"), (".parquet", "parquet")):
        path = Path(source) / f"{split}{suffix}"
        if path.exists():
            return datasets.load_dataset(kind, data_files=str(path), split="train")
    raise FileNotFoundError(f"neither {split}.jsonl nor {split}.parquet is in {source!r}")


def main(argv: list[str] | None = None) -> int:
    """Writes both files; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/gsm8k"), help="folder to write to")
    parser.add_argument("--source", help="folder with train/test .jsonl or .parquet; default: the hub")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        try:
            raw = load_split(args.source, split)
        except (FileNotFoundError, ConnectionError, datasets.exceptions.DatasetNotFoundError) as exc:
            print(f"GSM8K's {split} split can't be read: {exc}", file=sys.stderr)
            print("Without a network, give a folder with the files: --source path/to/gsm8k", file=sys.stderr)
            return 2
        rows = [make_row(row["question"], row["answer"], split=split, index=i) for i, row in enumerate(raw)]
        path = args.out / f"{split}.parquet"
        datasets.Dataset.from_list(rows).to_parquet(str(path))
        print(f"{path}: {len(rows)} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
