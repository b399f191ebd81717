import io
from collections import Counter

import pytest
import torch

from skyrl_train.data.rows import PromptRow
from skyrl_train.data.stream import PromptStream, eval_prompts
from skyrl_train.errors import ConfigError


def make_stream(num_rows: int = 10, batch_size: int = 4, seed: int = 1) -> PromptStream:
    rows = [
        PromptRow(messages=({"role": "user", "content": str(i)},), environment="arithmetic", target=i)
        for i in range(num_rows)
    ]
    return PromptStream(rows, batch_size=batch_size, seed=seed)


def ids(stream: PromptStream, batches: int) -> list[str]:
    return [prompt.prompt_id for _ in range(batches) for prompt in stream.next_batch()]


def test_each_row_comes_once_an_epoch_and_batches_run_on_across_its_end() -> None:
    seen = ids(make_stream(), 5)
    assert len(set(seen)) == 20
    assert Counter(name.split("-")[0] for name in seen) == {"0": 10, "1": 10}
    assert sorted(name.split("-")[1] for name in seen[:10]) == sorted(map(str, range(10)))
    assert [n.split("-")[1] for n in seen[:10]] != [n.split("-")[1] for n in seen[10:]], "epochs share an order"


def test_the_order_depends_on_the_seed_alone() -> None:
    assert ids(make_stream(seed=3), 5) == ids(make_stream(seed=3), 5)
    assert ids(make_stream(seed=3), 5) != ids(make_stream(seed=4), 5)


@pytest.mark.parametrize("consumed", [0, 1, 2, 3, 7])
def test_a_stream_restored_from_a_saved_state_goes_on_with_the_next_row(consumed: int) -> None:
    stream = make_stream()
    ids(stream, consumed)
    buffer = io.BytesIO()
    torch.save(stream.state_dict(), buffer)
    expected = ids(stream, 4)
    buffer.seek(0)
    restored = make_stream()
    restored.load_state_dict(torch.load(buffer, weights_only=True))
    assert ids(restored, 4) == expected


def test_a_state_of_other_data_is_refused() -> None:
    state = make_stream()
    state.next_batch()
    other = make_stream(num_rows=11)
    other.load_state_dict(state.state_dict())
    with pytest.raises(ConfigError, match="made with 10 data rows and seed 1, this run has 11 and 1"):
        other.next_batch()


def test_fewer_rows_than_a_batch_is_an_error_with_the_numbers() -> None:
    with pytest.raises(ConfigError, match="train_batch_size is 4, the training data has 3 rows"):
        make_stream(num_rows=3)


def test_steps_are_whole_batches_over_all_epochs() -> None:
    assert make_stream().num_steps(1) == 2
    assert make_stream().num_steps(2) == 5


def test_held_out_prompts_keep_their_order() -> None:
    rows = [PromptRow(messages=({"role": "user", "content": "x"},), environment="a", target=i) for i in range(3)]
    assert [p.prompt_id for p in eval_prompts(rows)] == ["eval-0", "eval-1", "eval-2"]
