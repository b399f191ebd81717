"""What the server's half decides before it touches a tensor; it runs here without vLLM."""

from __future__ import annotations

import base64
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from skyrl_train.engines.vllm.inside.skyrl_receiver.manifest import (
    Manifest,
    UpdateRefused,
    file_shapes,
    read_headers,
    update_files,
)
from skyrl_train.engines.vllm.inside.skyrl_receiver.shared import open_shared
from skyrl_train.engines.vllm.inside.skyrl_receiver.wire import cut, num_bytes, pieces, worker_end
from skyrl_train.weight_sync.buckets import BucketBuffer
from skyrl_train.weight_sync.cuda_ipc import allocate_shared, handle_bytes
from skyrl_train.weight_sync.plan import WeightPlan

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
SHAPES = {
    "embed_tokens.weight": (8, 4),
    "l.q_proj.weight": (4, 4),
    "l.q_proj.bias": (4,),
    "l.k_proj.weight": (2, 4),
    "l.v_proj.weight": (2, 4),
    "l.o_proj.weight": (4, 4),
    "l.mlp.experts.0.up_proj.weight": (4, 4),
    "l.mlp.experts.1.down_proj.weight": (4, 4),
}
MODEL = Manifest(shapes=SHAPES, files=dict.fromkeys(SHAPES, "file"), fused=FUSED)


def refused(*tensors: tuple[str, tuple[int, ...]], model: Manifest = MODEL) -> str:
    with pytest.raises(UpdateRefused) as caught:
        model.check(tensors)
    return str(caught.value)


def test_the_models_own_tensors_fit() -> None:
    MODEL.check(SHAPES.items())


def test_all_that_does_not_fit_is_named_at_once() -> None:
    message = refused(
        ("l.q_proj.weight", (4, 5)), ("l.x.weight", (1,)), ("l.o_proj.weight", (4, 4)), ("l.o_proj.weight", (4, 4))
    )
    for part in ("l.q_proj.weight is [4, 5], the model has [4, 4]", "unknown to the model: l.x.weight", "named twice"):
        assert part in message
    assert "it names no tensor" in refused()
    assert "and 7 more" in refused(*((f"x{i}", (1,)) for i in range(10)))


def test_a_tied_head_may_be_named() -> None:
    tied = Manifest(shapes=SHAPES, files=MODEL.files, tied=True)
    tied.check([("lm_head.weight", (8, 4))])
    assert "the model has [8, 4]" in refused(("lm_head.weight", (8, 5)), model=tied)
    assert "unknown" in refused(("lm_head.weight", (8, 4)))


def test_experts_are_not_checked_where_only_a_configuration_is_known() -> None:
    unknown = Manifest(shapes=SHAPES, fused=FUSED)
    unknown.check([("l.mlp.experts.gate_up_proj", (2, 8, 4))])
    assert "unknown" in refused(("l.mlp.gate_up_proj", (2, 8, 4)), model=unknown)


def test_parts_of_a_layer_that_an_update_lacks() -> None:
    assert MODEL.missing_parts(["l.k_proj.weight"]) == ["l.q_proj.weight", "l.q_proj.bias", "l.v_proj.weight"]
    assert MODEL.missing_parts(["l.o_proj.weight", "embed_tokens.weight"]) == []
    assert MODEL.missing_parts(["l.mlp.experts.0.up_proj.weight"]) == ["l.mlp.experts.1.down_proj.weight"]


def test_shapes_are_read_from_headers_alone(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(5)}, tmp_path / "one.safetensors")
    save_file({"c": torch.zeros(1)}, tmp_path / "two.safetensors")
    shapes, files = read_headers(str(tmp_path))
    assert shapes == {"a": (2, 3), "b": (5,), "c": (1,)}
    assert Path(files["c"]).name == "two.safetensors"
    assert read_headers("organisation/model") == ({}, {})


def test_a_file_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "update.safetensors"
    save_file({"a": torch.zeros(2, 3)}, file)
    whole = file.read_bytes()
    for content, message in (
        (whole[:-1], "not written whole"),
        (whole + b"x", "not written whole"),
        (whole[:6], "can't be read"),
        (b"\xff" * 16, "no safetensors file, or cut short"),
        (b"\x02" + b"\0" * 7 + b"[]", "can't be read"),
    ):
        file.write_bytes(content)
        with pytest.raises(UpdateRefused, match=message):
            file_shapes(str(file))


def test_where_there_is_no_file_the_update_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UpdateRefused, match="holds no safetensors file"):
        update_files(str(tmp_path))
    with pytest.raises(UpdateRefused, match="does not exist"):
        update_files(str(tmp_path / "none"))


def test_a_bucket_is_cut_as_it_was_filled() -> None:
    tensors = {"a": torch.arange(3.0), "b": torch.arange(4.0).view(2, 2)}
    plan = WeightPlan.of(tensors, dtype=torch.bfloat16)
    (bucket,) = BucketBuffer(torch.device("cpu")).buckets(plan, tensors)
    described = [[place.spec.name, "bfloat16", list(place.spec.shape)] for place in bucket.places]
    parts = pieces(described)
    assert num_bytes(parts) == bucket.data.numel() == 14
    for name, tensor in cut(bucket.data, parts):
        assert torch.equal(tensor, tensors[name].bfloat16())


def test_a_shared_bucket_is_opened_from_its_handle() -> None:
    tensors = {"a": torch.arange(6.0)}
    plan = WeightPlan.of(tensors, dtype=torch.float32)
    (bucket,) = BucketBuffer(torch.device("cpu"), allocate=allocate_shared).buckets(plan, tensors)
    opened = open_shared(base64.b64encode(handle_bytes(bucket)).decode())
    assert torch.equal(opened.view(torch.float32), tensors["a"])


@pytest.mark.parametrize("content", [pickle.dumps({"flattened_tensor": Path("x")}), b"no pickle", pickle.dumps([1])])
def test_a_handle_that_holds_something_else_is_refused(content: bytes) -> None:
    with pytest.raises(UpdateRefused, match="can't be opened"):
        open_shared(base64.b64encode(content).decode())


def test_the_workers_end_of_a_group_is_found_beside_the_package() -> None:
    assert worker_end().join_group and worker_end() is worker_end()
