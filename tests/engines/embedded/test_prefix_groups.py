from __future__ import annotations

import numpy as np
import pytest

from skyrl_train.engines.embedded import prefix_groups
from skyrl_train.engines.embedded.prefix_groups import (
    PrefixGroup,
    lay_out_tiles,
    max_tiles,
    num_saved_tokens,
    shared_prefixes,
)
from tests.engines.embedded.common import make_core, random_prompts, request


@pytest.fixture(autouse=True)
def short_prefixes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_groups, "MIN_LENGTH", 8)


def test_requests_of_one_prompt_are_a_group_whose_slots_are_the_same() -> None:
    core = make_core(max_num_seqs=12, max_num_batched_tokens=64, kv_cache_tokens=512)
    first, second, third = random_prompts(20, 30, 25)
    prompts = [first, second, first, third, first, second, first, second, second, first]
    for number, prompt in enumerate(prompts):
        core.add(request(f"r{number}", prompt, 30, temperature=1.0, seed=number, ignore_eos=True))
    for _ in range(6):
        core.step()
    states = core.scheduler.running()
    assert [state.request.prompt_token_ids for state in states] == prompts
    groups = shared_prefixes(states)
    # The last prompt token is each request's own; three requests alone would not be worth it.
    assert sorted((group.length, group.rows) for group in groups) == [(19, (0, 2, 4, 6, 9)), (29, (1, 5, 7, 8))]
    slots = core.scheduler.seats.slots
    for group in groups:
        common = [slots[states[row].seat, : group.length] for row in group.rows]
        assert all(np.array_equal(common[0], others) for others in common)


def test_a_longer_prefix_of_enough_requests_comes_before_a_shorter_one_of_all() -> None:
    core = make_core(max_num_seqs=12, max_num_batched_tokens=64, kv_cache_tokens=512)
    start, a, b = random_prompts(16, 12, 12)
    prompts = [start + a] * 4 + [start + b] * 4 + [start + a[:6]]
    for number, prompt in enumerate(prompts):
        core.add(request(f"r{number}", prompt, 30, temperature=1.0, seed=number, ignore_eos=True))
    for _ in range(6):
        core.step()
    groups = shared_prefixes(core.scheduler.running())
    assert sorted((group.length, group.rows) for group in groups) == [(27, (0, 1, 2, 3)), (27, (4, 5, 6, 7))]


def test_without_a_cache_nothing_is_shared() -> None:
    core = make_core(enable_prefix_caching=False)
    for number in range(4):
        core.add(request(f"r{number}", random_prompts(20)[0], 30, temperature=1.0, seed=number, ignore_eos=True))
    for _ in range(8):
        core.step()
    assert shared_prefixes(core.scheduler.running()) == []


def test_tiles_hold_each_row_once_in_like_parts() -> None:
    groups = [PrefixGroup(length=100, rows=tuple(range(0, 18, 2))), PrefixGroup(length=70, rows=(1, 3, 5, 7))]
    lengths, rows, starts = lay_out_tiles(groups, 20, 8)
    assert len(lengths) == len(rows) == max_tiles(20) == 5
    assert lengths.tolist() == [100, 100, 70, 0, 0]
    assert [sorted(row[row >= 0].tolist()) for row in rows] == [[0, 2, 4, 6, 8], [10, 12, 14, 16], [1, 3, 5, 7], [], []]
    assert starts[[0, 16]].tolist() == [100, 100] and starts[[1, 7]].tolist() == [70, 70]
    assert not starts[[9, 11, 18, 19]].any()
    assert num_saved_tokens(groups, 8) == 100 * (9 - 2) + 70 * (4 - 1)


def test_groups_never_need_more_tiles_than_there_are() -> None:
    for size in range(4, 40):
        groups = [PrefixGroup(length=64, rows=tuple(range(at, at + size))) for at in range(0, 200 - size, size)]
        lengths, rows, starts = lay_out_tiles(groups, 200, 8)
        assert (lengths > 0).sum() == sum(-(-size // 8) for _ in groups)
        assert sorted(rows[rows >= 0].tolist()) == list(range(len(groups) * size))
        assert (starts > 0).sum() == len(groups) * size
