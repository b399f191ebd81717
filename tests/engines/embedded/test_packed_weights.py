from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from skyrl_train.engines.embedded.packed_weights import PackedLinears, shared_pointers

X = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))


def maps(*, bias: bool = True) -> list[nn.Linear]:
    torch.manual_seed(1)
    return [nn.Linear(16, size, bias=bias) for size in (24, 8, 8)]


def agrees(packed: PackedLinears, modules: list[nn.Linear]) -> bool:
    with torch.no_grad():
        return all(torch.allclose(a, m(X), atol=1e-6) for a, m in zip(packed(X), modules, strict=True))


@pytest.mark.parametrize("bias", [True, False])
def test_packed_maps_compute_what_the_maps_compute(bias: bool) -> None:
    modules = maps(bias=bias)
    before = [copy.deepcopy(parameter) for module in modules for parameter in module.parameters()]
    packed = PackedLinears(modules)
    assert packed.is_packed and packed.is_intact() and agrees(packed, modules)
    after = [parameter for module in modules for parameter in module.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert len({module.weight.untyped_storage().data_ptr() for module in modules}) == 1


def test_steps_of_an_optimizer_that_was_there_before_are_in_the_product_at_once() -> None:
    modules = maps()
    parameters = [parameter for module in modules for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    packed = PackedLinears(modules)
    start = [x.clone() for x in packed(X)]
    sum(module(X).pow(2).sum() for module in modules).backward()  # type: ignore[union-attr]
    optimizer.step()
    assert packed.is_intact() and agrees(packed, modules)
    assert not any(torch.allclose(a, b) for a, b in zip(start, packed(X), strict=True))


def test_a_second_engine_takes_over_what_the_first_one_packed() -> None:
    modules = maps()
    first = PackedLinears(modules)
    where = [module.weight.data_ptr() for module in modules]
    second = PackedLinears(modules)
    assert second.is_packed and first.is_intact() and second.is_intact() and agrees(second, modules)
    assert where == [module.weight.data_ptr() for module in modules]


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_parameter_with_memory_of_its_own_is_noticed_and_the_maps_are_computed_one_by_one(name: str) -> None:
    for how in ("parameter", "data"):
        modules = maps()
        packed = PackedLinears(modules)
        other = torch.randn_like(getattr(modules[1], name))
        if how == "parameter":
            setattr(modules[1], name, nn.Parameter(other))
        else:
            getattr(modules[1], name).data = other
        assert not packed.is_intact()
        packed.separate()
        assert not packed.is_packed and packed.is_intact() and agrees(packed, modules)


def test_what_lies_in_memory_of_somebody_else_stays_there() -> None:
    modules = maps()
    flat = torch.randn(2, 24, 16)
    modules[0].weight.data = flat[1]
    packed = PackedLinears(modules)
    assert not packed.is_packed and agrees(packed, modules)
    assert modules[0].weight.data_ptr() == flat[1].data_ptr()


def test_a_tied_matrix_is_not_packed() -> None:
    model = nn.ModuleDict({"a": nn.Linear(16, 16, bias=False), "b": nn.Linear(16, 16, bias=False)})
    model["c"] = nn.Linear(16, 16, bias=False)
    model["c"].weight = model["a"].weight
    packed = PackedLinears([model["a"], model["b"]], shared=shared_pointers(model))
    assert not packed.is_packed and model["c"].weight is model["a"].weight


@pytest.mark.parametrize("odd", ["dtype", "bias"])
def test_maps_that_are_not_alike_are_not_packed(odd: str) -> None:
    modules = maps()
    if odd == "dtype":
        modules[2] = modules[2].double()
    else:
        modules[2] = nn.Linear(16, 8, bias=False)
    assert not PackedLinears(modules).is_packed


def test_packed_weights_are_copied_and_saved_like_others(tmp_path: Path) -> None:
    modules = nn.ModuleList(maps())
    packed = PackedLinears(list(modules))
    other = copy.deepcopy(modules)
    assert all(m.weight.untyped_storage().nbytes() == m.weight.numel() * 4 for m in other)  # type: ignore[operator]
    save_file(modules.state_dict(), tmp_path / "weights.safetensors")
    torch.save(modules.state_dict(), tmp_path / "weights.pt")
    for state in (load_file(tmp_path / "weights.safetensors"), torch.load(tmp_path / "weights.pt")):
        assert all(torch.equal(state[name], tensor) for name, tensor in modules.state_dict().items())
    with torch.no_grad():
        other[0].weight.add_(1)  # type: ignore[operator]
    modules.load_state_dict(other.state_dict())
    assert packed.is_intact() and agrees(packed, list(modules))  # type: ignore[arg-type]
