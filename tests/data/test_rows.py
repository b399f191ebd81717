import json
import logging
from pathlib import Path

import pytest

from skyrl_train.data.rows import read_rows
from skyrl_train.errors import ConfigError, DataError


def write(path: Path, lines: list[str]) -> str:
    path.write_text("\n".join(lines) + "\n")
    return str(path)


GOOD = json.dumps({"prompt": "1+1?", "reward_spec": {"ground_truth": "2"}, "extra_info": {"level": 3}})


def test_a_string_prompt_is_one_user_message_and_all_columns_reach_the_environment(tmp_path: Path) -> None:
    (row,) = read_rows([write(tmp_path / "a.jsonl", [GOOD])], environment="arithmetic")
    assert row.messages == ({"role": "user", "content": "1+1?"},)
    assert (row.environment, row.target) == ("arithmetic", "2")
    assert row.extras == {"reward_spec": {"ground_truth": "2"}, "extra_info": {"level": 3}}


def test_the_rows_own_environment_wins(tmp_path: Path) -> None:
    line = json.dumps({"prompt": "x", "env_class": "gsm8k"})
    (row,) = read_rows([write(tmp_path / "a.jsonl", [line])], environment="arithmetic")
    assert row.environment == "gsm8k"


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("{not json", "not JSON"),
        ('{"question": "x"}', "column 'prompt' must be a string or a list of messages"),
        ('{"prompt": []}', "found \\[\\]"),
        ('{"prompt": [{"role": "user"}]}', "role and content"),
        ("[1, 2]", "wanted an object, found list"),
    ],
)
def test_a_bad_row_is_named_by_file_and_number(tmp_path: Path, bad: str, reason: str) -> None:
    path = write(tmp_path / "train.jsonl", [GOOD, bad])
    with pytest.raises(DataError, match=rf"train\.jsonl, row 2: .*{reason}"):
        read_rows([path], environment="arithmetic")


def test_bad_rows_are_skipped_and_counted_when_asked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "a.jsonl", ["{", GOOD, "{}"])
    with caplog.at_level(logging.WARNING):
        rows = read_rows([path], environment="arithmetic", on_bad_row="skip")
    assert len(rows) == 1
    assert "2 of 3 rows skipped" in caplog.text and "row 1" in caplog.text


def test_a_missing_file_and_an_unknown_kind_are_configuration_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        read_rows([str(tmp_path / "none.jsonl")], environment="arithmetic")
    with pytest.raises(ConfigError, match=r"wanted .jsonl, .json, .parquet"):
        read_rows([write(tmp_path / "a.csv", ["a,b"])], environment="arithmetic")


def test_json_parquet_and_a_datasets_folder_give_the_same_rows(tmp_path: Path) -> None:
    import datasets

    raw = [{"prompt": f"{i}+1?", "reward_spec": {"ground_truth": str(i + 1)}} for i in range(3)]
    (tmp_path / "a.json").write_text(json.dumps(raw))
    datasets.Dataset.from_list(raw).to_parquet(str(tmp_path / "a.parquet"))
    datasets.Dataset.from_list(raw).save_to_disk(str(tmp_path / "folder"))
    paths = [str(tmp_path / name) for name in ("a.json", "a.parquet", "folder")]
    first, second, third = (read_rows([path], environment="arithmetic") for path in paths)
    assert first == second == third and len(first) == 3
