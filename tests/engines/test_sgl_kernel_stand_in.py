"""The stand-in's operators against slow readings of what SGLang asks for, without SGLang."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "scripts" / "engines" / "sgl_kernel"


def load(name: str) -> ModuleType:
    """One file of it by itself: importing the package changes torch for the whole process."""
    spec = importlib.util.spec_from_file_location(f"stand_in_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


slots, draft_tree = load("slots"), load("draft_tree")


def test_the_drawn_tree_has_the_drawn_links() -> None:
    assert draft_tree.links([-1, 0, 0, 1, 1]) == ([1, 3, -1, -1, -1], [-1, 2, -1, 4, -1])


def _built(num_requests: int = 2, n: int = 5) -> dict[str, torch.Tensor]:
    """Two requests of lengths 10 and 4, topk 2. The first has the drawn tree: candidates 0 and 1 hang on node 0, 2, 3
    on candidate 0. The second is a chain of four: 0, then 2, 4, 6, each the first of the one before.
    """
    tensors = {
        "mask": torch.ones(num_requests * n * n, dtype=torch.bool),
        "positions": torch.zeros(num_requests * n, dtype=torch.long),
        "index": torch.full((num_requests, n), -1),
        "child": torch.full((num_requests, n), -1),
        "sibling": torch.full((num_requests, n), -1),
    }
    # parent_list[e] is the candidate that expansion e went on from; entry 0 is never read.
    parents = torch.tensor([[-1, 0, 1, 2], [-1, 0, 2, 4]])
    chosen = torch.tensor([[0, 1, 2, 3], [0, 2, 4, 6]])
    draft_tree.build_tree_kernel_efficient_cpu(
        parents, chosen, torch.tensor([10, 4]), tensors["mask"], tensors["positions"], tensors["index"],
        tensors["child"], tensors["sibling"], 2, 4, n, 1,
    )  # fmt: skip
    return tensors


def test_a_tree_is_built_from_its_candidates() -> None:
    built = _built()
    assert built["positions"].tolist() == [10, 11, 11, 12, 12, 4, 5, 6, 7, 8]
    assert built["child"].tolist() == [[1, 3, -1, -1, -1], [1, 2, 3, 4, -1]]
    assert built["sibling"].tolist() == [[-1, 2, -1, 4, -1], [-1] * 5]
    assert built["index"].tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    tree, chain = built["mask"].view(2, 5, 5).int().tolist()
    assert tree == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 1, 0, 1, 0], [1, 1, 0, 0, 1]]
    assert chain == torch.ones(5, 5, dtype=torch.int).tril().tolist()


def test_a_mask_over_the_whole_sequence_is_refused() -> None:
    empty = torch.zeros(0)
    with pytest.raises(NotImplementedError, match="tree_mask_mode 0"):
        draft_tree.build_tree_kernel_efficient_cpu(*[empty] * 8, 2, 4, 5, 0)


def test_the_mask_alone_gives_the_same_tree() -> None:
    built = _built()
    found = {name: torch.full_like(built[name], -7) for name in ("positions", "index", "child", "sibling")}
    draft_tree.reconstruct_indices_from_tree_mask(
        built["mask"], torch.tensor([10, 4]), found["positions"], found["index"], found["child"], found["sibling"], 2, 5
    )
    for name, tensor in found.items():
        assert torch.equal(tensor, built[name]), name


def test_verification_goes_down_the_branch_that_the_target_says() -> None:
    """Tokens 7 | 1 2 | 3 4 in the drawn tree; the target says 1 after 7, 4 after 7 1, and 9 after 7 1 4."""
    built = _built()
    candidates = torch.tensor([[7, 1, 2, 3, 4], [7, 1, 2, 3, 4]])
    target = torch.tensor([[1, 4, 0, 0, 9], [5, 0, 0, 0, 0]])
    predicts = torch.zeros(10, dtype=torch.int32)
    accepted = torch.full((2, 5), -1, dtype=torch.int32)
    counts = torch.empty(2, dtype=torch.int32)
    draft_tree.verify_tree_greedy_cpu(
        predicts=predicts, accept_index=accepted, accept_token_num=counts, candidates=candidates,
        retrive_index=built["index"], retrive_next_token=built["child"], retrive_next_sibling=built["sibling"],
        target_predict=target,
    )  # fmt: skip
    assert counts.tolist() == [2, 0]
    assert accepted.tolist() == [[0, 1, 4, -1, -1], [5, -1, -1, -1, -1]]
    assert predicts[[0, 1, 4]].tolist() == [1, 4, 9]
    assert predicts[5] == 5


def test_slots_are_entered_and_listed_by_request() -> None:
    table = torch.zeros((3, 8), dtype=torch.int32)
    rows, starts, ends = torch.tensor([2, 0]), torch.tensor([1, 4]), torch.tensor([3, 7])
    slots.assign_req_to_token_pool_cpu(rows, table, starts, ends, torch.tensor([10, 11, 12, 13, 14]), 8)
    assert table.tolist() == [[0, 0, 0, 0, 12, 13, 14, 0], [0] * 8, [0, 10, 11, 0, 0, 0, 0, 0]]
    out = torch.zeros(5, dtype=torch.long)
    slots.assign_extend_cache_locs_cpu(rows, table, starts, ends, out, 8)
    assert out.tolist() == [10, 11, 12, 13, 14]
    draft = torch.zeros(4, dtype=torch.long)
    slots.assign_draft_cache_locs_contiguous_cpu(rows, table, torch.tensor([1, 5]), draft, 8, 1, 2)
    assert draft.tolist() == [10, 11, 13, 14]


def test_each_branch_of_a_draft_has_the_prefix_and_its_own_slots() -> None:
    table = torch.arange(16, dtype=torch.int32).view(2, 8)
    found = slots.build_draft_decode_metadata_cpu(table, torch.tensor([1]), torch.tensor([3]), 2, 2, 8)
    assert found.tolist() == [[8, 9, 10, 11, 12, 0, 0, 0], [8, 9, 10, 13, 14, 0, 0, 0]]


def test_accepted_tokens_and_slots_are_gathered() -> None:
    bonus = torch.zeros(2, dtype=torch.long)
    slots.fill_bonus_tokens_cpu(torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([2, 1]), bonus, 3)
    assert bonus.tolist() == [2, 4]
    kept = torch.zeros(4, dtype=torch.long)
    slots.fill_accept_out_cache_loc_cpu(torch.tensor([[0, 2, -1], [3, -1, -1]]), torch.tensor([9, 8, 7, 6]), kept)
    assert kept.tolist() == [9, 7, 6, 0]


def test_ids_move_to_the_left_and_the_newest_comes_last() -> None:
    ids = torch.tensor([1, 2, 3, 4, 5])
    slots.rotate_input_ids_cpu(ids, torch.tensor([0, 3]), torch.tensor([3, 2]), torch.tensor([8, 9]))
    assert ids.tolist() == [2, 3, 8, 5, 9]


def test_cache_slots_move_in_every_layer_also_where_they_overlap() -> None:
    layers = [torch.arange(12.0).view(4, 3), torch.arange(8.0).view(4, 2)]
    pointers = torch.tensor([layer.data_ptr() for layer in layers])
    strides = torch.tensor([layer.stride(0) * 4 for layer in layers])
    slots.copy_all_layer_kv_cache_cpu(pointers, strides, torch.tensor([0, 1]), torch.tensor([1, 3]))
    assert layers[0].tolist() == [[3, 4, 5], [9, 10, 11], [6, 7, 8], [9, 10, 11]]
    assert layers[1].tolist() == [[2, 3], [6, 7], [4, 5], [6, 7]]
